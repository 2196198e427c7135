"""Planted ranks: does a strategy find the rank of an update that is known? See `__main__`."""

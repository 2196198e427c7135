"""Experiments: a grid of methods, tasks and seeds; one JSON a run; tables and figures from them."""

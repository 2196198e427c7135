"""Imported first: bitsandbytes, which PEFT imports where it is installed, warns of a CPU kernel nobody asked for."""

import logging

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

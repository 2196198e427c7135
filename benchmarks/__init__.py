"""What is measured by hand, each by `python -m benchmarks.NAME`."""

import rankrace as rankrace  # before PEFT: see there what it keeps off the terminal

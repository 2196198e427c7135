"""`python -m rankrace` is `rankrace`."""

from rankrace.cli import main

main()

"""`python -m rankrace` is `rankrace`."""

from rankrace.cli import main

if __name__ == "__main__":  # processes of `bench run` import this file under another name
    main()

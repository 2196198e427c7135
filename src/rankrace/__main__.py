"""`python -m rankrace` is `rankrace`."""

import sys


def main() -> None:
    """The command; Ctrl-C while it is being read ends it like any other time."""
    try:
        from rankrace.cli import main as command
    except KeyboardInterrupt:
        sys.stderr.write("Stopped.\n")
        sys.exit(130)
    command()


if __name__ == "__main__":  # processes of `bench run` import this file under another name
    main()

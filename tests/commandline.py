"""`rankrace …` as a person runs it, but within the test's process."""

import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from transformers.utils import logging

from rankrace.cli import main


@dataclass(frozen=True)
class Ran:
    """What is seen of a command from outside."""

    code: int
    out: str
    err: str


def rankrace(*arguments: object) -> Ran:
    """Runs the command line; an error that it does not catch is raised."""
    out, err, code = StringIO(), StringIO(), 0
    argv, verbosity = sys.argv, logging.get_verbosity()
    sys.argv = ["rankrace", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as stop:
        if not isinstance(stop.code, int):
            raise
        code = stop.code
    finally:
        sys.argv = argv
        logging.set_verbosity(verbosity)
    return Ran(code, out.getvalue(), err.getvalue())


def assert_refused(ran: Ran, *words: str, within: Path | None = None, left: Sequence[str] = ()) -> None:
    """An error in three parts that says these words, exit code 2, nothing on stdout, nothing else in a folder."""
    assert ran.code == 2, ran
    assert ran.out == ""
    start = ran.err.index("error: ")
    what, why, fix = ran.err[start:].rstrip("\n").split("\n")
    assert len(what) > len("error: ")
    for part, name in ((why, "  why: "), (fix, "  fix: ")):
        assert part.startswith(name)
        assert len(part) > len(name)
    for word in words:
        assert word in ran.err[start:], f"{word!r} is not in:\n{ran.err}"
    if within is not None:
        assert sorted(path.name for path in within.iterdir()) == sorted(left)

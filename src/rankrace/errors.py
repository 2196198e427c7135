"""The one error a user is meant to read."""


class RankraceError(Exception):
    """Something the user can put right.

    Three parts: what is wrong, why it matters, what to do. The command line prints them and exits with
    code 2; nothing half-written is left behind.
    """

    def __init__(self, what: str, *, why: str, fix: str) -> None:
        super().__init__(f"{what}\n  why: {why}\n  fix: {fix}")
        self.what = what
        self.why = why
        self.fix = fix

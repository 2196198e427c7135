"""One row and where it stands, so that every complaint about a value names its place."""

from dataclasses import dataclass
from typing import Any, NoReturn

from rankrace.errors import RankraceError


def kind_of(value: object) -> str:
    return "missing (null)" if value is None else f"of type {type(value).__name__}"


@dataclass(frozen=True, slots=True)
class Row:
    """Column names and their values; `where` is the file or split and the row's number."""

    values: dict[str, Any]
    where: str

    def fault(self, what: str, fix: str = "correct or remove the row.") -> NoReturn:
        raise RankraceError(f"{self.where}: {what}", why="every row must give a training example.", fix=fix)

    def has(self, *columns: str) -> bool:
        """Is there a value (not null, not an empty string or list) in one of the columns?"""
        return any(self.values.get(column) not in (None, "", [], {}) for column in columns)

    def value(self, *columns: str) -> tuple[str, Any]:
        """The first of the columns that the row has, and its value."""
        for column in columns:
            if column in self.values:
                return column, self.values[column]
        return self.fault(f"there is no column {' or '.join(columns)} (seen: {', '.join(self.values)}).")

    def text(self, *columns: str) -> str:
        """The text in the first of the columns that the row has."""
        column, value = self.value(*columns)
        if not isinstance(value, str):
            self.fault(f"'{column}' must be text and is {kind_of(value)}.")
        if not value.strip():
            self.fault(f"'{column}' is empty.")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can write half of a character
            self.fault(f"'{column}' holds {value[error.start]!a}, half of a surrogate pair and no character.")
        return value

    def name(self, *columns: str) -> str:
        """A label, a group or a short answer: text, a whole number or true/false, as text."""
        column, value = self.value(*columns)
        if isinstance(value, bool | int):
            return str(value)
        if isinstance(value, float):
            self.fault(f"'{column}' is {value}, a decimal number.", "write it as text or as a whole number.")
        return self.text(column).strip()

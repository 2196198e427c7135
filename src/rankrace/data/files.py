"""One file → rows: jsonl, json, csv, tsv and parquet. Every fault names the file and the line.

A tsv is read as GLUE writes it: no quoting, a tab always separates. CoLA's files, which have no header, are
known by their four columns. A csv has a header and quotes as in RFC 4180. Byte-order marks are dropped.
"""

import csv
import io
import json
import os
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from rankrace.data.formats import find_format
from rankrace.errors import RankraceError

Rows = list[dict[str, Any]]
COLA_COLUMNS = ("source", "label", "star", "text")


def read_file(path: Path) -> Rows:
    """The rows of a file, by its ending.

    Raises:
        RankraceError: missing, unreadable, of an unknown ending, broken or without rows.
    """
    if not os.path.isfile(path):  # not Path.is_file: that raises where a folder may not be looked into
        raise missing(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise RankraceError(
            f"{path}: the ending '{path.suffix}' is not known.",
            why="the ending says how a file is read.",
            fix=f"use one of {', '.join(READERS)}.",
        )
    rows = reader(path)
    if not rows:
        raise RankraceError(f"{path} has no rows.", why="there is nothing to learn from.", fix="add rows to it.")
    return rows


def missing(path: Path) -> RankraceError:
    """The error for a path where nothing is, with names that are near."""
    try:
        names = sorted(os.listdir(path.parent))
    except OSError:
        names = []
    near = get_close_matches(path.name, names, n=3, cutoff=0.5) or names[:5]
    folder = "this folder" if path.parent == Path() else str(path.parent)
    there = f"{folder} has {', '.join(near)}" if near else f"{folder} is empty or no folder that can be read"
    return RankraceError(f"there is no file {path}.", why=f"{there}.", fix="correct the path.")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RankraceError(
            f"{path} cannot be read: {error}.",
            why="text files are read as UTF-8.",
            fix="save it as UTF-8." if isinstance(error, UnicodeDecodeError) else "check the file's permissions.",
        ) from error


def _lines(path: Path) -> list[str]:
    # Not str.splitlines: it also splits at U+0085 and U+2028, which real text contains.
    lines = [line.removesuffix("\r") for line in _text(path).split("\n")]
    return lines[:-1] if lines and not lines[-1] else lines


def _broken(path: Path, line: int, what: str, excerpt: str, fix: str) -> RankraceError:
    shown = excerpt if len(excerpt) <= 80 else excerpt[:77] + "..."
    return RankraceError(f"{path}, line {line}: {what}", why=f"the line reads: {shown}", fix=fix)


def _read_jsonl(path: Path) -> Rows:
    rows: Rows = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            what = f"broken JSON ({error.msg} at column {error.colno})."
            raise _broken(path, number, what, line, "correct or remove the line.") from error
        if not isinstance(row, dict):
            raise _broken(path, number, "not a JSON object.", line, "write one {...} a line.")
        rows.append(row)
    return rows


def _read_json(path: Path) -> Rows:
    text = _text(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        excerpt = text.split("\n")[error.lineno - 1]
        fix = "correct it; for one object a line, name the file .jsonl."
        raise _broken(path, error.lineno, f"broken JSON ({error.msg}).", excerpt, fix) from error
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RankraceError(
            f"{path} holds no list of objects.",
            why='a .json file must be [{...}, ...] or {"data": [{...}, ...]}.',
            fix="write it so, or as .jsonl with one object a line.",
        )
    if rows and "paragraphs" in rows[0]:
        return _squad_rows(path, rows)
    return rows


def _squad_rows(path: Path, articles: Rows) -> Rows:
    """SQuAD's official layout, flattened to the columns that it has on the hub."""
    try:
        return [
            {
                "id": question["id"],
                "title": article["title"],
                "context": paragraph["context"],
                "question": question["question"],
                "answers": {"text": [answer["text"] for answer in question["answers"]]},
            }
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (KeyError, TypeError) as error:
        raise RankraceError(
            f"{path} begins like SQuAD but breaks its layout at {error}.",
            why="articles have title and paragraphs, these context and qas, these id, question and answers.",
            fix="compare the file with the official one.",
        ) from error


def _read_csv(path: Path) -> Rows:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    rows: Rows = []
    try:
        header = next(reader, [])
        for fields in reader:
            if fields:
                rows.append(_row(path, reader.line_num, header, fields))
    except csv.Error as error:
        fix = "correct the quotes, or save the data as .jsonl."
        raise _broken(path, reader.line_num, f"broken CSV ({error}).", "see the file", fix) from error
    return rows


def _read_tsv(path: Path) -> Rows:
    table = [line.split("\t") for line in _lines(path)]
    if not table:
        return []
    first = table[0]
    if find_format(first) is None and len(first) == len(COLA_COLUMNS) and first[1] in ("0", "1"):
        return [_row(path, number, COLA_COLUMNS, fields) for number, fields in enumerate(table, start=1)]
    return [_row(path, number, first, fields) for number, fields in enumerate(table[1:], start=2)]


def _row(path: Path, line: int, header: tuple[str, ...] | list[str], fields: list[str]) -> dict[str, Any]:
    if len(fields) != len(header):
        what = f"{len(fields)} columns where the header has {len(header)} ({', '.join(header)})."
        raise _broken(path, line, what, " | ".join(fields), "correct or remove the line.")
    return dict(zip(header, fields, strict=True))


def _read_parquet(path: Path) -> Rows:
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise RankraceError(
            f"{path} is no readable parquet file: {error}.",
            why="nothing could be read.",
            fix="write it again.",
        ) from error


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}

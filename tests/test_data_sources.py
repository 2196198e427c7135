"""Files, folders and hub names → rows. The same rows in every kind of file; every fault in three parts."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from rankrace.data.files import read_file
from rankrace.data.sources import load_rows
from rankrace.errors import RankraceError

# U+0085 and U+2028 are line breaks to str.splitlines, but not to any of the formats.
ROWS = [{"text": "one \x85 two\u2028three", "label": "a"}, {"text": 'say "hi", you', "label": "b"}]


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """By its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".jsonl":
            path.write_text("\n" + jsonl(rows), encoding="utf-8-sig")
        case ".json":
            path.write_text(json.dumps({"data": rows} if "data" in path.name else rows))
        case ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        case ".tsv":
            lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
            path.write_text("\r\n".join(lines), encoding="utf-8-sig", newline="")
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.data.json", "d.csv", "d.tsv", "d.parquet"])
def test_every_kind_of_file_gives_the_same_rows_and_hash(tmp_path: Path, name: str) -> None:
    reference = load_rows(str(write(tmp_path / "reference.jsonl", ROWS)))
    source = load_rows(str(write(tmp_path / name, ROWS)))
    assert source.train == ROWS
    assert source.validation is None
    assert source.sha256() == reference.sha256()


def test_hash_is_of_the_rows_not_of_their_columns_order(tmp_path: Path) -> None:
    turned = [dict(reversed(row.items())) for row in ROWS]
    one, other = write(tmp_path / "one.csv", ROWS), write(tmp_path / "other.csv", turned)
    assert load_rows(str(one)).sha256() == load_rows(str(other)).sha256()


def test_hash_covers_both_sides_and_their_border(tmp_path: Path) -> None:
    both = write(tmp_path / "both.jsonl", ROWS)
    one = write(tmp_path / "one.jsonl", ROWS[:1])
    two = write(tmp_path / "two.jsonl", ROWS[1:])
    hashes = {
        load_rows(str(both)).sha256(),
        load_rows(str(one), str(two)).sha256(),
        load_rows(str(one)).sha256(),
    }
    assert len(hashes) == 3


SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "T",
            "paragraphs": [
                {
                    "context": "C.",
                    "qas": [
                        {"id": "1", "question": "Q?", "answers": [{"text": "C", "answer_start": 0}]},
                        {"id": "2", "question": "R?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}


def test_squad_layout_is_flattened_to_the_columns_of_the_hub(tmp_path: Path) -> None:
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(SQUAD))
    shared = {"title": "T", "context": "C."}
    assert read_file(path) == [
        {"id": "1", **shared, "question": "Q?", "answers": {"text": ["C"]}},
        {"id": "2", **shared, "question": "R?", "answers": {"text": []}},
    ]
    path.write_text(json.dumps({"data": [{"title": "T", "paragraphs": [{"qas": [{"id": "1"}]}]}]}))
    with pytest.raises(RankraceError, match="breaks its layout at 'context'"):
        read_file(path)


def test_cola_without_a_header(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text('gj04\t1\t\tHe said "go.\ngj04\t0\t*\tGo he said.\n')
    assert read_file(path) == [
        {"source": "gj04", "label": "1", "star": "", "text": 'He said "go.'},
        {"source": "gj04", "label": "0", "star": "*", "text": "Go he said."},
    ]


# --- folders


@pytest.mark.parametrize("held_out", ["validation.csv", "dev.tsv", "valid.jsonl", "val.json", "dev-v2.0.json"])
def test_folder_with_both_splits(tmp_path: Path, held_out: str) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / held_out, ROWS[:1])
    write(tmp_path / "test.jsonl", ROWS)
    (tmp_path / "README.md").write_text("nothing to read")
    source = load_rows(str(tmp_path))
    assert (source.train, source.validation) == (ROWS, ROWS[:1])
    assert source.validation_where == str(tmp_path / held_out)


def test_folder_with_a_single_file_and_with_shards(tmp_path: Path) -> None:
    write(tmp_path / "single" / "whatever.jsonl", ROWS)
    assert load_rows(str(tmp_path / "single")).train == ROWS
    write(tmp_path / "shards" / "train-00001-of-00002.parquet", ROWS[1:])
    write(tmp_path / "shards" / "train-00000-of-00002.parquet", ROWS[:1])
    assert load_rows(str(tmp_path / "shards")).train == ROWS


def test_given_validation_file_goes_first(tmp_path: Path) -> None:
    write(tmp_path / "d" / "train.jsonl", ROWS)
    write(tmp_path / "d" / "dev.jsonl", ROWS)
    mine = write(tmp_path / "mine.jsonl", ROWS[1:])
    assert load_rows(str(tmp_path / "d"), str(mine)).validation == ROWS[1:]


def test_folder_faults(tmp_path: Path) -> None:
    with pytest.raises(RankraceError, match=r"no training file \(seen: no data file\)"):
        load_rows(str(tmp_path))
    write(tmp_path / "dev.jsonl", ROWS)
    write(tmp_path / "test.jsonl", ROWS)
    with pytest.raises(RankraceError, match=r"no training file \(seen: dev.jsonl, test.jsonl\)"):
        load_rows(str(tmp_path))
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "train-clean.jsonl", ROWS)
    with pytest.raises(RankraceError, match=r"several files for one split: train-clean.jsonl, train.jsonl"):
        load_rows(str(tmp_path))


# --- files that cannot be read


def test_missing_file_names_near_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "unrelated.csv", ROWS)
    with pytest.raises(RankraceError) as caught:
        load_rows(str(tmp_path / "trian.jsonl"))
    assert "there is no file" in caught.value.what
    assert "train.jsonl" in caught.value.why
    assert "unrelated" not in caught.value.why
    with pytest.raises(RankraceError, match="is empty or no folder"):
        load_rows(str(tmp_path / "nowhere" / "train.jsonl"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RankraceError, match=r"this folder has train\.jsonl"):
        load_rows("trian.jsonl")


FAULTS = [
    ("d.txt", b"text", r"the ending '\.txt' is not known"),
    ("d.jsonl", b"", "has no rows"),
    ("d.tsv", b"", "has no rows"),
    ("d.csv", b"text,label\n", "has no rows"),
    ("d.json", b"[]", "has no rows"),
    (
        "d.jsonl",
        b'{"text": "a"}\n\n{"text": "b"\n',
        r"line 3: broken JSON .*\n.*the line reads: \{\"text\": \"b\"",
    ),
    ("d.jsonl", b'{"text": "a"}\n[1]\n', "line 2: not a JSON object"),
    ("d.json", b'[{"text": "a"},\n {"text" "b"}]', r"line 2: broken JSON .*\n.*\{\"text\" \"b\"\}"),
    ("d.json", b'{"text": "a"}', "holds no list of objects"),
    ("d.json", b"[1, 2]", "holds no list of objects"),
    (
        "d.tsv",
        b"sentence\tlabel\na\t1\nb\t1\t2\n",
        "line 3: 3 columns where the header has 2 .*sentence, label",
    ),
    ("d.csv", b'text,label\n"a\nb",1\nc\n', "line 4: 1 columns where the header has 2"),
    ("d.csv", b'text,label\n"a"b,1\n', "line 2: broken CSV"),
    ("d.jsonl", b'{"text": "\xff"}\n', "cannot be read.*utf-8"),
    ("d.parquet", b"nothing of the kind", "no readable parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), FAULTS)
def test_faulty_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RankraceError, match=f"(?s){message}"):
        load_rows(str(tmp_path / name))


# --- the hub


def test_local_paths_never_reach_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "train.jsonl", ROWS)
    assert load_rows("data").train == ROWS
    for name in ("data/squad", "nothing.csv", "./nothing", "~/nothing/at/all", "a/b/c", "two words"):
        with pytest.raises(RankraceError, match="there is no file"):
            load_rows(name)


def test_hub_rows_with_class_names(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    asked: list[tuple[str, str | None]] = []

    def load(name: str, subset: str | None, **whole: None) -> datasets.DatasetDict:
        asked.append((name, subset))
        labels = {"train": [1, 0], "validation": [1, -1], "test": [-1, -1]}
        columns = {split: {"text": ["a", "b"], "label": numbers} for split, numbers in labels.items()}
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_dict(column, features=features) for split, column in columns.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = load_rows("someone/some-data:sst2")
    assert asked == [("someone/some-data", "sst2")]
    assert source.train == [{"text": "a", "label": "pos"}, {"text": "b", "label": "neg"}]
    assert source.validation == [{"text": "a", "label": "pos"}, {"text": "b", "label": None}]
    assert source.validation_where == "someone/some-data:sst2 (validation)"


def test_hub_data_without_a_training_split(monkeypatch: pytest.MonkeyPatch) -> None:
    found = datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, **whole: found)
    with pytest.raises(RankraceError, match=r"no split train \(seen: test\)"):
        load_rows("someone/some-data")


def test_hub_out_of_reach() -> None:
    with pytest.raises(RankraceError) as caught:  # conftest.py sets HF_HUB_OFFLINE
        load_rows("someone/no-such-data-set")
    assert "could not be loaded from the hub" in caught.value.what
    assert "check the network" in caught.value.fix


def test_hub_without_the_optional_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RankraceError, match=r"rankrace\[hub\]"):
        load_rows("squad_v2")

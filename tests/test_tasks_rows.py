"""The rows of the tasks: sizes, parts that share nothing, and borders between tokens."""

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

from rankrace.config import RunConfig
from rankrace.data import encode_splits, make_encoder, split_rows
from rankrace.data.files import read_file
from rankrace.data.sources import SourceRows
from rankrace.errors import RankraceError
from rankrace.tasks import TASKS, Splits, find_task
from rankrace.tasks.glue import labelled
from rankrace.tasks.task import content, hold_out

LOCAL = {
    "squad2": (8_304, 1_330, 2_239),
    "sst2": (59_144, 688, 872),
    "mrpc": (3_300, 367, 408),
    "rte": (2_241, 249, 277),
    "cola": (7_681, 854, 1_043),
    "medqa": (5_137, 318, 1_273),
    "gsm8k": (6_726, 747, 1_319),
    "scitldr": (1_989, 618, 618),
}
HUB_ONLY = sorted(set(TASKS) - set(LOCAL))


@pytest.fixture(scope="module")
def parts(data_root: Path) -> dict[str, Splits]:
    return {name: TASKS[name].splits(data_root, 0) for name in LOCAL}


def prompts(rows: list[dict[str, Any]]) -> set[str]:
    return {content(row["prompt"]) for row in rows}


@pytest.mark.parametrize("name", LOCAL)
def test_sizes_and_no_row_on_two_sides(parts: dict[str, Splits], name: str) -> None:
    found = parts[name]
    assert (len(found.train), len(found.validation), len(found.test)) == LOCAL[name]
    train, validation, test = map(prompts, (found.train, found.validation, found.test))
    assert not train & validation
    assert not train & test
    assert not validation & test


@pytest.mark.parametrize("name", LOCAL)
def test_right_answers_score_100_and_prompts_end_cleanly(parts: dict[str, Splits], name: str) -> None:
    found, task = parts[name], TASKS[name]
    for row in found.train + found.validation + found.test:
        assert row["prompt"] == row["prompt"].rstrip()
        assert row["completion"][0] == " "
        assert row["completion"][1:] == row["completion"].strip() != ""
        assert task.kind == "generation" or row["completion"] in row["options"]
    completions = [row["completion"] for row in found.test]
    assert task.score(completions, found.test) == pytest.approx(dict.fromkeys(task.metrics, 100.0))
    others = [row["options"][row["options"][0] == row["completion"]] for row in found.test if "options" in row]
    if others:
        assert max(task.score(others, found.test).values()) <= 0.0


@pytest.mark.parametrize("name", LOCAL)
def test_parts_depend_on_the_seed_but_test_does_not(data_root: Path, parts: dict[str, Splits], name: str) -> None:
    again, other = (TASKS[name].splits(data_root, seed) for seed in (0, 1))
    assert again == parts[name]
    assert other.test == again.test
    assert (other.validation == again.validation) == (name in ("squad2", "scitldr"))


@pytest.mark.parametrize("name", LOCAL)
def test_the_border_is_a_border_between_tokens(parts: dict[str, Splits], smollm2: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for row in parts[name].train[:200] + parts[name].test[:200]:
        pieces = [tokenizer(row[column])["input_ids"] for column in ("prompt", "completion")]
        assert pieces[0] + pieces[1] == tokenizer(row["prompt"] + row["completion"])["input_ids"]


@pytest.mark.parametrize("name", LOCAL)
def test_answers_fit_into_the_tokens_a_model_may_write(parts: dict[str, Splits], smollm2: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    lengths = [len(tokenizer(row["completion"])["input_ids"]) + 1 for row in parts[name].validation]
    assert sum(length <= TASKS[name].max_new_tokens for length in lengths) / len(lengths) >= 0.99


def test_rows_are_read_and_encoded_as_they_stand(parts: dict[str, Splits], smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    found = parts["rte"]
    source = SourceRows(
        train=found.train[:50], validation=found.validation, train_where="rte", validation_where="rte (validation)"
    )
    config = RunConfig.model_validate({"model": "any", "data": "rte", "group_column": "document"})
    read = split_rows(source, config)
    assert read.format == "prompt+completion"
    data = encode_splits(read, make_encoder(config, tokenizer, "causal", read))
    assert len(data.validation) == len(found.validation)
    first = data.train.examples[0]
    assert tokenizer.decode(first.input_ids[first.supervised]) == found.train[0]["completion"] + tokenizer.eos_token
    assert len({example.group for example in data.validation.examples}) < len(data.validation)


def test_glue_rows_for_a_classifier(parts: dict[str, Splits], minilm: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    config = RunConfig.model_validate({"model": "any", "data": "any"})
    for name, pair in (("mrpc", True), ("sst2", False)):
        train, validation = labelled(parts[name].train[:50]), labelled(parts[name].validation[:20])
        source = SourceRows(train=train, validation=validation, train_where=name, validation_where=name)
        read = split_rows(source, config)
        assert read.format == "text+label"
        data = encode_splits(read, make_encoder(config, tokenizer, "classification", read))
        assert data.labels == (("no", "yes") if pair else ("negative", "positive"))
        types = data.train.examples[0].token_types
        assert types is not None
        assert types.any() == pair


# --- each data set's own rules


def test_squad_articles_are_disjoint_and_chosen_by_title(data_root: Path, parts: dict[str, Splits]) -> None:
    articles = json.loads((data_root / "squad2" / "dev-v2.0.json").read_text())["data"]
    titles = sorted(article["title"] for article in articles)
    rest = [title for place, title in enumerate(titles) if place % 5]
    found = parts["squad2"]
    sides = [{row["document"] for row in side} for side in (found.train, found.validation, found.test)]
    assert sides[2] == set(titles) - set(rest)
    assert sides[1] == {rest[0], rest[8], rest[16], rest[24]}
    assert sides[0] == set(titles) - sides[1] - sides[2]
    assert len(found.train) + len(found.validation) + len(found.test) == 11_873


def test_squad_rows(parts: dict[str, Splits]) -> None:
    everything = parts["squad2"].train + parts["squad2"].validation + parts["squad2"].test
    assert sum(row["completion"] == " unanswerable" for row in everything) == 5_945
    assert all((row["completion"] == " unanswerable") == (not row["answers"]) for row in everything)
    assert max(len(row["answers"]) for row in everything) > 3
    empty = TASKS["squad2"].score([""] * len(parts["squad2"].test), parts["squad2"].test)
    share = sum(not row["answers"] for row in parts["squad2"].test) / len(parts["squad2"].test)
    assert empty == pytest.approx({"f1": 100 * share, "exact": 100 * share})


def test_sst2_holds_out_whole_sentences_with_all_their_phrases(parts: dict[str, Splits]) -> None:
    found = parts["sst2"]
    held_out = "\n".join(f" {content(row['text'])} " for row in found.validation)
    assert not [row["text"] for row in found.train if f" {content(row['text'])} " in held_out]
    means = [sum(len(row["text"].split()) for row in side) / len(side) for side in (found.train, found.validation)]
    assert means[0] < 10 < 15 < means[1]


def test_rte_premises_are_on_one_side(parts: dict[str, Splits]) -> None:
    premises = [{row["document"] for row in side} for side in (parts["rte"].train, parts["rte"].validation)]
    assert not premises[0] & premises[1]
    assert len(premises[0]) < len(parts["rte"].train)


def test_medqa_validation_is_of_medqa(data_root: Path, parts: dict[str, Splits]) -> None:
    own = read_file(data_root / "medqa" / "dev.4options.jsonl")
    questions = {row["question"].strip() for row in own}
    found = parts["medqa"]
    asked = [[row["prompt"].removeprefix("Question: ") for row in side] for side in (found.train, found.validation)]
    assert all(any(prompt.startswith(question) for question in questions) for prompt in asked[1])
    assert len(found.train) == len(own) - len(found.validation) + 4_183
    first = found.train[-1]["prompt"].split("\n")
    assert [line[:3] for line in first[-5:-1]] == ["A. ", "B. ", "C. ", "D. "]
    assert first[-1] == "Answer:"


def test_scitldr_has_several_references_where_it_measures(parts: dict[str, Splits]) -> None:
    assert all(len(row["answers"]) == 1 for row in parts["scitldr"].train)
    assert {len(row["answers"]) for row in parts["scitldr"].test} == {2, 3, 4}


def test_hold_out_keeps_documents_whole_and_leaves_test_copies_out() -> None:
    rows = [{"prompt": f"{d} {i}", "completion": " x", "document": f"d{d}"} for d in range(20) for i in range(5)]
    test = [{"prompt": "3  0 ", "completion": " y"}]
    found = hold_out(rows, test, seed=0, fraction=0.2)
    documents = [{row["document"] for row in side} for side in (found.train, found.validation)]
    assert not documents[0] & documents[1]
    assert len(documents[0] | documents[1]) == 20
    assert (len(found.train) + len(found.validation), found.test) == (99, test)
    assert 15 <= len(found.validation) <= 20
    assert "1 left out" in found.how
    assert len(hold_out(rows, test, seed=0, fraction=0.2, maximum=5).validation) <= 5
    turned = hold_out(rows[::-1], test, seed=0, fraction=0.2)
    assert {row["prompt"] for row in turned.validation} == {row["prompt"] for row in found.validation}


# --- the hub, and bad input

PAIR = ("sentence1", "sentence2")
GLUE_COLUMNS: dict[str, tuple[tuple[str, ...], list[str] | None]] = {
    "sst2": (("sentence",), ["negative", "positive"]),
    "mrpc": (PAIR, ["not_equivalent", "equivalent"]),
    "rte": (PAIR, ["entailment", "not_entailment"]),
    "cola": (("sentence",), ["unacceptable", "acceptable"]),
    "qnli": (("question", "sentence"), ["entailment", "not_entailment"]),
    "mnli": (("premise", "hypothesis"), ["entailment", "neutral", "contradiction"]),
    "qqp": (("question1", "question2"), ["not_duplicate", "duplicate"]),
    "stsb": (PAIR, None),
}


def hub_split(name: str, subset: str | None, split: str, revision: str | None) -> datasets.Dataset:
    """A small split with the columns that the data set has on the hub."""
    if name == "nyu-mll/glue":
        assert subset is not None
        assert split in ("train", "validation_matched" if subset == "mnli" else "validation")
        columns, names = GLUE_COLUMNS[subset]
        label = datasets.ClassLabel(names=names) if names else datasets.Value("float32")
        features = datasets.Features({**dict.fromkeys(columns, datasets.Value("string")), "label": label})
        count = len(names) if names else 5
        built = [{c: f"{c} of {split} {i}" for c in columns} | {"label": i % count} for i in range(30)]
        return datasets.Dataset.from_list(built, features=features)
    row: dict[str, Any]
    match name, subset, revision:
        case "rajpurkar/squad_v2", None, None:
            assert split in ("train", "validation")
            row = {"context": "It is so.", "answers": {"text": ["so"], "answer_start": [6]}}
        case "GBaker/MedQA-USMLE-4-options", None, None:
            row = {"options": {letter: letter * 2 for letter in "ABCD"}, "answer": "BB", "answer_idx": "B"}
        case "openai/gsm8k", "main", None:
            row = {"answer": "1+1=<<1+1=2>>2\n#### 2"}
        case "allenai/scitldr", "Abstract", "refs/convert/parquet":
            return datasets.Dataset.from_list([{"source": ["One.", f"{split}."], "target": ["It is."]}])
        case _:
            raise AssertionError((name, subset, revision))
    return datasets.Dataset.from_list(
        [{"question": f"{split} {i}?", "title": f"{split}{i}"} | row for i in range(30)]
    )


@pytest.mark.parametrize("name", TASKS)
def test_hub_rows(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def load(name: str, subset: str | None, *, split: str, revision: str | None) -> datasets.Dataset:
        return hub_split(name, subset, split, revision)

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = find_task(name)
    found = task.splits(None, 0)
    if name == "scitldr":
        assert found.test[0]["prompt"] == "One. test.\n\nSummary:"
    else:
        assert len(found.train) + len(found.validation) == len(found.test) == 30
        assert len(found.validation) == (4 if name == "squad2" else 3)
    assert len({row["completion"] for row in found.test}) == {"mnli": 3, "stsb": 5}.get(
        name, 2 if task.kind == "label" else 1
    )
    scores = task.score([row["completion"] for row in found.test], found.test)
    assert scores == pytest.approx(dict.fromkeys(task.metrics, 100.0))


def test_hub_out_of_reach_and_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RankraceError, match=r"split 'train' of 'openai/gsm8k' could not be loaded"):
        TASKS["gsm8k"].splits(None, 0)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RankraceError, match=r"rankrace\[hub\]"):
        TASKS["gsm8k"].splits(None, 0)


@pytest.mark.parametrize("name", HUB_ONLY)
def test_tasks_of_the_hub_only_say_so(tmp_path: Path, name: str) -> None:
    with pytest.raises(RankraceError, match=f"{name} is not among the files"):
        TASKS[name].splits(tmp_path, 0)


@pytest.mark.parametrize("name", LOCAL)
def test_a_folder_without_the_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(RankraceError, match="there is no file"):
        TASKS[name].splits(tmp_path, 0)


def test_files_laid_out_otherwise(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    for part in ("train", "test"):
        (tmp_path / "gsm8k" / f"{part}.jsonl").write_text('{"question": "1+1?", "solution": "2"}\n')
    with pytest.raises(RankraceError, match=r"gsm8k: the rows of .* as expected \(KeyError\('answer'\)\)"):
        TASKS["gsm8k"].splits(tmp_path, 0)

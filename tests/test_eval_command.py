"""`rankrace eval` on an adapter that `rankrace train` wrote."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from commandline import assert_refused, rankrace
from models import leaky
from rankrace.adapter import Adapted, load_adapted
from rankrace.data.files import Rows, read_file
from rankrace.evaluate.command import compared
from rankrace.tasks import TASKS
from tinyfolder import PARITIES, SHORT, SUMS, tiny_bert, tiny_llama, write_rows


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    folder = tmp_path_factory.mktemp("sums")
    rows = write_rows(folder / "rows.jsonl", SUMS)
    ran = rankrace("train", "--model", tiny_llama(folder / "model", smollm2), "--data", rows, "--out", folder / "run",
                   *SHORT)  # fmt: skip
    assert ran.code == 0, ran.err
    return folder / "run" / "adapter"


def test_a_task_by_likelihood_and_generated(sums: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKRACE_DATA", str(data_root))
    chosen = rankrace("eval", sums, "--task", "SST-2", "--limit", 12, "--device", "cpu")
    assert chosen.code == 0, chosen.err
    assert "accuracy" in chosen.out
    assert chosen.out.split()[-1] == "12"
    accuracy = float(chosen.out.split()[1])
    assert accuracy > 0
    written = rankrace("eval", sums, "--task", "sst2", "--limit", 12, "--generated", "--device", "cpu")
    assert float(written.out.split()[1]) < accuracy, "it has never seen the words of this task"


def test_the_base_beside_it_and_how_sure_each_is(sums: Path, data_root: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("RANKRACE_DATA", str(data_root))
    given = ["--task", "sst2", "--limit", 40, "--device", "cpu"]
    ran = rankrace("eval", sums, *given, "--base")
    assert ran.code == 0, ran.err
    number = r"([-+]?[\d.]+) ± ([\d.]+)"
    said = re.fullmatch(rf"accuracy +{number}, base {number}, difference {number}\nrows +40\n", ran.out)
    assert said is not None, ran.out
    ours, se, base, base_se, gain, gain_se = map(float, said.groups())
    assert rankrace("eval", sums, *given).out == f"accuracy    {ours:.2f} ± {se:.2f}\nrows        40\n"
    # An adapter that does nothing is the base.
    nothing = shutil.copytree(sums, tmp_path / "nothing")
    factors = load_file(nothing / "adapter_model.safetensors")
    save_file({n: t * ("lora_A" in n) for n, t in factors.items()}, nothing / "adapter_model.safetensors")
    assert rankrace("eval", nothing, *given).out.split()[1:4] == [f"{base:.2f}", "±", f"{base_se:.2f}"]
    assert gain == pytest.approx(ours - base, abs=0.011) != 0
    for value, error in ((ours, se), (base, base_se)):
        assert error == pytest.approx((value * (100 - value) / 39) ** 0.5, abs=0.01)
    assert 0 < gain_se < (se**2 + base_se**2) ** 0.5 + 10


def test_errors_are_clustered_by_document_and_paired_by_row() -> None:
    """Answers to three questions each about four texts: right on all of a text or on none."""
    rows: Rows = [{"answers": ["yes"], "document": f"text {i // 3}"} for i in range(12)]
    right, wrong = ["yes"] * 3, ["no"] * 3
    found = compared(TASKS["squad2"], rows, [*right, *right, *wrong, *wrong], [*right, *wrong, *wrong, *wrong])["f1"]
    assert found.base is not None
    assert found.gain is not None
    assert [f.value for f in (found.adapter, found.base, found.gain)] == [50, 25, 25]
    of_four = [np.std(values, ddof=1) / 2 for values in ([100, 100, 0, 0], [100, 0, 0, 0], [0, 100, 0, 0])]
    assert [f.se for f in (found.adapter, found.base, found.gain)] == pytest.approx(of_four)
    apart: Rows = [{"answers": row["answers"]} for row in rows]
    alone = compared(TASKS["squad2"], apart, [*right, *right, *wrong, *wrong], None)["f1"]
    assert alone.base is alone.gain is None
    assert alone.adapter.se == pytest.approx(np.std([100, 0] * 6, ddof=1) / 12**0.5)
    one: Rows = [{**row, "document": "text"} for row in rows]
    assert compared(TASKS["squad2"], one, [*right] * 4, None)["f1"].adapter.se is None
    alike = compared(TASKS["squad2"], apart, ["no"] * 12, ["no"] * 12)["f1"]
    assert (alike.adapter.value, alike.adapter.se) == (0, None), "no spread was seen, which is not that there is none"
    assert alike.gain is not None
    assert (alike.gain.value, alike.gain.se) == (0, None)
    matthews = compared(TASKS["cola"], apart, [*right, *right, *wrong, *wrong], [*right] * 4)["matthews"]
    assert matthews.adapter.se is None
    assert matthews.gain is not None
    assert matthews.gain.se is None


def test_a_classifier_finds_its_labels(tmp_path: Path, minilm: Path, data_root: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("RANKRACE_DATA", str(data_root))
    rows = [{**row, "label": {"odd": "yes", "even": "no"}[row["label"]]} for row in PARITIES]
    out = tmp_path / "run"
    ran = rankrace("train", "--model", tiny_bert(tmp_path / "model", minilm), "--data",
                   write_rows(tmp_path / "rows.jsonl", rows), "--out", out, *SHORT)  # fmt: skip
    assert ran.code == 0, ran.err
    ran = rankrace("eval", out / "adapter", "--task", "mrpc", "--limit", 20, "--device", "cpu")
    assert ran.code == 0, ran.err
    refused = rankrace("eval", out / "adapter", "--task", "mrpc", "--device", "cpu", "--base")
    assert_refused(refused, "is a classifier", "leave out --base")
    refused = rankrace("eval", out / "adapter", "--task", "sst2", "--limit", 5, "--device", "cpu")
    assert_refused(
        refused, "the adapter's classes are no, yes; those of sst2 are negative, positive", "train on rows"
    )
    expected = accuracy_by_peft(out / "adapter", read_file(data_root / "glue" / "MRPC" / "dev.tsv")[:20])
    assert float(ran.out.split("accuracy")[1].split()[0]) == pytest.approx(expected)


@torch.no_grad()
def accuracy_by_peft(adapter: Path, pairs: Rows) -> float:
    """Of the official MRPC rows, one at a time, by PEFT's and Transformers' own ways."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    assert base is not None
    # The labels were sorted when it was trained: no, yes.
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model = PeftModel.from_pretrained(plain, str(adapter)).eval()
    texts = [(row["#1 String"], row["#2 String"]) for row in pairs]
    found = [model(**tokenizer(*both, return_tensors="pt")).logits[0].argmax().item() for both in texts]
    return 100 * sum(str(f) == row["Quality"] for f, row in zip(found, pairs, strict=True)) / len(pairs)


def test_lm_eval_on_a_local_task_file(sums: Path, tmp_path: Path) -> None:
    """Sums as a multiple-choice task of the harness's own kind: the accuracy is PEFT's, and not that of the base."""
    answers = [r["completion"].strip() for r in SUMS]
    rows = [
        {"question": r["prompt"], "choices": [answers[i], answers[(i + 7) % len(SUMS)]], "answer": 0}
        for i, r in enumerate(SUMS[:24])
    ]
    write_rows(tmp_path / "sums.jsonl", rows)
    task = {
        "task": "tiny_sums", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "sums.jsonl")}},
        "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    file = tmp_path / "tiny_sums.yaml"
    file.write_text(yaml.safe_dump(task))
    ran = rankrace("eval", sums, "--task", file, "--evaluator", "lm-eval", "--device", "cpu")
    assert ran.code == 0, ran.err
    found = dict(line.split() for line in ran.out.strip().splitlines())
    adapted, base = chosen_by_peft(sums, rows)
    assert float(found["acc"]) == pytest.approx(adapted, abs=6e-5), "four places are printed"
    assert adapted != base
    assert float(found["acc_stderr"]) == pytest.approx((adapted * (1 - adapted) / 23) ** 0.5, abs=6e-5)
    assert_refused(rankrace("eval", sums, "--task", "no_such_task", "--evaluator", "lm-eval"), "no_such_task")

    # Another that has code of its own, and a group of both.
    (tmp_path / "code.py").write_text("def question(row):\n    return row['question']\n")
    other = yaml.safe_dump(task | {"task": "tiny_sums_too", "tag": "tiny_tag"})
    (tmp_path / "too.yaml").write_text(other.replace("'{{question}}'", "!function code.question"))
    (tmp_path / "group.yaml").write_text(
        yaml.safe_dump({"group": "tiny_group", "task": ["tiny_sums", "tiny_sums_too"]})
    )
    for given in (tmp_path / "too.yaml", tmp_path / "group.yaml"):
        ran = rankrace("eval", sums, "--task", given, "--evaluator", "lm-eval", "--device", "cpu")
        assert ran.code == 0, ran.err
        accuracies = [line for line in ran.out.splitlines() if re.search(r"acc +\d", line)]
        assert len(accuracies) == (1 if given.name == "too.yaml" else 2), ran.out
        assert all(float(line.split()[-1]) == pytest.approx(adapted, abs=0.006) for line in accuracies)
    (tmp_path / "none.yaml").write_text("nothing: here\n")
    assert_refused(
        rankrace("eval", sums, "--task", tmp_path / "none.yaml", "--evaluator", "lm-eval"), "names no task"
    )


@torch.no_grad()
def chosen_by_peft(adapter: Path, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """How often the first choice is the likelier one, with the adapter and without."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    assert base is not None
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()

    def likelihood(question: str, choice: str) -> float:
        prompt, whole = (tokenizer(text)["input_ids"] for text in (question, f"{question} {choice}"))
        logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(logs[i - 1, whole[i]].item() for i in range(len(prompt), len(whole)))

    def share() -> float:
        likelihoods = [[likelihood(row["question"], choice) for choice in row["choices"]] for row in rows]
        return sum(right > wrong for right, wrong in likelihoods) / len(rows)

    adapted = share()
    with model.disable_adapter():
        return adapted, share()


def test_a_model_that_packing_does_not_reproduce_is_refused(sums: Path, data_root: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """As in training: its figures would be wrong, and nobody would know."""
    monkeypatch.setenv("RANKRACE_DATA", str(data_root))

    def leaking(*arguments: Any) -> Adapted:
        adapted = load_adapted(*arguments)
        leaky(adapted.base)
        return adapted

    monkeypatch.setattr("rankrace.evaluate.command.load_adapted", leaking)
    for task in ("sst2", "gsm8k"):
        assert_refused(rankrace("eval", sums, "--task", task, "--limit", 4, "--device", "cpu"), "packed rows")


def test_evaluating_does_not_need_the_bench() -> None:
    """The bench builds on it; the other way round would be a circle."""
    code = "import sys, rankrace.evaluate.command; print([n for n in sys.modules if n.startswith('rankrace.bench')])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_bad_input(sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(rankrace("eval", sums, "--task", "squad"), "'squad2'")
    assert_refused(rankrace("eval", tmp_path, "--task", "rte"), "not an adapter")
    assert_refused(rankrace("eval", sums, "--task", "rte", "--part", "train"), "validation")
    assert_refused(rankrace("eval", sums, "--task", "rte", "--evaluator", "lm"), "lm-eval")
    assert_refused(rankrace("eval", sums, "--task", "rte", "--limit", 0), "limit")
    for option in (["--base"], ["--part", "validation"], ["--generated"], ["--seed", 1]):
        ran = rankrace("eval", sums, "--task", "rte", "--evaluator", "lm-eval", *option)
        assert_refused(ran, f"{option[0]} has no effect")
    empty = tmp_path / "gsm8k"
    empty.mkdir()
    row = json.dumps({"question": "1+1?", "answer": "#### 2"}) + "\n"
    (empty / "train.jsonl").write_text(row)
    (empty / "test.jsonl").write_text("")
    monkeypatch.setenv("RANKRACE_DATA", str(tmp_path))
    assert_refused(rankrace("eval", sums, "--task", "gsm8k"), "no rows")
    (empty / "test.jsonl").write_text(row)
    ran = rankrace("eval", sums, "--task", "gsm8k", "--part", "validation", "--device", "cpu")
    assert_refused(ran, "no prediction to score")

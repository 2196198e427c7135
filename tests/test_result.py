"""result.json: what is written is valid, finite, whole, and stays readable."""

import json
import math
import os
import runpy
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pydantic
import pytest

import rankrace.result
from rankrace.errors import RankraceError
from rankrace.result import VLLM_RANKS, Result, json_schema

GOLDEN = Path(__file__).parent / "data" / "result_v1.json"
SCHEMA_FILE = Path(rankrace.result.__file__).parent / "schema" / "result.schema.json"


@pytest.fixture
def document() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_a_version_1_file_reads_and_writes_back_with_nothing_lost(tmp_path: Path):
    Result.read(GOLDEN).write(tmp_path / "result.json")
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (GOLDEN, tmp_path / "result.json"))
    added = {"decision", "loss", "accuracy", "history", "candidates", "curve"}  # to these
    assert {key: new[key] for key in old if key not in added} == {k: v for k, v in old.items() if k not in added}
    pairs = [(old[key], new[key]) for key in ("decision", "loss", "accuracy")]
    pairs += [pair for key in ("history", "candidates", "curve") for pair in zip(old[key], new[key], strict=True)]
    assert all(before.items() <= after.items() for before, after in pairs)


def test_the_schema_file_is_in_sync_and_a_result_validates(document: dict[str, Any]):
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    assert schema == json_schema(), "run: python -m rankrace.result > src/rankrace/schema/result.schema.json"
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(document)
    for key in ("rank", "curve", "decision", "vllm_max_lora_rank"):
        assert not validator.is_valid({k: v for k, v in document.items() if k != key}), key
    assert not validator.is_valid(document | {"rank": 0})


def test_the_fields_others_rely_on_have_their_names(document: dict[str, Any]):
    promised = {
        "loss": {"base", "final", "final_se"},
        "decision": {"step", "fraction", "edge", "capped", "confident"},
        "time": {"total_s", "search_s", "evaluation_s"},
        "memory": {"peak_bytes"},
        "data": {
            "train_examples",
            "validation_examples",
            "supervised_tokens",
            "truncated",
            "dropped",
            "sha256",
        },
    }
    written = json.loads(Result.model_validate(document).model_dump_json(by_alias=True))
    for key, names in promised.items():
        assert names <= written[key].keys(), key
    assert set(written["curve"][0]) >= {"rank", "loss", "se", "penalty", "objective", "source", "step"}
    assert set(written["candidates"][0]) >= {"rank", "status", "steps"}
    assert written.keys() >= {
        "schema",
        "strategy",
        "rank",
        "reason",
        "target_modules",
        "trainable_parameters",
        "base_parameters",
        "tokens_per_second",
        "versions",
        "seed",
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf")])
def test_what_is_not_finite_becomes_null(document: dict[str, Any], tmp_path: Path, bad: float):
    document["curve"][0]["loss"] = bad
    document["looks"][0]["losses"][0] = bad
    document["history"][0]["losses"][-1] = bad
    document["loss"]["final_se"] = bad
    path = tmp_path / "result.json"
    Result.model_validate(document).write(path)
    written = json.loads(path.read_text(encoding="utf-8"), parse_constant=no_constant)
    assert written["curve"][0]["loss"] is None
    assert written["looks"][0]["losses"][0] is None
    assert written["history"][0]["losses"][-1] is None
    assert written["loss"]["final_se"] is None


def test_a_final_loss_that_is_not_finite_is_refused(document: dict[str, Any]):
    document["loss"]["final"] = math.nan
    with pytest.raises(pydantic.ValidationError, match=r"loss\.final"):
        Result.model_validate(document)


def test_histories_keep_six_digits_and_equal_lengths(document: dict[str, Any]):
    document["history"] = [{"rank": 4, "steps": [1, 2], "losses": [1 / 3, 1234567.0]}]
    assert Result.model_validate(document).history[0].losses == [0.333333, 1234570.0]
    document["history"][0]["losses"] = [1.0]
    with pytest.raises(pydantic.ValidationError, match="same length"):
        Result.model_validate(document)


@pytest.mark.parametrize(("rank", "limit"), [(1, 1), (2, 8), (8, 8), (12, 16), (300, 320), (512, 512), (513, None)])
def test_vllm_limit_is_the_smallest_that_holds_the_rank(document: dict[str, Any], rank: int, limit: int | None):
    assert Result.model_validate(document | {"rank": rank}).vllm_max_lora_rank == limit
    assert limit is None or limit in VLLM_RANKS


def test_vllm_limit_covers_the_largest_rank_of_any_layer(document: dict[str, Any]):
    document |= {"rank": 8, "rank_pattern": {"layers.3.q_proj": 40}}
    assert Result.model_validate(document).vllm_max_lora_rank == 64


def test_fields_of_a_later_version_are_skipped(document: dict[str, Any], tmp_path: Path):
    path = tmp_path / "result.json"
    document["invented_later"] = {"x": 1}
    path.write_text(json.dumps(document), encoding="utf-8")
    assert Result.read(path) == Result.read(GOLDEN)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read as JSON"),
        ("[]", "schema None"),
        ('{"schema": "rankrace/result/2"}', "'rankrace/result/2'"),
        ('{"schema": "rankrace/result/1"}', "model: Field required"),
    ],
)
def test_a_broken_or_unknown_file_says_what_is_wrong(tmp_path: Path, text: str | None, message: str):
    path = tmp_path / "result.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(RankraceError, match=message) as caught:
        Result.read(path)
    assert str(path) in caught.value.what


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "result.json"
    path.write_text("old", encoding="utf-8")

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        Result.read(GOLDEN).write(path)
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_readable_yet_short():
    lines = GOLDEN.read_text(encoding="utf-8").splitlines()
    assert any(line.startswith('  "rank": ') for line in lines)
    assert len(lines) < 80, "a number a line makes long histories unreadable"


def test_the_module_prints_the_schema(capsys: pytest.CaptureFixture[str]):
    runpy.run_path(rankrace.result.__file__, run_name="__main__")
    assert json.loads(capsys.readouterr().out) == json_schema()

"""What a person can get wrong, through the real command line: exit code 2, what is wrong, why it matters and what to
do, and no trace of it on the disk."""

import errno
import gzip
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from transformers import LlamaForCausalLM

from commandline import Ran, assert_refused, rankrace
from rankrace import output, result, run
from rankrace.data import hub
from rankrace.errors import RankraceError
from rankrace.options import checked
from rankrace.result import Result
from rankrace.training import checkpoint
from tinyfolder import PARITIES, SHORT, SMALLEST_LAYER, SUMS, tiny_bert, tiny_llama, write_rows

READ = ("train", "search", "preview")
"""The commands that read data."""


@dataclass(frozen=True)
class Kit:
    """Models and rows with which nothing is wrong."""

    llama: Path
    bert: Path
    sums: Path
    parities: Path

    def run(self, command: str, out: Path, *options: object) -> Ran:
        """The command on the model and the rows that it needs; an option given again wins."""
        folder = () if command == "search" else ("--out", out)  # which refuses it
        return rankrace(command, "--model", self.llama, "--data", self.sums, *folder, *SHORT, *options)


@pytest.fixture(scope="module")
def kit(smollm2: Path, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Kit:
    folder = tmp_path_factory.mktemp("kit")
    return Kit(
        llama=tiny_llama(folder / "llama", smollm2),
        bert=tiny_bert(folder / "bert", minilm),
        sums=write_rows(folder / "sums.jsonl", SUMS),
        parities=write_rows(folder / "parities.jsonl", PARITIES),
    )


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- the rows

TWO = b'{"prompt": "1 plus 1 is", "completion": " 2"}\n{"prompt": "1 plus 2 is", "completion": " 3"}\n'
FILES: dict[str, tuple[str, bytes, Sequence[str]]] = {
    "unknown ending": ("rows.xml", TWO, ["rows.xml: the ending '.xml' is not known", ".jsonl", ".parquet"]),
    "compressed and cut": ("rows.jsonl.gz", gzip.compress(TWO)[:40], ["'.gz' is not known"]),
    "not UTF-8": ("rows.jsonl", TWO + b'{"prompt": "\xe9t\xe9 is", "completion": " x"}', ["rows.jsonl cannot be read",
                                                                                        "UTF-8"]),
    "no parquet": ("rows.parquet", TWO, ["rows.parquet is no readable parquet file"]),
    "broken line": ("rows.jsonl", TWO + b'{"prompt": "1 plus 3 is",\n', ["rows.jsonl, line 3: broken JSON",
                                                                        'the line reads: {"prompt": "1 plus 3 is",']),
    "broken json": ("rows.json", b'[\n{"prompt": "a",\n "completion" "b"}]', ["rows.json, line 3: broken JSON"]),
    "not an object": ("rows.jsonl", TWO + b"[1, 2]\n", ["rows.jsonl, line 3: not a JSON object", "write one {...}"]),
    "a column too few": ("rows.csv", b"prompt,completion\n1,2\n3\n", ["rows.csv, line 3: 1 columns where"]),
    "unknown columns": ("rows.jsonl", b'{"frage": "1 plus 1", "antwort": "2"}\n', ["'frage', 'antwort'",
                                                                                    "none of the known shapes",
                                                                                    "prompt + completion|response",
                                                                                    "messages|conversations"]),
    "semicolons": ("rows.csv", b"prompt;completion\n1;2\n3;4\n", ["'prompt;completion'", "separated by ';'"]),
    "capitals": ("rows.csv", b"Prompt,Completion\n1,2\n3,4\n", ["write the columns as prompt, completion, or"]),
    "no UTF-8": ("rows.csv", "prompt,completion\nwie?,schön\n".encode("latin-1"), ["save it as UTF-8"]),
    "no rows": ("rows.jsonl", b"\n", ["rows.jsonl has no rows"]),
    "nothing to hold out": ("rows.jsonl", TWO.splitlines()[0], ["1 row in 1 group cannot", "--validation"]),
    "copies of one row": ("rows.jsonl", TWO.splitlines(keepends=True)[0] * 5, ["5 rows in 1 group cannot be"]),
    "nothing to learn": ("rows.jsonl", TWO + b'{"prompt": "1 plus 3 is", "completion": " "}\n',
                         ["rows.jsonl, row 3: 'completion' is empty", "correct or remove the row"]),
    "no answer": ("rows.jsonl", b'{"messages": [{"role": "user", "content": "1 plus 1?"}]}\n',
                  ["row 1", "no assistant message follows", "nothing to learn"]),
    "null": ("rows.jsonl", TWO + b'{"prompt": "1 plus 3", "completion": null}\n', ["row 3", "'completion' must be"]),
    "half a character": ("rows.jsonl", TWO + b'{"prompt": "\\ud83d", "completion": " x"}\n',
                         ["row 3", "'prompt' holds '\\ud83d'"]),
}  # fmt: skip


@pytest.mark.parametrize("command", READ)
@pytest.mark.parametrize("case", FILES)
def test_faulty_rows(case: str, command: str, kit: Kit, tmp_path: Path) -> None:
    name, content, words = FILES[case]
    (tmp_path / name).write_bytes(content)
    ran = kit.run(command, tmp_path / "out", "--data", tmp_path / name)
    assert_refused(ran, *words, within=tmp_path, left=[name])


@pytest.mark.parametrize("command", READ)
@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("sum.jsonl", ["there is no file", "sum.jsonl", "has sums.jsonl"]),
        ("nowhere/sums.jsonl", ["there is no file", "nowhere is empty or no folder"]),
        ("no-data", ["no-data has no training file", "no data file"]),
        ("folder.jsonl", ["folder.jsonl has no training file", "seen: odd.json, sums.json"]),
    ],
)
def test_nothing_there(data: str, words: list[str], command: str, kit: Kit, tmp_path: Path) -> None:
    shutil.copy(kit.sums, tmp_path)
    (tmp_path / "no-data").mkdir()
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("sums.json", "odd.json"):
        (tmp_path / "folder.jsonl" / name).write_text("[]")
    there = sorted(path.name for path in tmp_path.iterdir())
    assert_refused(kit.run(command, tmp_path / "out", "--data", tmp_path / data), *words, within=tmp_path, left=there)


@pytest.mark.parametrize("command", READ)
@pytest.mark.parametrize("option", ["--data", "--validation", "--model"])
def test_a_name_that_no_system_takes(option: str, command: str, kit: Kit, tmp_path: Path) -> None:
    name = "n" * 300 + ".jsonl"
    ran = kit.run(command, tmp_path / "out", option, name)
    assert_refused(ran, name, "cannot load the model" if option == "--model" else "there is no file", within=tmp_path)


@pytest.mark.parametrize("command", READ)
def test_a_file_that_cannot_be_read(command: str, kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there, but opening it is refused; root, who may run the tests, is never refused."""
    original = Path.read_text

    def refused(self: Path, *args: Any, **kwargs: Any) -> str:
        if self.name == "rows.jsonl":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return original(self, *args, **kwargs)

    (tmp_path / "rows.jsonl").write_bytes(TWO)
    monkeypatch.setattr(Path, "read_text", refused)
    ran = kit.run(command, tmp_path / "out", "--data", tmp_path / "rows.jsonl")
    said = ["rows.jsonl cannot be read", "Permission denied", "check the file's permissions"]
    assert_refused(ran, *said, within=tmp_path, left=["rows.jsonl"])


@pytest.mark.parametrize("command", READ)
def test_a_folder_that_cannot_be_read(
    command: str, kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.iterdir

    def refused(self: Path) -> Iterator[Path]:
        if self.name == "rows":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return original(self)

    (tmp_path / "rows").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refused)
        ran = kit.run(command, tmp_path / "out", "--data", tmp_path / "rows")
    said = ["rows cannot be read: Permission denied", "check the folder's permissions"]
    assert_refused(ran, *said, within=tmp_path, left=["rows"])


VALIDATION: dict[str, tuple[bytes | None, Sequence[str]]] = {
    "missing": (None, ["there is no file", "held-out.jsonl"]),
    "no rows": (b"", ["held-out.jsonl has no rows"]),
    "broken": (TWO + b"}\n", ["held-out.jsonl, line 3: broken JSON"]),
    "another shape": (b'{"text": "1 plus 1"}\n', ["held-out.jsonl has rows of the shape text", "prompt+completion"]),
    "copies of training rows": (TWO, ["all 2 validation rows are also among the 36 training rows"]),
}


@pytest.mark.parametrize("command", READ)
@pytest.mark.parametrize("case", VALIDATION)
def test_faulty_validation_rows(case: str, command: str, kit: Kit, tmp_path: Path) -> None:
    content, words = VALIDATION[case]
    if content is not None:
        (tmp_path / "held-out.jsonl").write_bytes(content)
    ran = kit.run(command, tmp_path / "out", "--validation", tmp_path / "held-out.jsonl")
    assert_refused(ran, *words, within=tmp_path, left=[] if content is None else ["held-out.jsonl"])


@pytest.mark.parametrize("command", READ)
def test_a_folder_as_the_validation_file(command: str, kit: Kit, tmp_path: Path) -> None:
    ran = kit.run(command, tmp_path / "out", "--validation", kit.llama)
    assert_refused(ran, f"there is no file {kit.llama}", within=tmp_path)


@pytest.mark.parametrize("command", READ)
def test_a_label_that_no_training_row_has(command: str, kit: Kit, tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "held-out.jsonl", [PARITIES[0], {"text": "9 and 9", "label": "neither"}])
    options = ["--model", kit.bert, "--data", kit.parities, "--validation", held_out]
    ran = kit.run(command, tmp_path / "out", *options)
    assert_refused(
        ran, "label that no training row has: 'neither'", "even, odd", within=tmp_path, left=["held-out.jsonl"]
    )


@pytest.mark.parametrize("command", READ)
def test_rows_without_labels_for_a_classifier(command: str, kit: Kit, tmp_path: Path) -> None:
    ran = kit.run(command, tmp_path / "out", "--model", kit.bert)
    assert_refused(ran, "classification needs two labels or more (found: none)", "a causal model", within=tmp_path)


@pytest.mark.parametrize("command", READ)
@pytest.mark.parametrize(
    ("prompt", "answer"),
    [("What is more", " than eight tokens, wherever one cuts it, and has no end?"), ("word " * 40, " yes")],
    ids=["the answers' ends", "the prompts' beginnings"],
)
def test_everything_is_cut(prompt: str, answer: str, command: str, kit: Kit, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}: {prompt}", "completion": answer} for n in range(20)]
    data = write_rows(tmp_path / "long.jsonl", rows)
    ran = kit.run(command, tmp_path / "out", "--data", data, "--max-length", 8)
    said = ["every training example is cut to 8 tokens", "raise --max-length"]
    assert_refused(ran, *said, within=tmp_path, left=["long.jsonl"])


@pytest.mark.parametrize("command", READ)
def test_no_such_column_of_groups(command: str, kit: Kit, tmp_path: Path) -> None:
    ran = kit.run(command, tmp_path / "out", "--group-column", "title")
    assert_refused(ran, "has no column 'title' (seen: prompt, completion)", within=tmp_path)


# --- the model


@pytest.mark.parametrize("command", READ)
@pytest.mark.parametrize("what", ["--model", "--data"])
def test_no_network(what: str, command: str, kit: Kit, tmp_path: Path) -> None:
    ran = kit.run(command, tmp_path / "out", what, "nobody-at-all/has-this")
    assert_refused(ran, "nobody-at-all/has-this", "network", within=tmp_path)
    assert "could be fetched from the hub" in ran.err or "could not be loaded from the hub" in ran.err


def closed_port() -> int:
    """One where nothing listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize("what", ["--model", "--data"])
def test_a_hub_out_of_reach_is_asked_once(what: str, kit: Kit, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{closed_port()}"
    given = ["--model", kit.llama, "--data", kit.sums, what, "nobody-at-all/has-this"]
    ran = subprocess.run(
        [sys.executable, "-m", "rankrace.cli", "preview", *map(str, given)],
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2
    first, *error = ran.stderr.splitlines()
    assert first.startswith(f"{address} cannot be reached (")
    assert first.endswith("): only what was fetched before can be used.")
    assert [line.split(":")[0].strip() for line in error] == ["error", "why", "fix"], ran.stderr


def test_a_hub_that_is_reached_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
                                     tmp_path: Path) -> None:  # fmt: skip
    """The process is offline only while it has to be, and never asks for what lies here, or where it shall not."""
    asked: list[str] = []

    class Session:
        there = False

        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            if not self.there:
                raise RuntimeError("no route")

    session = Session()
    monkeypatch.setattr(hub, "get_session", lambda: session)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    hub.reach_hub("some/model")
    assert asked == []
    monkeypatch.setattr(hub, "WANTED_OFFLINE", False)
    hub.reach_hub(str(tmp_path))
    assert asked == []
    hub.reach_hub("some/model")
    assert hub.constants.HF_HUB_OFFLINE is True
    assert "cannot be reached (no route)" in caplog.text
    session.there = True
    hub.reach_hub("some/model")
    assert len(asked) == 2
    assert hub.constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("command", READ)
def test_a_folder_that_is_no_model(command: str, kit: Kit, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ran = kit.run(command, tmp_path / "out", "--model", tmp_path / "empty")
    said = [f"cannot load the model '{tmp_path / 'empty'}'", "does not hold a readable", "config.json"]
    assert_refused(ran, *said, within=tmp_path, left=["empty"])


@pytest.mark.parametrize("command", ["train", "search"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--target-modules", "q_proj,query_key"],
            ["no linear layer named query_key", "gate_proj, k_proj, o_proj, q_proj"],
        ),
        (["--ranks", f"2,{SMALLEST_LAYER + 1}"], [f"rank {SMALLEST_LAYER + 1} is outside 1 … {SMALLEST_LAYER}"]),
        (["--device", "toaster"], ["the device 'toaster' cannot be used", "cuda:N"]),
    ],
)
def test_options_that_do_not_fit_the_model(
    options: list[str], words: list[str], command: str, kit: Kit, tmp_path: Path
) -> None:
    assert_refused(kit.run(command, tmp_path / "out", *options), *words, within=tmp_path)


def test_the_largest_possible_rank_is_taken(kit: Kit, tmp_path: Path) -> None:
    ran = kit.run("search", tmp_path / "out", "--ranks", SMALLEST_LAYER, "--max-steps", 1)
    assert ran.code == 0, ran.err


@pytest.mark.parametrize("strategy", ["shrink", "grid"])
@pytest.mark.parametrize("command", ["train", "search"])
def test_diverging(command: str, strategy: str, kit: Kit, tmp_path: Path) -> None:
    ran = kit.run(command, tmp_path / "out", "--strategy", strategy, "--lr", "1e30")
    assert_refused(ran, "diverged", "lower --lr", within=tmp_path, left=["out"] if command == "train" else [])
    if command == "train":
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoints", "config.yaml"]


# --- the options

VALUES: dict[str, tuple[list[str], Sequence[str]]] = {
    "unknown": (["--bach-size", "4"], ["No such option: --bach-size", "--batch-size"]),
    "without a value": (["--seed"], ["'--seed' requires an argument"]),
    "one too many": (["--seed", "1", "2"], ["unexpected extra argument", "2"]),
    "not a number": (["--epochs", "many"], ["--epochs 'many'", "valid number"]),
    "not whole": (["--batch-size", "1.5"], ["--batch-size '1.5'", "valid integer"]),
    "not a choice": (["--strategy", "best"], ["--strategy 'best'", "'shrink', 'race' or 'grid'"]),
    "rank of nothing": (["--ranks", "0,2"], ["--ranks '0'", "greater than or equal to 1"]),
    "rank not a number": (["--ranks", "2,four"], ["--ranks 'four'", "valid integer"]),
    "no rank": (["--ranks", ","], ["--ranks ()", "at least 1"]),
    "not positive": (["--lr", "-1"], ["--lr '-1'", "greater than 0"]),
    "NaN": (["--lr", "nan"], ["--lr 'nan'"]),
    "all held out": (["--validation-fraction", "1"], ["--validation-fraction '1'", "less than 1"]),
    "no data": (["--data", ""], ["--data is empty", "a shell variable that is not set"]),
    "no folder": (["--out", ""], ["--out is empty"]),
    "no name": (["--model", ""], ["--model is empty"]),
    "no held-out rows": (["--validation", ""], ["--validation is empty"]),
    "a rate of nothing": (["--lr-scales", "0,1"], ["--lr-scales '0'", "greater than 0"]),
    "too many rates": (["--lr-scales", "1,2,3,4,5,6,7,8,9"], ["--lr-scales", "at most 8"]),
    "rates of a grid": (["--strategy", "grid", "--lr-scales", "0.5,1"], ["lr_scales or twin has no effect", "race"]),
    "a twin of a grid": (["--strategy", "grid", "--twin"], ["lr_scales or twin has no effect", "shrink or race"]),
    "layers in a race": (["--strategy", "race", "--layer-ranks", "pooled"], ["layer_ranks has no effect", "shrink"]),
    "layers in a grid": (["--strategy", "grid", "--layer-ranks", "pooled"], ["layer_ranks has no effect", "shrink"]),
    "a share of no search": (["--search-fraction", "0.3"], ["search_fraction has no effect", "strategy grid"]),
    "a weight of nothing": (["--penalty-weight", "0.1"], ["penalty_weight has no effect", "parameters or bytes"]),
    "a share beside a price": (["--penalty", "bytes", "--kappa", "0.1"], ["kappa has no effect", "penalty log2"]),
    "no error to prefer by": (
        ["--rule", "argmin", "--prefer", "small"],
        ["prefer has no effect", "other than argmin"],
    ),
    "no such file": (["--config", "nowhere.yaml"], ["cannot read the configuration nowhere.yaml", "No such file"]),
}


@pytest.mark.parametrize("command", READ)
@pytest.mark.parametrize("case", VALUES)
def test_faulty_options(case: str, command: str, kit: Kit, tmp_path: Path) -> None:
    options, words = VALUES[case]
    assert_refused(kit.run(command, tmp_path / "out", *options), *words, within=tmp_path)


YAML: dict[str, tuple[bytes, Sequence[str]]] = {
    "no YAML": (b"epochs: [3\nlr: 1e-4\n", ["cannot read the configuration", "line 2"]),
    "not UTF-8": (b"model: \xe9t\xe9", ["cannot read the configuration"]),
    "a list": (b"- epochs: 3\n", ["does not hold options", "`name: value`"]),
    "a word": (b"epochs", ["does not hold options"]),
    "unknown": (b"epoch: 3\n", ["there is no option 'epoch'", "ignored in silence", "did you mean 'epochs'?"]),
    "unknown, with dashes": (b"bach-size: 3\n", ["there is no option 'bach_size'", "did you mean 'batch_size'?"]),
    "like no other": (b"qqqqqq: 3\n", ["there is no option 'qqqqqq'", "rankrace train --help"]),
    "a number as its name": (b"3: 3\n", ["there is no option '3'"]),
    "a list for a number": (b"epochs: [3]\n", ["--epochs [3]", "valid number"]),
    "a mapping for a list": (b"target_modules: {q_proj: 1}\n", ["--target-modules {'q_proj': 1}"]),
    "a number in a list of names": (b"target_modules: [q_proj, 3]\n", ["--target-modules"]),
    "no learning rate": (b"rank_lr: {2: fast}\n", ["--rank-lr 'fast'", "valid number"]),
    "nothing for a number": (b"epochs:\n", ["--epochs None", "valid number"]),
}


@pytest.mark.parametrize("command", READ)
@pytest.mark.parametrize("case", YAML)
def test_faulty_yaml(case: str, command: str, kit: Kit, tmp_path: Path) -> None:
    content, words = YAML[case]
    (tmp_path / "options.yaml").write_bytes(content)
    ran = kit.run(command, tmp_path / "out", "--config", tmp_path / "options.yaml")
    assert_refused(ran, *words, within=tmp_path, left=["options.yaml"])


def test_a_folder_as_the_configuration(kit: Kit, tmp_path: Path) -> None:
    ran = kit.run("train", tmp_path / "out", "--config", tmp_path)
    assert_refused(ran, "cannot read the configuration", "directory", within=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], ["--model is missing"]),
        (["search", "--model", "m"], ["--data is missing", "give --data"]),
        (["bench"], ["Missing command", "--help"]),
        (["trian"], ["No such command 'trian'", "'train'"]),
        (["merge"], ["Missing argument", "adapter"]),
        (["merge", "adapter"], ["Missing option", "--out"]),
        (["merge", "adapter", "--ou", "x"], ["No such option: --ou", "--out"]),
    ],
)
def test_incomplete_commands(
    arguments: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(rankrace(*arguments), *words, within=tmp_path)


# --- the output folder


@pytest.fixture(scope="module")
def finished(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("finished") / "out"
    ran = kit.run("train", out, "--save-every", 2)
    assert ran.code == 0, ran.err
    return out


def changed(name: str, content: str | None) -> Callable[[Path], None]:
    """A file of a folder gets other content, or is removed."""

    def change(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content)

    return change


def unchanged(out: Path) -> None:
    """Nothing is wrong with the folder."""


HELD: dict[str, tuple[Callable[[Path], None], list[str], Sequence[str]]] = {
    "a finished run": (unchanged, [], ["already holds a run", "--resume"]),
    "another run": (unchanged, ["--resume", "--seed", "5"], ["(seed: 0 there, 5 now)", "choose another --out"]),
    "a run without its options": (changed("config.yaml", None), ["--resume"], ["but no config.yaml"]),
    "options that are no YAML": (changed("config.yaml", "ranks: [2"), ["--resume"], ["is not the configuration"]),
    "options that are a word": (changed("config.yaml", "ranks"), ["--resume"], ["it holds no options"]),
    "no options": (changed("config.yaml", ""), ["--resume"], ["is not the configuration", "it holds no options"]),
    "unknown options": (changed("config.yaml", "model: m\ndata: d\nrunk: 3\n"), ["--resume"],
                        ["is not the configuration of a run: there is no option 'runk'"]),
    "an option of another type": (changed("config.yaml", "model: m\ndata: d\nepochs: x\n"), ["--resume"],
                                  ["is not the configuration of a run: --epochs 'x'"]),
    "a broken result": (changed("result.json", '{"schema"'), ["--resume"], ["result.json cannot be read"]),
}  # fmt: skip


@pytest.mark.parametrize("case", HELD)
def test_the_output_folder_holds(case: str, kit: Kit, finished: Path, tmp_path: Path) -> None:
    change, options, words = HELD[case]
    out = shutil.copytree(finished, tmp_path / "out")
    change(out)
    before = contents(tmp_path)
    ran = kit.run("train", out, "--save-every", 2, *options)
    assert_refused(ran, str(out), *words)
    assert contents(tmp_path) == before


def test_an_output_folder_whose_name_no_system_takes(kit: Kit, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / ("n" * 300)
    for ran in (kit.run("train", out), rankrace("merge", finished / "adapter", "--out", out)):
        assert_refused(ran, "cannot write", "File name too long", "choose another --out", within=tmp_path)


@pytest.mark.parametrize("below", [(), ("deeper", "still")])
def test_the_output_folder_is_a_file(below: tuple[str, ...], kit: Kit, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    ran = kit.run("train", (tmp_path / "out").joinpath(*below))
    assert_refused(ran, f"{tmp_path / 'out'} is a file", within=tmp_path, left=["out"])
    assert (tmp_path / "out").read_text() == "mine"


# --- no space left


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """The system refuses to make files longer than this: what is written ends half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_at(
    monkeypatch: pytest.MonkeyPatch, owner: ModuleType | type, name: str, *, call: int = 1, size: int | None
) -> None:
    """From a function's n-th call on, while it runs, there is no space for files longer than `size` (or at all)."""
    original, calls = getattr(owner, name), count(1)

    def limited(*args: Any, **kwargs: Any) -> Any:
        if next(calls) < call:
            return original(*args, **kwargs)
        if size is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with no_file_above(size):
            return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, limited)


def same_result(out: Path, expected: Path) -> None:
    ours, theirs = Result.read(out / "result.json"), Result.read(expected / "result.json")
    assert (ours.rank, ours.loss, ours.curve) == (theirs.rank, theirs.loss, theirs.curve)
    names = sorted(path.name for path in out.iterdir())
    assert names == ["adapter", "checkpoints", "config.yaml", "report.html", "result.json"]
    weights = "adapter/adapter_model.safetensors"
    assert (out / weights).read_bytes() == (expected / weights).read_bytes()


FULL: dict[str, tuple[ModuleType, str, int, int | None, list[str]]] = {
    "at the second checkpoint": (run, "save_checkpoint", 2, 3000, []),
    "as it reaches the disk": (checkpoint, "flush", 6, None, []),
    "at the adapter": (run, "save_adapter", 1, 3000, []),
    "at the report": (run, "write_report", 1, 3000, ["adapter"]),
    "at the result": (result, "replace_text", 1, 500, ["adapter", "report.html"]),
}
"""Function in which the disk is full, from which call on, beyond how many bytes, and what is whole by then."""


@pytest.mark.parametrize("case", FULL)
def test_the_disk_is_full(
    case: str, kit: Kit, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, function, call, size, whole = FULL[case]
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        full_at(patch, module, function, call=call, size=size)
        ran = kit.run("train", out, "--save-every", 2)
    left = ["checkpoints", "config.yaml", *whole]
    assert_refused(
        ran, f"cannot write {out}", "the disk is full", "free some space", "--resume", within=out, left=left
    )
    assert not [path for path in out.rglob("*") if path.name.startswith(".")], "half-written"
    steps = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert steps == (["step-000002"] if function in ("save_checkpoint", "flush") else ["step-000006", "step-000008"])

    resumed = kit.run("train", out, "--save-every", 2, "--resume")
    assert resumed.code == 0, resumed.err
    assert f"Resumed after step {int(steps[-1][-6:])} of 8." in resumed.err
    same_result(out, finished)


def test_the_disk_is_full_from_the_start(kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_at(monkeypatch, output, "replace_text", size=100)
    ran = kit.run("train", tmp_path / "out")
    assert_refused(ran, f"cannot write {tmp_path / 'out'}", "the disk is full", within=tmp_path)


def test_the_disk_is_full_while_merging(
    kit: Kit, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_at(monkeypatch, LlamaForCausalLM, "save_pretrained", size=3000)
    ran = rankrace("merge", finished / "adapter", "--out", tmp_path / "merged")
    assert_refused(ran, f"cannot write {tmp_path / 'merged'}", "the disk is full", within=tmp_path)


# --- what is merged


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed("adapter_config.json", None), ["No such file"]),
        (changed("adapter_config.json", "{"), ["line 1"]),
        (changed("adapter_config.json", "{}"), ["does not have all of base_model_name_or_path"]),
        (changed("adapter_config.json", "[]"), ["does not have all of base_model_name_or_path"]),
        (changed("adapter_model.safetensors", None), ["adapter_model.safetensors"]),
        (changed("adapter_model.safetensors", "half"), ["header"]),
    ],
)
def test_merging_what_is_no_adapter(
    change: Callable[[Path], None], words: list[str], finished: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(finished / "adapter", tmp_path / "adapter")
    change(adapter)
    ran = rankrace("merge", adapter, "--out", tmp_path / "merged")
    assert_refused(ran, f"{adapter} is not an adapter", *words, within=tmp_path, left=["adapter"])


def test_off_in_yaml_is_no_boolean(tmp_path: Path) -> None:
    """To YAML 1.1 it is false. Where an option does not take the words a boolean is none of its values."""
    file = tmp_path / "options.yaml"
    file.write_text("{model: m, data: d, average: off, compile: on, twin: on}")
    config = checked(yaml.safe_load(file.read_text()))
    assert (config.average, config.compile, config.twin) == ("off", "on", True)
    with pytest.raises(RankraceError, match="--schedule False"):
        checked({"model": "m", "data": "d", "schedule": False})

"""A run that is killed, at whatever moment and however often, and resumed gives bit for bit what an undisturbed
one gives.

Each life of a run is a process of its own, forked from a server that has imported rankrace and done nothing
else. It dies by its own hand (SIGKILL before its n-th file operation in --out, so that the moment is known), or
by this one's at a random time.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rankrace.cli import main
from rankrace.train.checkpoint import load_checkpoint, save_checkpoint

STEPS, SAVE_EVERY = 24, 2
STRATEGIES = {
    "shrink": ["--strategy", "shrink"],
    # Without refinement the winner goes on as it is: its optimiser state is cut out of that of all candidates.
    "grid": ["--strategy", "grid", "--search-fraction", "0.3", "--no-refine"],
}
LIMIT_S = 180


# --- what runs in the children


def life(arguments: list[str], log: Path, out: Path, die_at: int, by: int) -> None:
    """`rankrace …` with all that it says in a file, and signal `by` to itself at the `die_at`-th operation."""
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1), os.dup2(said, 2)
    if die_at:
        signal_at(out, die_at, by)
    sys.argv = ["rankrace", *arguments]
    main()


def signal_at(out: Path, nth: int, number: int) -> None:
    """Before the n-th file operation in a folder the process gets this signal."""
    done = count(1)

    def operation(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            name = arguments[0]
            # shutil.rmtree names what it removes from within the folder, without its path.
            within = isinstance(name, str | Path) and (
                Path(name).is_relative_to(out) or (event != "open" and not Path(name).is_absolute())
            )
            if within and next(done) == nth:
                os.kill(os.getpid(), number)

    sys.addaudithook(operation)


def die_at_every_operation_of_a_save(folder: Path) -> None:
    """Prints how many there are."""
    torch.set_num_threads(1)
    for step in (2, 3):  # the newest one again, and a new one
        for nth in count(1):
            shutil.rmtree(folder, ignore_errors=True)
            for earlier in (1, 2):
                save_checkpoint(folder, earlier, {"x": torch.full((5,), float(earlier))}, {"is": earlier})
            child = os.fork()
            if not child:
                signal_at(folder, nth, signal.SIGKILL)
                save_checkpoint(folder, step, {"x": torch.full((5,), float(step))}, {"is": step})
                os._exit(0)
            _, status = os.waitpid(child, 0)
            found = load_checkpoint(folder)
            assert found is not None
            tensors, state = found
            assert state["is"] in (1, 2) if step == 2 else state["is"] in (2, 3), (step, nth, state)
            assert torch.equal(tensors["x"], torch.full((5,), float(state["is"])))
            save_checkpoint(folder, 4, tensors, state)
            assert len(list(folder.iterdir())) == 2, f"left behind: {sorted(folder.iterdir())}"
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0
                print(nth - 1, flush=True)
                break


def logged(body: Callable[[Path], None], log: Path, folder: Path) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    body(folder)


# --- starting them


@dataclass(frozen=True, kw_only=True)
class Ended:
    code: int
    """Minus the signal's number for a process that a signal ended."""
    said: str


@dataclass(frozen=True)
class Runs:
    """Starts lives of runs over one model and one file of rows."""

    context: ForkServerContext
    folder: Path
    model: Path
    data: Path

    def arguments(self, strategy: str, out: Path) -> list[str]:
        return [
            "train", "--model", str(self.model), "--data", str(self.data), "--out", str(out),
            *STRATEGIES[strategy], "--ranks", "2,4,12", "--rule", "argmin", "--kappa", "0",
            "--max-steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--batch-size", "6",
            "--micro-tokens", "24", "--validation-fraction", "0.4",
            "--lr", "1e-2", "--dropout", "0.1", "--weight-decay", "0.1",
        ]  # fmt: skip

    def begin(self, arguments: list[str], out: Path, die_at: int = 0, by: int = signal.SIGKILL) -> ForkServerProcess:
        process = self.context.Process(target=life, args=(arguments, self.folder / "log", out, die_at, by))
        process.start()
        return process

    def end(self, process: ForkServerProcess) -> Ended:
        process.join(LIMIT_S)
        code = process.exitcode
        assert code is not None, "still running"
        process.close()
        return Ended(code=code, said=(self.folder / "log").read_text())

    def __call__(self, arguments: list[str], out: Path, die_at: int = 0, by: int = signal.SIGKILL) -> Ended:
        return self.end(self.begin(arguments, out, die_at, by))


@pytest.fixture(scope="module")
def runs(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("resume")
    model, data = folder / "model", folder / "sums.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    sums = [{"prompt": f"{a} plus {b} is", "completion": f" {a + b}"} for a in range(8) for b in range(8)]
    data.write_text("\n".join(map(json.dumps, sums)), encoding="utf-8")

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rankrace.cli", "rankrace.run"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # threads do not survive a fork
        forkserver.ensure_running()
    return Runs(context, folder, model, data)


@pytest.fixture(scope="module")
def undisturbed(runs: Runs) -> Callable[[str], Path]:
    """The output folder of a strategy's run that nothing happened to."""

    def out_of(strategy: str) -> Path:
        out = runs.folder / f"undisturbed-{strategy}"
        if not out.exists():
            ended = runs(runs.arguments(strategy, out), out)
            assert ended.code == 0, ended.said
        return out

    return out_of


# --- what is compared


def result_of(out: Path) -> dict[str, Any]:
    """result.json without times, speed and memory."""
    result = json.loads((out / "result.json").read_text())
    return {key: value for key, value in result.items() if key not in ("time", "tokens_per_second", "memory")}


def same(out: Path, expected: Path) -> None:
    assert result_of(out) == result_of(expected)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / "adapter" / name).read_bytes() == (expected / "adapter" / name).read_bytes()
    assert (out / "report.html").stat().st_size > 1000
    assert not list(out.rglob("*.partial")), "left behind"


def steps_saved(out: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in (out / "checkpoints").glob("step-*"))


def as_of(expected: Path, out: Path) -> Path:
    """A copy of a finished run from which everything after the last checkpoint is taken away."""
    shutil.copytree(expected, out)
    (out / "result.json").unlink()
    (out / "report.html").unlink()
    return out


def kill_some_time(process: ForkServerProcess, out: Path, delay_s: float) -> None:
    """A while after the process wrote its first checkpoint, so that it dies somewhere in the steps."""
    before, limit = steps_saved(out), time.monotonic() + LIMIT_S
    while process.is_alive() and steps_saved(out) == before and time.monotonic() < limit:
        time.sleep(0.005)
    time.sleep(delay_s)
    process.kill()


# --- the tests


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_killed_again_and_again(
    strategy: str, runs: Runs, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    expected = undisturbed(strategy)
    decided = result_of(expected)["decision"]["step"]
    out, rng = tmp_path / "out", np.random.default_rng(7)
    arguments = [*runs.arguments(strategy, out), "--resume"]
    # The first one dies inside the search: before the decision.
    assert runs(arguments, out, die_at=20).code == -signal.SIGKILL
    assert 0 < steps_saved(out)[-1] < decided
    seen, killed = set(steps_saved(out)), 1
    for turn in count():
        if turn % 2:
            ended = runs(arguments, out, die_at=int(rng.integers(2, 60)) if turn < 8 else 0)
        else:
            process = runs.begin(arguments, out)
            if turn < 8:
                kill_some_time(process, out, float(rng.uniform(0, 0.25)))
            ended = runs.end(process)
        seen |= set(steps_saved(out))
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.said
        killed += 1
    assert killed >= 3
    same(out, expected)


def test_a_kill_at_every_operation_of_a_save_leaves_a_whole_checkpoint(runs: Runs, tmp_path: Path) -> None:
    process = runs.context.Process(
        target=logged, args=(die_at_every_operation_of_a_save, tmp_path / "log", tmp_path / "checkpoints")
    )
    process.start()
    process.join(LIMIT_S)
    assert process.exitcode == 0
    again, new = map(int, (tmp_path / "log").read_text().split())
    assert again >= 8
    assert new >= 8

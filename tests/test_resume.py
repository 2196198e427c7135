"""A run that is killed, at whatever moment and however often, and resumed gives bit for bit what an undisturbed
one gives.

Each life of a run is a process of its own, forked from a server that has imported rankrace and done nothing
else. It dies by its own hand (SIGKILL before its n-th file operation in --out, so that the moment is known), or
by this one's at a random time.
"""

import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from commandline import rankrace
from rankrace.cli import main
from rankrace.config import RunConfig
from rankrace.errors import RankraceError
from rankrace.interrupt import Interrupts
from rankrace.run import continued
from rankrace.select.strategy import later_step
from rankrace.training.checkpoint import load_checkpoint, save_checkpoint, written_whole
from rankrace.training.loop import Trainer
from tinyfolder import tiny_llama

STEPS, SAVE_EVERY = 21, 2
STRATEGIES = {
    "shrink": ["--strategy", "shrink"],
    # Without refinement the winner goes on as it is: its optimiser state is cut out of that of all candidates.
    # One candidate diverges, and its state goes through checkpoints too.
    "grid": ["--strategy", "grid", "--search-fraction", "0.3", "--no-refine", "--config", "diverging.yaml"],
    # Four openers, then three racers; averages go through checkpoints too.
    "race": ["--strategy", "race", "--lr-scales", "0.5,1,2", "--twin"],
    # One example to look at: no rank can be told from another.
    "waits": ["--strategy", "shrink", "--validation-fraction", "0.015"],
    # At a constant high rate: the average is better than the last step, and delivered.
    "wanders": ["--strategy", "grid", "--no-refine", "--ranks", "4", "--search-fraction", "0.3",
                "--validation-fraction", "0.6", "--schedule", "constant", "--config", "high.yaml",
                "--seed", "3"],
}  # fmt: skip
LIMIT_S = 180


# --- what runs in the children


def life(arguments: list[str], log: Path, out: Path, die_at: int | str, by: int) -> None:
    """`rankrace …` with all that it says in a file, and signal `by` to itself at the `die_at`-th operation."""
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1), os.dup2(said, 2)
    torch.set_num_threads(1)  # the server may be one that earlier tests started, with more
    if die_at:
        signal_at(out, die_at, by)
    sys.argv = ["rankrace", *arguments]
    main()


def signal_at(out: Path, nth: int | str, number: int) -> None:
    """Before the n-th file operation in a folder, or the first on a file of that name, the process is signalled."""
    done = count(1)

    def operation(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            name = arguments[0]
            # shutil.rmtree names what it removes from within the folder, without its path.
            within = isinstance(name, str | Path) and (
                Path(name).is_relative_to(out) or (event != "open" and not Path(name).is_absolute())
            )
            if within and nth in (next(done), Path(name).name):
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
        own = [str(self.folder / a) if a.endswith(".yaml") else a for a in STRATEGIES[strategy]]
        return [
            "train", "--model", str(self.model), "--data", str(self.data), "--out", str(out),
            "--ranks", "2,4,12", "--rule", "argmin", "--kappa", "0", "--validation-fraction", "0.4", *own,
            "--epochs", "9", "--max-steps", str(STEPS), "--save-every", str(SAVE_EVERY),
            "--batch-size", "6", "--micro-tokens", "24", "--lr", "1e-2", "--dropout", "0.1", "--weight-decay", "0.1",
        ]  # fmt: skip

    def begin(
        self, arguments: list[str], out: Path, die_at: int | str = 0, by: int = signal.SIGKILL
    ) -> ForkServerProcess:
        process = self.context.Process(target=life, args=(arguments, self.folder / "log", out, die_at, by))
        process.start()
        return process

    def end(self, process: ForkServerProcess) -> Ended:
        process.join(LIMIT_S)
        code = process.exitcode
        assert code is not None, "still running"
        process.close()
        return Ended(code=code, said=(self.folder / "log").read_text())

    def __call__(self, arguments: list[str], out: Path, die_at: int | str = 0, by: int = signal.SIGKILL) -> Ended:
        return self.end(self.begin(arguments, out, die_at, by))


@pytest.fixture(scope="module")
def runs(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("resume")
    model, data = tiny_llama(folder / "model", smollm2), folder / "sums.jsonl"
    sums = [{"prompt": f"{a} plus {b} is", "completion": f" {a + b}"} for a in range(8) for b in range(8)]
    data.write_text("\n".join(map(json.dumps, sums)), encoding="utf-8")
    (folder / "diverging.yaml").write_text("rank_lr: {2: 1e30}\n", encoding="utf-8")
    (folder / "high.yaml").write_text("rank_lr: {4: 0.03}\n", encoding="utf-8")

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rankrace.cli", "rankrace.run", "transformers.models.llama.modeling_llama"])
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


def adapter_config(out: Path) -> dict[str, Any]:
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    return {**config, "target_modules": sorted(config["target_modules"])}  # PEFT writes a set


def same(out: Path, expected: Path) -> None:
    assert result_of(out) == result_of(expected)
    ours, theirs = (folder / "adapter" / "adapter_model.safetensors" for folder in (out, expected))
    assert ours.read_bytes() == theirs.read_bytes()
    assert adapter_config(out) == adapter_config(expected)
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
    assert result_of(expected)["ending"]["averaged"] or strategy != "wanders"
    out, rng = tmp_path / "out", np.random.default_rng(7)
    arguments = [*runs.arguments(strategy, out), "--resume"]
    # The first one dies inside the search: before the decision.
    first = runs(arguments, out, die_at=20)
    assert first.code == -signal.SIGKILL, first.said
    assert 0 < steps_saved(out)[-1] < decided
    # What a save that was cut off leaves behind, with a name that sorts last.
    half = out / "checkpoints" / ".step-000099.partial"
    half.mkdir()
    (half / "tensors.safetensors").write_bytes(b"half")
    killed = 1
    for turn in count():
        if turn % 2:
            ended = runs(arguments, out, die_at=int(rng.integers(2, 60)) if turn < 5 else 0)
        else:
            process = runs.begin(arguments, out)
            if turn < 5:
                kill_some_time(process, out, float(rng.uniform(0, 0.25)))
            ended = runs.end(process)
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.said
        killed += 1
    assert killed >= 3
    same(out, expected)


def test_killed_in_every_part_of_a_race(runs: Runs, undisturbed: Callable[[str], Path], tmp_path: Path) -> None:
    """While the learning rates are compared, while the ranks are, and afterwards."""
    expected, parts = undisturbed("race"), []
    for die_at in (24, 54, 94):
        out = tmp_path / str(die_at)
        arguments = [*runs.arguments("race", out), "--resume", "--save-every"]
        assert runs([*arguments, "1"], out, die_at).code == -signal.SIGKILL
        found = load_checkpoint(out / "checkpoints")
        assert found is not None
        tensors, state = found[0], found[1]["session"]
        comparing_rates, chosen = not state["search"]["looks"], len(state["ranks"]) == 1
        assert ("average" in tensors) == (state["averaged"] is not None) == (comparing_rates or chosen)
        parts.append(tuple(state["ranks"]))
        assert runs([*arguments, str(STEPS)], out).code == 0
        same(out, expected)
    openers, racers, winner = parts
    assert openers == (16, 16, 16, 16)
    assert len(racers) > 1 == len(winner)
    assert set(racers) <= {2, 4, 12}


def test_killed_while_it_waits(runs: Runs, undisturbed: Callable[[str], Path], tmp_path: Path) -> None:
    """After a look that could tell no rank from another, and before the one at 60% that decides."""
    expected, out = undisturbed("waits"), tmp_path / "out"
    early, late = (look["step"] for look in result_of(expected)["looks"])
    assert late == result_of(expected)["decision"]["step"] == later_step(STEPS)
    arguments = [*runs.arguments("waits", out), "--resume"]
    process = runs.begin(arguments, out)
    while process.is_alive() and not any(early < step < late for step in steps_saved(out)):
        time.sleep(0.005)
    process.kill()
    assert runs.end(process).code == -signal.SIGKILL
    found = load_checkpoint(out / "checkpoints")
    assert found is not None
    state = found[1]["session"]
    assert early < steps_saved(out)[-1] < late
    assert len(state["search"]["looks"]) == 1
    assert state["ranks"] == [16], "still wide"
    ended = runs(arguments, out)
    assert ended.code == 0, ended.said
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


def test_the_newest_checkpoint_beyond_a_million_steps(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, step, {"x": torch.zeros(1)}, {"step": step})
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found[1]["step"] == 1_000_000


def test_others_may_read_what_is_written_as_the_system_says(tmp_path: Path) -> None:
    """safetensors makes its files readable for their owner alone, whatever the umask."""
    before = os.umask(0o027)
    try:
        with written_whole(tmp_path / "adapter") as partial:
            save_file({"x": torch.zeros(1)}, partial / "adapter_model.safetensors")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert (tmp_path / "adapter/adapter_model.safetensors").stat().st_mode & 0o777 == 0o640


def test_killed_while_finishing(runs: Runs, undisturbed: Callable[[str], Path], tmp_path: Path) -> None:
    """The training is done, an adapter of an earlier attempt is there; writing the result is cut off, twice."""
    expected = undisturbed("shrink")
    out = as_of(expected, tmp_path / "out")
    arguments = [*runs.arguments("shrink", out), "--resume"]
    for die_at in (12, 30):
        assert runs(arguments, out, die_at).code == -signal.SIGKILL
        assert not (out / "result.json").exists()
    assert runs(arguments, out).code == 0
    same(out, expected)


def printed_command(said: str) -> list[str]:
    lines = said.splitlines()
    assert lines[-2] == "Stopped and saved. Go on with:", said
    command = shlex.split(lines[-1])
    assert command[0] == "rankrace"
    return command[1:]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ctrl_c_saves_and_prints_the_command_that_goes_on(
    strategy: str, runs: Runs, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "a name with spaces"
    stopped = runs(runs.arguments(strategy, out), out, die_at=20, by=signal.SIGINT)
    assert stopped.code == 130
    assert steps_saved(out)[-1] % SAVE_EVERY, "saved at a regular time only"
    assert runs(printed_command(stopped.said), out).code == 0
    same(out, undisturbed(strategy))


def interrupted_twice(at: int) -> Callable[[Trainer, Any], torch.Tensor]:
    """A step during which a person presses Ctrl-C twice."""
    take_step = Trainer.take_step

    def step(trainer: Trainer, batch: Any) -> torch.Tensor:
        if trainer.step == at:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(trainer, batch)

    return step


@pytest.mark.parametrize(
    ("at", "said"),
    [
        (0, "Stopped before anything was saved. Begin again with:"),
        (1, "Stopped before anything was saved. Begin again with:"),
        (2, "Stopped and saved. Go on with:"),
        (3, "Stopped at once; what came after step 2 is lost. Go on from there with:"),
    ],
)
def test_a_second_ctrl_c_says_what_was_saved(
    at: int, said: str, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SAVE_EVERY == 2
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", interrupted_twice(at))
        stopped = rankrace(*runs.arguments("shrink", out))
    assert stopped.code == 130
    assert stopped.err.splitlines()[-2] == said
    command = shlex.split(stopped.err.splitlines()[-1])[1:]
    ended = rankrace(*command, "--save-every", STEPS)
    assert ended.code == 0, ended.err
    assert ("Resumed after step" in ended.err) == (at >= SAVE_EVERY)


def test_ctrl_c_while_finishing_prints_the_command_too(
    runs: Runs, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    out = as_of(undisturbed("shrink"), tmp_path / "out")
    stopped = runs([*runs.arguments("shrink", out), "--resume"], out, die_at="README.md", by=signal.SIGINT)
    assert stopped.code == 130
    assert not (out / "result.json").exists()
    assert runs(printed_command(stopped.said), out).code == 0
    same(out, undisturbed("shrink"))


def test_ctrl_c_at_a_real_command_line(runs: Runs, undisturbed: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "rankrace.cli", *runs.arguments("shrink", out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + LIMIT_S
    while process.poll() is None and not steps_saved(out) and time.monotonic() < limit:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130, said
    assert steps_saved(out)[-1] < STEPS
    assert runs(printed_command(said), out).code == 0
    same(out, undisturbed("shrink"))


def test_a_broken_checkpoint_is_said_and_the_one_before_it_will_do(
    runs: Runs, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    expected = undisturbed("shrink")
    out = as_of(expected, tmp_path / "out")
    newest = out / "checkpoints" / f"step-{STEPS:06d}"
    os.truncate(newest / "tensors.safetensors", 1000)
    arguments = [*runs.arguments("shrink", out), "--resume"]
    refused = runs(arguments, out)
    assert refused.code == 2
    assert f"error: the checkpoint {newest} cannot be read" in refused.said
    assert "remove that folder to go on from the one before" in refused.said
    shutil.rmtree(newest)
    assert runs(arguments, out).code == 0
    same(out, expected)


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


@pytest.mark.parametrize(
    "damage",
    [
        cut("tensors.safetensors", 0),
        cut("tensors.safetensors", 7),
        cut("tensors.safetensors", 90),
        lambda folder: (folder / "tensors.safetensors").unlink(),
        lambda folder: (folder / "tensors.safetensors").write_bytes(b"\xff" * 200),
        cut("state.json", 0),
        cut("state.json", 5),
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: (folder / "state.json").write_bytes(b"\xff" * 20),
    ],
)
def test_every_damage_to_a_checkpoint_gives_a_clear_error(damage: Callable[[Path], None], tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"x": torch.ones(3)}, {"step": step})
    damage(tmp_path / "step-000002")
    with pytest.raises(RankraceError, match="step-000002 cannot be read"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--seed", "5"], "seed: 0 there, 5 now"),
        (["--strategy", "grid"], "strategy: shrink there, grid now"),
        (["--lr", "1e-3"], "lr: 0.01 there, 0.001 now"),
    ],
)
def test_a_changed_option_is_refused(
    changed: list[str], named: str, runs: Runs, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    out = as_of(undisturbed("shrink"), tmp_path / "out")
    before = contents(out)
    refused = runs([*runs.arguments("shrink", out), *changed, "--resume"], out)
    assert refused.code == 2
    assert named in refused.said
    assert contents(out) == before


def test_another_run_in_the_folder_is_refused_without_resume(
    runs: Runs, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    out = as_of(undisturbed("shrink"), tmp_path / "out")
    before = contents(out)
    refused = runs(runs.arguments("shrink", out), out)
    assert refused.code == 2
    assert "already holds a run" in refused.said
    assert contents(out) == before


def test_other_rows_are_refused(runs: Runs, tmp_path: Path) -> None:
    out, data = tmp_path / "out", shutil.copy(runs.data, tmp_path)
    arguments = [*runs.arguments("shrink", out), "--data", data, "--resume"]
    assert runs(arguments, out, die_at=30).code == -signal.SIGKILL
    with open(data, "a", encoding="utf-8") as rows:
        rows.write('\n{"prompt": "9 plus 9 is", "completion": " 18"}')
    refused = runs(arguments, out)
    assert refused.code == 2
    assert "are not those that this run was started with" in refused.said


def test_options_of_the_machine_may_change_half_way() -> None:
    started = RunConfig(model="m", data="d", out=Path("a"), device="cuda:0", micro_tokens=64, save_every=5, seed=3)
    plain = RunConfig(model="m", data="d", out=Path("b"), resume=True)
    assert continued(started, plain) == started.model_copy(update={"out": Path("b"), "resume": True})
    smaller = plain.model_copy(update={"micro_tokens": 32, "device": "cpu", "save_every": 1})
    assert continued(started, smaller) == started.model_copy(
        update={"out": Path("b"), "resume": True, "micro_tokens": 32, "device": "cpu", "save_every": 1}
    )


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file of a folder, and when it was written."""
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def test_a_finished_run_says_so_and_stays_as_it_is(runs: Runs, undisturbed: Callable[[str], Path]) -> None:
    out = undisturbed("shrink")
    before = contents(out)
    ended = runs([*runs.arguments("shrink", out), "--resume"], out)
    assert ended.code == 0
    assert "This run is finished" in ended.said
    assert contents(out) == before


def test_a_run_needs_no_main_thread() -> None:
    """Signals are the main thread's; elsewhere a run is not interrupted, and works."""
    asked: list[bool] = []

    def body() -> None:
        with Interrupts() as interrupts:
            asked.append(interrupts.asked)

    thread = Thread(target=body)
    thread.start()
    thread.join()
    assert asked == [False]

"""`rankrace bench` and `rankrace eval` as a person runs them, on a tiny model and a few rows of real tasks."""

import csv
import fcntl
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from commandline import Ran, assert_refused, rankrace
from rankrace.bench import local, render
from rankrace.bench.experiment import Experiment, Job, config_of, differences, read_experiment, settings_of
from rankrace.bench.job import Stopped, perform
from rankrace.bench.local import Slot, Work, finished, free_slot, gpus_of, has_room, sight_of
from rankrace.bench.paired import Difference, difference, t_975
from rankrace.bench.ray import run_ray
from rankrace.bench.record import Record, provenance
from rankrace.bench.store import Store, due, outdated
from rankrace.bench.table import Table, build, t_half_width
from rankrace.errors import RankraceError
from rankrace.tasks import TASKS, Splits, find_task
from tinyfolder import tiny_bert, tiny_llama

ROOT = Path(__file__).parents[1]
RESULTS, EXPERIMENTS = ROOT / "results", sorted((ROOT / "experiments").glob("*.yaml"))
SMALL = {"max_steps": 3, "batch_size": 4, "train_max": 32, "validation_max": 16, "ranks": [2, 4], "max_length": 256}


@pytest.fixture(autouse=True)
def _data(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKRACE_DATA", str(data_root))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"), minilm)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"), smollm2)


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_the_experiments_here_can_be_read(file: Path) -> None:
    experiment = read_experiment(file)
    assert experiment.name == file.stem
    assert experiment.methods
    assert experiment.tasks


def written(folder: Path, model: Path, **values: Any) -> Path:
    path = folder / "grid.yaml"
    common = {**SMALL, **values.pop("common", {})}
    path.write_text(yaml.safe_dump({"model": str(model), "test_max": 8, "common": common, **values}))
    return path


def run(experiment: Path, *options: object) -> Ran:
    return rankrace("bench", "run", experiment, "--out", experiment.parent / "out", "--device", "cpu", *options)


def record(folder: Path, key: str) -> dict[str, Any]:
    return json.loads((folder / "out" / "runs" / f"{key}.json").read_text())


def test_a_grid_runs_fills_what_is_missing_and_becomes_a_table(tmp_path: Path, bert: Path) -> None:
    experiment = written(tmp_path, bert, methods=["full", "lora-r8", "shrink", "qlora-r16"], tasks=["rte", "cola"],
                         seeds=[0, 1], tuning={"scales": [0.5, 1]})  # fmt: skip
    ran = run(experiment, "--slots", 0)
    assert ran.code == 0, ran.err
    runs = tmp_path / "out" / "runs"
    keys = {path.stem for path in runs.iterdir()}
    tunings = {k for k in keys if k.endswith("--tuning")}
    assert len(tunings) == 2 * 4 * 2
    assert len(keys - tunings) == 2 * 4 * 2
    assert "failed: qlora-r16 needs a GPU" in ran.err

    for method in ("full", "lora-r8", "shrink"):
        tuned = [record(tmp_path, f"rte--{method}--seed0--lr{s}--tuning") for s in ("0.5", "1")]
        best = min(tuned, key=lambda r: r["validation_loss"])
        assert all(r["metrics"] == {} and r["rows"] == [] for r in tuned), "the test part chose something"
        final = record(tmp_path, f"rte--{method}--seed0--lr{best['scale']:g}")
        assert final["validation_loss"] == best["validation_loss"], "the run for the table is the tuned one"
        assert final["time"]["steps_s"] == best["time"]["steps_s"], "it was not trained twice"
        assert len(final["rows"]) == 8
        assert 0 <= final["data"]["test_truncated"] <= 8
        assert set(final["versions"]) >= {"torch", "transformers", "peft", "python"}
        assert len(final["data"]["sha256"]) == 64
        assert final["data"]["sha256"] == tuned[0]["data"]["sha256"]
    assert not list((tmp_path / "out" / "work").glob("rte--*"))

    index = sqlite3.connect(tmp_path / "out" / "index.sqlite")
    assert index.execute("select count(*) from runs where status = 'failed'").fetchone() == (8,)
    index.close()

    before = {path.name: path.stat().st_mtime_ns for path in runs.iterdir()}
    gone = runs / "cola--full--seed1--lr1.json"
    gone = gone if gone.exists() else runs / "cola--full--seed1--lr0.5.json"
    gone.unlink()
    half = runs / f"rte--lora-r8--seed1--lr{best_scale(tmp_path, 'rte', 'lora-r8'):g}.json"
    half.write_text(half.read_text()[:200])
    again = run(experiment, "--slots", 0)
    assert "2 runs now" in again.out
    assert "Set aside" in again.err
    changed = {p.name for p in runs.glob("*.json") if before.get(p.name) != p.stat().st_mtime_ns}
    assert changed == {gone.name, half.name}
    assert half.with_suffix(".json.broken").exists()

    table = rankrace("bench", "table", tmp_path / "out")
    assert table.code == 0, table.err
    assert "rte accuracy" in table.out
    assert "cola matthews" in table.out
    assert "**" in table.out
    with (tmp_path / "out" / "table.csv").open() as stream:
        lines = {(row["method"], row["task"]): row for row in csv.DictReader(stream)}
    seeds = [record(tmp_path, p.stem) for p in runs.glob("rte--full--seed?--lr*.json") if "tuning" not in p.stem]
    accuracy = [r["metrics"]["accuracy"] for r in seeds]
    assert float(lines["full", "rte"]["mean"]) == pytest.approx(sum(accuracy) / 2)
    assert {p.name for p in (tmp_path / "out").glob("table.*")} == {
        "table.md",
        "table.tex",
        "table.csv",
        "table.html",
    }
    assert (tmp_path / "out" / "quality-time.svg").read_text().startswith("<svg")

    older = json.loads(half.read_text())  # of a version with another default, and without one of the options
    older["config"] |= {"weight_decay": 0.5}
    del older["config"]["penalty"]
    half.write_text(json.dumps(older))
    assert_refused(run(experiment), "other settings", "(weight_decay: 0.5 there, 0.0 now)")

    older["config"] |= {"weight_decay": 0.0, "rule": "one_se"}  # which no method reads that chooses no rank
    half.write_text(json.dumps(older))
    assert run(experiment).code == 0

    other = written(tmp_path, bert, methods=["full"], tasks=["rte"], common={"batch_size": 8})
    assert_refused(run(other), "other settings", "batch_size: 4 there, 8 now")


def test_a_record_of_other_defaults(tmp_path: Path) -> None:
    """What a method does not read counts not; and the old default can be put back, whoever has it in his settings."""
    experiment = Experiment(name="x", model="m", methods=("lora-r8", "shrink"), tasks=("rte",))
    pinned = experiment.model_copy(update={"common": {"rule": "one_se", "ranks": [2, 4]}})
    for method in ("lora-r8", "shrink"):
        job = Job(method=method, task="rte", seed=0, scale=1.0, tuning=False)
        old = (
            config_of(experiment, job, tmp_path, "cpu").model_copy(update={"rule": "one_se"}).model_dump(mode="json")
        )
        given = settings_of(experiment, job)
        chooses = method == "shrink"
        assert differences(experiment, job, given, old) == ({"rule": ("one_se", "auto")} if chooses else {})
        assert differences(pinned, job, given, old).keys() == ({"ranks"} if chooses else set())
        new = config_of(pinned, job, tmp_path, "cpu").model_dump(mode="json")
        assert differences(pinned, job, settings_of(pinned, job), new) == {}
        assert differences(experiment, job, settings_of(pinned, job), new).keys() == (
            {"rule", "ranks"} if chooses else set()
        )
        assert differences(experiment, job, given | {"test_max": 5}, old)["test_max"] == (5, None)
        assert differences(experiment, job, given, {}) == {}, "a run that failed knows no defaults"


def best_scale(folder: Path, task: str, method: str) -> float:
    tuned = [record(folder, f"{task}--{method}--seed0--lr{s}--tuning") for s in ("0.5", "1")]
    return min(tuned, key=lambda r: r["validation_loss"])["scale"]


def test_generated_answers_chosen_letters_and_runs_in_processes_of_their_own(tmp_path: Path, llama: Path) -> None:
    experiment = written(tmp_path, llama, methods=["base", "lora-r8"], tasks=["squad2", "medqa"], test_max=4)
    ran = run(experiment, "--slots", 2)
    assert ran.code == 0, ran.err
    assert "4 runs now, 0 of them failed" in ran.out, ran.err
    squad, medqa = (record(tmp_path, f"{task}--lora-r8--seed0--lr1") for task in ("squad2", "medqa"))
    assert set(squad["metrics"]) == {"f1", "exact"}
    assert set(medqa["metrics"]) == {"accuracy", "generated_accuracy"}
    assert squad["peak_bytes"] > 2**20
    assert record(tmp_path, "squad2--base--seed0--lr1")["parameters"] == 0


def test_rows_of_stsb_tell_methods_apart(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its metrics are of the whole set: what a record keeps of a row is how close the number is."""
    train, validation, test = (
        [{"prompt": f"{part} {n}:", "completion": f" {n}.0", "answers": [f"{n}.0"]} for n in range(6)]
        for part in ("train", "validation", "test")
    )
    splits = Splits(train=train, validation=validation, test=test, how="made up")
    monkeypatch.setitem(TASKS, "stsb", replace(TASKS["stsb"], read=lambda *_: splits))
    monkeypatch.setattr("rankrace.bench.job.predict", lambda *_, **__: ["0.0", "1.0", "2.0", "3.0", "4.0", "0.0"])
    ran = run(written(tmp_path, llama, methods=["base"], tasks=["stsb"]), "--slots", 0)
    assert "0 of them failed" in ran.out, ran.err
    assert record(tmp_path, "stsb--base--seed0--lr1")["rows"] == [1, 1, 1, 1, 1, 0]


def test_an_empty_answer_to_every_question_of_squad2_scores_54_7(data_root: Path) -> None:
    rows = find_task("squad2").splits(data_root, 0).test
    assert find_task("squad2").score([""] * len(rows), rows)["f1"] == pytest.approx(54.7, abs=0.05)


JOB = Job(method="adalora-r8", task="sst2", seed=0, scale=1.0, tuning=False)


def test_a_run_that_is_killed_goes_on_from_its_checkpoint(tmp_path: Path, llama: Path) -> None:
    """A process of its own, killed in mid-run; this one then ends where one undisturbed does."""
    common = {"max_steps": 30, "epochs": 30}
    experiment = written(tmp_path, llama, methods=["adalora-r8"], tasks=["sst2"], common=common)
    code = (
        "from pathlib import Path; from rankrace.bench.experiment import Job, config_of, read_experiment;"
        "from rankrace.bench.job import perform;"
        f"perform(read_experiment(Path({str(experiment)!r})), {JOB!r}, Path({str(tmp_path / 'out')!r}), 'cpu', 0.0)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    checkpoints = tmp_path / "out" / "work" / "sst2--adalora-r8--seed0--lr1"
    wait_for(lambda: len(list(checkpoints.glob("step-*"))) > 1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = max(int(p.name[5:]) for p in checkpoints.glob("step-*"))
    assert 0 < reached < 30
    key = "sst2--adalora-r8--seed0--lr1"
    assert not (tmp_path / "out" / "runs" / f"{key}.json").exists()
    perform(read_experiment(experiment), JOB, tmp_path / "out", "cpu")
    resumed = record(tmp_path, key)
    assert resumed["steps"] == 30
    assert resumed["resumed_at"] >= reached
    (tmp_path / "whole").mkdir()
    perform(read_experiment(experiment), JOB, tmp_path / "whole" / "out", "cpu")
    assert resumed["validation_loss"] == pytest.approx(record(tmp_path / "whole", key)["validation_loss"], rel=1e-5)


def runner_of(
    experiment: Path, out: Path, slots: int, save_s: float = 0.0, then: str = "", **options: Any
) -> subprocess.Popen[str]:
    """`bench run` in a process of its own, and then something else; by default it saves after every step."""
    code = (
        "from pathlib import Path; from rankrace.bench.run import run_experiment;"
        f"run_experiment(Path({str(experiment)!r}), Path({str(out)!r}), slots={slots}, device='cpu', save_s={save_s})"
        f"\n{then}"
    )
    return subprocess.Popen([sys.executable, "-c", code], text=True, **options)


@pytest.mark.parametrize("slots", [0, 2])
def test_a_runner_that_is_terminated_saves_its_runs_and_leaves_none(tmp_path: Path, bert: Path, slots: int) -> None:
    common = {"max_steps": 100_000, "epochs": 100_000}
    experiment = written(tmp_path, bert, methods=["full", "lora-r8"], tasks=["rte"], common=common)
    out = tmp_path / "out"
    runner = runner_of(experiment, out, slots=slots, stderr=subprocess.PIPE)
    wait_for(lambda: len(list(out.glob("work/*"))) == max(1, slots))
    runner.send_signal(signal.SIGTERM)
    _, said = runner.communicate(timeout=60)
    assert "rankrace.interrupt.Interrupted: the same command again" in said
    assert not list((out / "runs").iterdir()), "what was stopped has not failed"
    reached = sorted(out.glob("work/*/step-*"))
    assert reached
    time.sleep(0.5)  # some hundred steps
    assert sorted(out.glob("work/*/step-*")) == reached, "a run goes on without its runner"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_terminal_that_interrupts_or_hangs_up_loses_nothing(
    tmp_path: Path, bert: Path, number: signal.Signals
) -> None:
    """It tells the runner and its processes at once, and the runner tells these again before their step is done: the
    run in hand is saved all the same, though no checkpoint is due."""
    slow = {"max_steps": 100_000, "epochs": 100_000, "batch_size": 1000, "train_max": 1000}
    experiment = written(tmp_path, bert, methods=["full"], tasks=["rte"], common=slow)
    out = tmp_path / "out"

    def newest() -> int:
        return max((int(p.name.partition("-")[2]) for p in out.glob("work/*/step-*")), default=0)

    runner = runner_of(experiment, out, slots=1, save_s=5.0, start_new_session=True, stderr=subprocess.PIPE)
    wait_for(newest)
    saved = newest()
    os.killpg(runner.pid, number)
    _, said = runner.communicate(timeout=60)
    wait_for(lambda: newest() > saved)
    assert not list((out / "runs").iterdir()), "what was stopped has not failed"
    if number == signal.SIGINT:
        assert "rankrace.interrupt.Interrupted: the same command again" in said


def test_an_interrupt_before_the_first_run_is_one_too(tmp_path: Path, bert: Path) -> None:
    """While its process starts: the server that forks it does not die of it, either."""
    experiment = written(tmp_path, bert, methods=["full"], tasks=["rte"])
    out = tmp_path / "out"
    runner = runner_of(experiment, out, slots=1, start_new_session=True, stderr=subprocess.PIPE)
    wait_for((out / ".lock").exists)
    time.sleep(1.0)  # it loads the modules
    os.killpg(runner.pid, signal.SIGINT)
    _, said = runner.communicate(timeout=60)
    assert "rankrace.interrupt.Interrupted: the same command again" in said
    assert not list((out / "runs").iterdir())


def test_after_a_bench_the_processes_of_others_hear_interrupts(tmp_path: Path, bert: Path) -> None:
    """The server that forked the bench's is the whole program's."""
    experiment = written(tmp_path, bert, methods=["base"], tasks=["rte"])
    others = """
import multiprocessing, os, signal, time
sleeping = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(60,))
sleeping.start()
time.sleep(1)
os.kill(sleeping.pid, signal.SIGINT)
sleeping.join(20)
print("ended with", sleeping.exitcode)
sleeping.kill()
"""
    runner = runner_of(experiment, tmp_path / "out", slots=1, then=others, stdout=subprocess.PIPE)
    said, _ = runner.communicate(timeout=120)
    assert (tmp_path / "out/runs/rte--base--seed0--lr1.json").exists()
    assert "ended with 1" in said


def test_a_runner_that_is_killed_loses_only_the_runs_in_hand(tmp_path: Path, bert: Path) -> None:
    """SIGKILL: its processes end by themselves, the folder is not locked, and a run goes on from where it was."""
    endless = {"max_steps": 100_000, "epochs": 100_000}
    experiment = written(tmp_path, bert, methods=["base", "full"], tasks=["rte"], common=endless)
    out = tmp_path / "out"
    runner = runner_of(experiment, out, slots=1, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(out.glob("work/*/step-*"))) > 1)
    runner.kill()
    runner.wait()

    def newest() -> list[Path]:
        time.sleep(0.5)  # some hundred steps
        return sorted(out.glob("work/*/step-*"))

    wait_for(lambda: newest() == newest())
    assert [path.stem for path in (out / "runs").iterdir()] == ["rte--base--seed0--lr1"]
    again = run(experiment, "--methods", "base")
    assert again.code == 0, again.err
    assert "0 runs now" in again.out


def test_a_process_on_a_gpu_does_one_run_after_another_until_one_fails(tmp_path: Path, bert: Path) -> None:
    """On a CPU, where nothing of a run is left on a GPU either. An encoder fails on SQuAD. One that was killed
    while it was idle is replaced, too."""
    read = read_experiment(written(tmp_path, bert, methods=["base"], tasks=["rte", "squad2"], seeds=[0, 1]))
    (tmp_path / "out" / "runs").mkdir(parents=True)
    work = Work(experiment=read, folder=tmp_path / "out", device="cpu", save_s=60.0, sharing=2, threads=1)
    slot, context = Slot(gpu=0), multiprocessing.get_context("spawn")
    processes = []
    for task, seed in (("rte", 0), ("rte", 1), ("squad2", 0), ("rte", 0), ("rte", 1)):
        if len(processes) == 4:
            assert slot.process is not None
            slot.process.kill()
            slot.process.join()
        job = Job(method="base", task=task, seed=seed, scale=1.0, tuning=False)
        slot.begin(job, work, context)
        assert slot.process is not None
        processes.append(slot.process.pid)
        done: list[Record] = []
        wait_for(lambda: done.extend(finished(slot, work)) or done)  # noqa: B023
        assert (done[0]["key"], done[0]["slots"]) == (job.key, 2)
        assert done[0]["status"] == ("failed" if task == "squad2" else "done")
    assert len(set(processes[:3])) == 1
    assert len(set(processes)) == 3
    assert slot.process is not None
    os.kill(slot.process.pid or 0, signal.SIGSTOP)  # so that it cannot end before
    slot.begin(Job(method="base", task="rte", seed=0, scale=1.0, tuning=False), work, context)
    slot.process.kill()
    lost: list[Record] = []
    wait_for(lambda: lost.extend(finished(slot, work)) or lost)
    assert lost[0]["error"].startswith("the run's process was killed by signal 9 (out of memory?); see logs/rte--")
    assert record(tmp_path, "rte--base--seed0--lr1") == lost[0]
    assert slot.process is None


def test_slots_are_spread_over_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [gpus_of(name) for name in ("cpu", "auto", "cuda", "cuda:1")] == [[], [0, 1], [0, 1], [1]]
    slots = [Slot(gpu=i % 2) for i in range(5)]
    taken = []
    for _ in slots:
        free = free_slot(slots)
        assert free is not None
        free.job = JOB
        taken.append(free.gpu)
    assert sorted(taken[:2]) == sorted(taken[2:4]) == [0, 1]
    assert free_slot(slots) is None
    for slot in slots:
        slot.job = JOB if slot.gpu == 0 else None
    next_ = free_slot(slots)
    assert next_ is not None
    assert next_.gpu == 1


@pytest.mark.parametrize(("before", "seen"), [(None, "1"), ("3,GPU-5f", "GPU-5f")])
def test_a_process_sees_its_own_gpu(before: str | None, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its first import on: the variable is there when the process starts, and not for others."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before) if before else monkeypatch.delenv(
        "CUDA_VISIBLE_DEVICES", False
    )
    report = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    with sight_of(1):
        assert subprocess.check_output([sys.executable, "-c", report], text=True).strip() == seen
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before
    with sight_of(None):
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


def test_a_gpu_with_runs_takes_another_only_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda gpu: ((3 if gpu == 0 else 30) * 2**30, 80 * 2**30))
    slots = [Slot(gpu=0, job=JOB), Slot(gpu=1, job=JOB)]
    assert [has_room(gpu, 10.0, slots) for gpu in (0, 1)] == [False, True]
    assert has_room(0, 10.0, slots[1:]), "the first run says itself what is missing"
    assert has_room(0, 0.0, slots)
    assert not has_room(0, 0.0, slots, alone=True)
    slots = [Slot(gpu=0, job=JOB, alone=True), Slot(gpu=0), Slot(gpu=1, job=JOB), Slot(gpu=1, job=JOB), Slot(gpu=1)]
    assert free_slot(slots) is slots[-1], "the other GPU is taken, however few runs it has"


def test_a_run_that_found_no_memory_beside_others_goes_again_alone(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two slots on what is said to be one GPU; the runs' processes use the CPU. The first to end says that memory ran
    out, once; its record goes, and it runs again when nothing else does."""
    read = read_experiment(written(tmp_path, bert, methods=["base"], tasks=["rte"], seeds=[0, 1, 2]))
    store, done, began = Store(tmp_path / "out"), list[Record](), list[tuple[str, int]]()
    monkeypatch.setattr(local, "gpus_of", lambda _: [0])
    begin, ended = Slot.begin, list[Record]()

    def noted(slot: Slot, job: Job, work: Work, context: Any, *, alone: bool = False) -> None:
        began.append((job.key, alone))
        begin(slot, job, replace(work, device="cpu"), context, alone=alone)

    monkeypatch.setattr(Slot, "begin", noted)
    monkeypatch.setattr(local, "ran_out_of_memory", lambda record: ended.append(record) or len(ended) == 1)

    def upcoming(working: set[str]) -> list[Job]:
        tried = {one["key"] for one in done}
        return [job for job in due(read, {}, retry=False) if job.key not in working | tried]

    for one in local.run_processes(read, store, upcoming, "cuda", 60.0, 2, 0.0):
        done.append(one)
    keys = [job.key for job in due(read, {}, retry=False)]
    assert sorted(one["key"] for one in done) == sorted(keys)
    again = began[-1][0]
    assert [alone for _, alone in began] == [False, False, False, True]
    assert again == done[-1]["key"]
    assert [key for key, _ in began].count(again) == 2
    assert all(json.loads((tmp_path / "out" / "runs" / f"{key}.json").read_text()) for key in keys)


def test_all_methods_have_one_engine(tmp_path: Path, bert: Path) -> None:
    """Compiling, graphs and recomputation are never left to a method; where a run was made changes no settings."""
    read = read_experiment(written(tmp_path, bert, methods=["full"], tasks=["sst2"]))
    gpu, cpu = (config_of(read, JOB, tmp_path, device) for device in ("cuda", "cpu"))
    assert (gpu.compile, gpu.cuda_graphs, gpu.recompute) == ("off", "on", "off")
    assert (cpu.compile, cpu.cuda_graphs) == ("off", "off")
    auto = {"compile": "auto", "recompute": "auto", "cuda_graphs": "auto"}
    left = read.model_copy(update={"common": {**read.common, **auto}})
    assert config_of(left, JOB, tmp_path, "cuda") == gpu
    chosen = read.model_copy(update={"common": {"cuda_graphs": "off"}})
    assert config_of(chosen, JOB, tmp_path, "cuda").cuda_graphs == "off"


def test_a_rate_at_the_edge_is_gone_beyond(tmp_path: Path, bert: Path) -> None:
    """As long as it is best, and no further than asked; a method whose best is inside needs no more."""
    read = read_experiment(written(tmp_path, bert, methods=["full", "lora-r8", "lora-r16"], tasks=["rte"], seeds=[0],
                                   tuning={"scales": [0.5, 1.5, 4.5], "beyond": 2}))  # fmt: skip
    found: dict[str, Record] = {}

    def finish(method: str, losses: dict[float, float]) -> None:
        for scale, loss in losses.items():
            key = Job(method=method, task="rte", seed=0, scale=scale, tuning=True).key
            found[key] = {"status": "done", "scale": scale, "validation_loss": loss}

    def next_of(method: str) -> list[str]:
        return [
            job.training.rpartition("--lr")[2] + "t" * job.tuning for job in due(read, found) if job.method == method
        ]

    finish("full", {0.5: 0.3, 1.5: 0.4, 4.5: 0.5})
    finish("lora-r8", {0.5: 0.3, 1.5: 0.2, 4.5: 0.5})
    finish("lora-r16", {0.5: 0.3, 1.5: 0.2, 4.5: 0.1})
    assert [next_of(name) for name in ("full", "lora-r8", "lora-r16")] == [["0.17t"], ["1.5"], ["14t"]]
    finish("full", {0.17: 0.35})
    finish("lora-r16", {14.0: 0.05})
    assert [next_of(name) for name in ("full", "lora-r16")] == [["0.5"], ["44t"]]
    finish("lora-r16", {44.0: 0.01})
    assert next_of("lora-r16") == ["44"], "no further than asked"


def test_a_single_scale_is_used(tmp_path: Path, bert: Path) -> None:
    """Untuned; the base has no rate to scale."""
    read = read_experiment(written(tmp_path, bert, methods=["base", "full"], tasks=["rte"], tuning={"scales": [0.5]}))
    assert [job.key for job in due(read, {})] == ["rte--base--seed0--lr1", "rte--full--seed0--lr0.5"]


def test_a_sitting_ends_with_whole_columns(tmp_path: Path, bert: Path) -> None:
    """Task by task: the tuning, then all methods seed by seed. What waits for its tuning is not held up for."""
    read = read_experiment(written(tmp_path, bert, methods=["full", "lora-r8"], tasks=["rte", "cola"], seeds=[0, 1],
                                   tuning={"scales": [1, 2]}))  # fmt: skip
    tunings = ["full--seed0--lr1--tuning", "full--seed0--lr2--tuning", "lora-r8--seed0--lr1--tuning",
               "lora-r8--seed0--lr2--tuning"]  # fmt: skip
    assert [job.key for job in due(read, {})] == [f"{task}--{run}" for task in ("rte", "cola") for run in tunings]
    losses = {1.0: 0.6, 2.0: 0.5}
    tuned: dict[str, Record] = {
        f"rte--{run}": {"status": "done", "scale": scale, "validation_loss": losses[scale]}
        for run, scale in zip(tunings, (1.0, 2.0, 1.0, 2.0), strict=True)
    }
    finals = [
        "rte--full--seed0--lr2",
        "rte--lora-r8--seed0--lr2",
        "rte--full--seed1--lr2",
        "rte--lora-r8--seed1--lr2",
    ]
    assert [job.key for job in due(read, tuned)][:4] == finals
    del tuned["rte--full--seed0--lr2--tuning"]
    assert [job.key for job in due(read, tuned)][:3] == ["rte--full--seed0--lr2--tuning", finals[1], finals[3]]


def test_records_made_elsewhere_are_merged_by_unpacking(tmp_path: Path, bert: Path) -> None:
    """Two machines, a half of the grid each: the archive of one into the folder of the other."""
    experiment = written(tmp_path, bert, methods=["base", "full"], tasks=["rte"])
    there = tmp_path / "there"
    rankrace("bench", "run", experiment, "--out", there, "--device", "cpu", "--slots", 0, "--methods", "full")
    ran = run(experiment, "--slots", 0, "--methods", "base")
    assert ran.code == 0, ran.err
    subprocess.run(["tar", "-czf", tmp_path / "records.tgz", "-C", there, "runs"], check=True)
    subprocess.run(["tar", "-xzf", tmp_path / "records.tgz", "-C", tmp_path / "out"], check=True)
    assert "0 runs now" in run(experiment, "--slots", 0).out
    table = rankrace("bench", "table", tmp_path / "out")
    assert "| base |" in table.out
    assert "| full |" in table.out
    index = sqlite3.connect(tmp_path / "out" / "index.sqlite")
    assert index.execute("select count(*) from runs").fetchone() == (2,)
    index.close()


def test_a_checkpoint_of_other_settings_is_no_use(tmp_path: Path, bert: Path) -> None:
    """A run was stopped, then the experiment changed: its checkpoint is not one of the new run."""
    job = Job(method="full", task="rte", seed=0, scale=1.0, tuning=True)
    out = tmp_path / "out"
    perform(read_experiment(written(tmp_path, bert, methods=["full"], tasks=["rte"])), job, out, "cpu", slots=3)
    (out / "runs" / f"{job.key}.json").unlink()
    other = read_experiment(written(tmp_path, bert, methods=["full"], tasks=["rte"], common={"max_steps": 2}))
    fresh = perform(other, job, out, "cpu")
    assert (fresh["resumed_at"], fresh["steps"], fresh["slots"]) == (0, 2, 1)
    same = perform(other, job, out, "cpu", slots=2)
    assert (same["resumed_at"], same["slots"]) == (2, 2), "the time is that of a run in company"


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_ray_worker_ended_in_mid_run_is_started_again_and_resumes(
    tmp_path: Path, llama: Path, number: signal.Signals
) -> None:
    """On a real local cluster; a process of its own, since Ray changes the one that starts it. SIGTERM: preempted."""
    experiment = written(tmp_path, llama, methods=["lora-r8"], tasks=["sst2"], common={"max_steps": 40, "epochs": 40})
    out = tmp_path / "out"
    code = (
        "from pathlib import Path; from rankrace.bench.run import run_experiment;"
        f"print(run_experiment(Path({str(experiment)!r}), Path({str(out)!r}), runner='ray', "
        "device='cpu', save_s=0.0))"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    key = "sst2--lora-r8--seed0--lr1"
    wait_for(lambda: len(list((out / "work" / key).glob("step-*"))) > 1)
    os.kill(ray_worker(driver.pid), number)
    printed, _ = driver.communicate(timeout=120)
    assert "(1, 0, 0)" in printed
    done = record(tmp_path, key)
    assert (done["status"], done["steps"]) == ("done", 40)
    assert done["resumed_at"] > 0


def test_what_ray_says_of_a_run_is_told_apart(tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is no lost worker, a stopped run goes again, and an error of Ray's own ends the sitting."""
    errors = import_module("ray").exceptions

    def raised(cause: Exception) -> Exception:
        return errors.RayTaskError("perform", "its traceback", cause).as_instanceof_cause()

    def get(_: object) -> None:
        raise said.pop(0)

    full = raised(OSError(28, "No space left on device"))
    said = [raised(Stopped()), full, errors.WorkerCrashedError(), errors.RaySystemError("no scheduler")]
    cluster = SimpleNamespace(
        exceptions=errors,
        init=lambda **_: None,
        cluster_resources=lambda: {"CPU": 2.0},
        shutdown=lambda: None,
        remote=lambda _: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda experiment, job, *_: job)),
        wait=lambda jobs, **_: (jobs[:1], []),
        get=get,
    )
    monkeypatch.setattr("rankrace.bench.ray.import_module", lambda _: cluster)
    read = read_experiment(written(tmp_path, bert, methods=["base"], tasks=["rte"], seeds=[0, 1, 2]))
    out = tmp_path / "out"
    (out / "runs").mkdir(parents=True)

    def upcoming(working: set[str]) -> list[Job]:
        return [job for job in due(read, Store(out).records()) if job.key not in working]

    with pytest.raises(errors.RaySystemError):
        list(run_ray(read, Store(out), upcoming, "cpu", 60.0, 1))
    with pytest.raises(RankraceError, match="no node of the Ray cluster has a GPU"):
        list(run_ray(read, Store(out), upcoming, "cuda:1", 60.0, 1))
    found = Store(out).records()
    assert {key: one["error"].split(":")[0] for key, one in found.items()} == {
        "rte--base--seed0--lr1": "OSError",
        "rte--base--seed1--lr1": "the run's worker was lost 4 times",
    }
    assert "No space left" in found["rte--base--seed0--lr1"]["error"]


def ray_worker(driver: int) -> int:
    """The process of the driver's one run: Ray gives its workers the names of their tasks."""
    named = [p for p in Path("/proc").glob("[0-9]*") if said(p / "cmdline").startswith(b"ray::perform")]
    found = [int(p.name) for p in named if driver in ancestors(int(p.name))]
    assert len(found) == 1
    return found[0]


def ancestors(process: int) -> Iterator[int]:
    while process > 1:
        fields = said(Path(f"/proc/{process}/stat")).rpartition(b")")[2].split()
        process = int(fields[1]) if fields else 0
        yield process


def said(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process has just ended
        return b""


# --- bad input


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"methods": ["lora8"], "tasks": ["rte"]}, ("'lora8'", "'lora-r8'")),
        ({"methods": ["full"], "tasks": ["squad"]}, ("'squad'", "'squad2'")),
        ({"methods": ["full"], "tasks": ["rte"], "sedes": [0]}, ("'sedes'", "'seeds'")),
        ({"methods": ["full"], "tasks": ["rte"], "common": {"epohcs": 1}}, ("'epohcs'", "'epochs'")),
        ({"methods": ["full"], "tasks": ["rte"], "common": {"lr": 1}}, ("'lr'", "tuned")),
        ({"methods": ["full"], "tasks": ["rte"], "test_max": 0}, ("test_max",)),
        ({"methods": [], "tasks": ["rte"]}, ("methods",)),
        ({"methods": "full", "tasks": ["rte"]}, ("methods", "a list is wanted, [full]")),
        ({"methods": ["full", "full"], "tasks": ["rte"]}, ("methods", "full is there twice")),
        ({"methods": ["full"], "tasks": ["rte", "RTE"]}, ("tasks", "rte is there twice")),
        ({"methods": ["full"], "tasks": ["rte"], "seeds": [0, 1, 0]}, ("seeds", "0 is there twice")),
        ({"methods": ["full"], "tasks": ["rte"], "tuning": {"scales": [1, 2, 1.0]}}, ("scales", "1 is there twice")),
    ],
)
def test_a_bad_experiment_is_refused(
    tmp_path: Path, bert: Path, values: dict[str, Any], words: tuple[str, ...]
) -> None:
    experiment = written(tmp_path, bert, **values)
    assert_refused(run(experiment), *words, within=tmp_path, left=["grid.yaml"])


def test_a_part_of_the_grid(tmp_path: Path, bert: Path) -> None:
    experiment = written(tmp_path, bert, methods=["base", "full"], tasks=["RTE", "cola"], seeds=[0, 3])
    ran = run(experiment, "--slots", 0, "--methods", "base", "--tasks", "rte", "--seeds", "3")
    assert ran.code == 0, ran.err
    assert [path.stem for path in (tmp_path / "out" / "runs").iterdir()] == ["rte--base--seed3--lr1"]
    assert_refused(run(experiment, "--tasks", "sst2"), "'sst2'", "rte, cola")
    assert_refused(run(experiment, "--seeds", "0,x"), "'x'", "0, 3")


def test_no_experiment_and_no_such_runner(tmp_path: Path) -> None:
    assert_refused(rankrace("bench", "run", tmp_path / "none.yaml"), "none.yaml")
    assert_refused(rankrace("bench", "run", tmp_path / "none.yaml", "--runner", "rya"), "'ray'")


def test_two_runners_on_one_folder(tmp_path: Path, bert: Path) -> None:
    experiment = written(tmp_path, bert, methods=["full"], tasks=["rte"])
    (tmp_path / "out").mkdir()
    handle = os.open(tmp_path / "out" / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert_refused(run(experiment), "another runner")
    os.close(handle)


def test_failures_are_recorded_and_the_rest_goes_on(tmp_path: Path, bert: Path) -> None:
    """An encoder cannot answer SQuAD; a learning rate of 1e30 diverges; neither stops the others."""
    experiment = written(tmp_path, bert, methods=["full", "lora-r8"], tasks=["squad2", "rte"],
                         tuning={"scales": [1.0e+30, 1]})  # fmt: skip
    ran = run(experiment, "--slots", 0)
    assert ran.code == 0, ran.err
    assert "encoder" in record(tmp_path, "squad2--full--seed0--lr1")["error"]
    diverged = record(tmp_path, "rte--full--seed0--lr1e+30--tuning")
    assert diverged["status"] == "failed"
    assert "diverged" in diverged["error"]
    assert record(tmp_path, "rte--full--seed0--lr1")["status"] == "done"
    assert "0 runs now" in run(experiment, "--slots", 0).out
    assert "Failed: squad2--full" in rankrace("bench", "table", tmp_path / "out").out


def test_out_of_memory_is_recorded(tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from rankrace.training.loop import Trainer

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Trainer, "take_step", full)
    ran = run(written(tmp_path, bert, methods=["full", "base"], tasks=["rte"]), "--slots", 0)
    assert "2 runs now, 1 of them failed" in ran.out
    assert "out of memory" in record(tmp_path, "rte--full--seed0--lr1")["error"]


def test_a_metric_that_is_no_number_is_a_failure(tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankrace.tasks.task import Task

    monkeypatch.setattr(Task, "score", lambda *_: {"accuracy": math.nan})
    ran = run(written(tmp_path, bert, methods=["base"], tasks=["rte"]), "--slots", 0)
    assert "1 of them failed" in ran.out
    assert "accuracy is not a number" in record(tmp_path, "rte--base--seed0--lr1")["error"]


def test_a_table_of_nothing(tmp_path: Path) -> None:
    assert_refused(rankrace("bench", "table", tmp_path / "nowhere"), "nowhere", "is no results folder", "--out")
    (tmp_path / "runs").mkdir()
    assert_refused(rankrace("bench", "table", tmp_path), "no finished run")


def test_a_table_leaves_what_is_no_record_where_it_is(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    for path in (RESULTS / "minilm" / "runs").glob("mrpc--full--*.json"):
        shutil.copy(path, runs)
    (runs / "mine.json").write_text('{"my": "data"}')
    ran = rankrace("bench", "table", tmp_path)
    assert ran.code == 0, ran.err
    assert f"Left out: {runs / 'mine.json'} is no whole record" in ran.err
    assert (runs / "mine.json").read_text() == '{"my": "data"}'


# --- the table's figures


def made(
    method: str, seed: int, rows: list[float], documents: list[int] | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "key": f"{method}{seed}", "experiment": "grid", "method": method, "task": "rte", "seed": seed, "scale": 1.0,
        "tuning": False, "status": "done", "error": None, "validation_loss": 1.0,
        "metrics": {"accuracy": 100 * sum(rows) / max(1, len(rows))}, "rows": rows, "documents": documents,
        "parameters": 10, "rank": None, "peak_bytes": 2**30,
        "time": {"train_s": 2.0, "search_s": 0.5}, "baselines": {"empty": {"accuracy": 0.0}}, "slots": 1,
        "hardware": {"device": "cpu"}, "versions": {"torch": "2"}, "commit": "c", "dirty": False,
        "settings": {"model": "m", "test_max": None}, "notes": [],
        "data": {"train_examples": 50, "how": "by hand", "test_sha256": "t"}, **more,
    }  # fmt: skip


def table_of(runs: list[Record]) -> Table:
    return build({r["key"]: r for r in runs})


RIGHT = [1.0] * 90 + [0.0] * 10


def test_the_forms_of_a_table() -> None:
    """Of records that were really made: LaTeX of whole rows, a page with its notes, figures of two costs."""
    records = Store(RESULTS / "minilm").records()
    table = build(records)
    names, tex = render.header(table), render.latex(table)
    rows = tex.split(r"\midrule" + "\n")[1].split("\n" + r"\bottomrule")[0].splitlines()
    assert len(rows) == len(table.rows) + len(table.baselines)
    for row in rows:
        assert row.endswith(r" \\")
        assert len(re.findall(r"(?<!\\)&", row)) == len(names) - 1
        assert not re.search(r"(?<!\\)[%#_]", row)
    best = next(row.cells["mrpc"] for row in table.rows if row.cells["mrpc"].best)
    assert rf"\textbf{{{best.mean:.2f}}} $\pm$ {best.half_width:.2f}" in tex
    full = next(row for row in table.rows if row.method == "full")
    mean = sum(cell.mean for cell in full.cells.values()) / 2
    # GLUE counts a task with two metrics by their mean.
    final = [r for key, r in records.items() if not r["tuning"] and key not in outdated(records)]
    mrpc = [r["metrics"] for r in final if (r["method"], r["task"]) == ("full", "mrpc")]
    glue = (sum(m["f1"] + m["accuracy"] for m in mrpc) / 2 / len(mrpc) + full.cells["rte"].mean) / 2
    assert f"{glue:.2f}" == rows[1].split(" & ")[names.index("GLUE")]
    page = render.html(table, ["<svg></svg>"])
    assert all(escape(note) in page for note in [*table.notes, *table.claims])
    assert page.count("<tr>") == 1 + len(rows)
    assert page.count("<svg") == 1
    for cost, of in (("parameters", lambda row: row.parameters), ("time", lambda row: row.train_s)):
        found = {name: (x, y) for x, y, name in render.points_of(table, cost)}
        assert set(found) == {row.method for row in table.rows if row.parameters}
        assert found["full"] == (of(full), mean)


def test_names_in_a_figure_cover_no_other_name_and_no_point() -> None:
    close = [
        (100.0, 100.0, "lora-r16"),
        (104.0, 103.0, "rslora-r16"),
        (98.0, 110.0, "shrink"),
        (300.0, 100.0, "full"),
    ]
    found = render.places(close, font=12.0)
    assert found[3] == render.PLACES[0], "one that is alone stands where it always would"
    assert len(set(found[:3])) == 3

    def box(x: float, y: float, name: str, right: int, up: int, end: str) -> tuple[float, float, float, float]:
        left = x + right - (0.58 * 12 * len(name) if end == "right" else 0)
        return left, y + up, left + 0.58 * 12 * len(name), y + up + 12

    boxes = [box(*point, *place) for point, place in zip(close, found, strict=True)]
    assert not any(render.overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    for i, name in enumerate(boxes):
        others = [(x, y, x, y) for k, (x, y, _) in enumerate(close) if k != i]
        assert not any(render.overlap(name, point) for point in others)


def test_intervals_best_and_paired_ties() -> None:
    """100 rows: B misses one row that A has (a tie: se 1), C misses 20 of them. All seeds alike."""
    runs = [made("full", s, RIGHT) for s in (0, 1, 2)]
    runs += [made("lora-r8", s, [0.0, *RIGHT[1:]]) for s in (0, 1, 2)]
    runs += [made("shrink", s, [0.0] * 20 + RIGHT[20:]) for s in (0, 1, 2)]
    runs += [made("houlsby", s, RIGHT) for s in (0, 1, 2)]
    cells = {row.method: row.cells["rte"] for row in table_of(runs).rows}
    assert [method for method, cell in cells.items() if cell.best] == ["full", "houlsby"]
    assert (cells["lora-r8"].behind.mean, cells["lora-r8"].tie) == (pytest.approx(1.0), True)
    assert cells["lora-r8"].behind.se == pytest.approx(1.0)
    assert (cells["shrink"].behind.mean, cells["shrink"].tie) == (pytest.approx(20.0), False)


def test_few_documents_need_a_larger_difference() -> None:
    """d = 50 ± 16.7 by 7 documents: 3.0 errors. With 3 documents of the same: t is 4.30, and it is a tie."""
    for documents, tie in ((7, False), (3, True)):
        found = Difference(mean=50.0, se=16.7, documents=documents)
        assert found.tie is tie
    assert t_975(1) == 12.706
    assert t_975(10) == 2.228
    assert t_975(20) == pytest.approx(2.086, abs=0.01)
    assert t_975(1000) == pytest.approx(1.962, abs=0.001)


def test_a_difference_counts_seeds_and_documents() -> None:
    """By hand. Rows all alike, seeds 2, 4 and 9 points apart: se = s/√n of these, 3.606/√3. Four rows in two
    documents, right and wrong as documents: d = 50, residuals ±1 of 2 clusters: √(2/1·(1 + 1))/4 = 0.5. No common
    seed: nothing is known.
    """
    flat = [made("full", s, [0.5 + gap / 100] * 50) for s, gap in enumerate((2, 4, 9))]
    found = difference(flat, [made("lora-r8", s, [0.5] * 50) for s in range(3)])
    assert found.mean == pytest.approx(5.0)
    assert found.se == pytest.approx(math.sqrt(13) / math.sqrt(3))
    assert not found.tie
    one, none = [made("full", 0, [1.0, 1.0, 0.0, 0.0], [0, 0, 1, 1])], [made("lora-r8", 0, [0.0] * 4, [0, 0, 1, 1])]
    assert difference(one, none).mean == pytest.approx(50.0)
    assert difference(one, none).se == pytest.approx(50.0)
    assert difference(none, one).tie
    stranger = difference(flat, [made("lora-r8", 7, [0.5] * 50)])
    assert stranger.mean == pytest.approx(5.0)
    assert math.isnan(stranger.se)
    assert stranger.tie, "what is not known is no difference"


def test_the_papers_claims_are_held_against_the_runs() -> None:
    """One row of 100 behind with se 1.7, half the parameters and 0.6 of the time of r=8: as claimed. Memory: not."""
    runs = [made("lora-r16", 0, RIGHT, parameters=100), made("lora-r8", 0, RIGHT, time={"train_s": 5, "search_s": 0})]
    rows = [0.0, 0.0, *RIGHT[2:-1], 1.0]
    runs += [made("full", 0, RIGHT),
             made("shrink", 0, rows, parameters=50, time={"train_s": 3.0, "search_s": 1.0})]  # fmt: skip
    assert table_of(runs).claims == [
        "shrink: at most one paired standard error behind lora-r16 on 1 of 1 tasks; parameters 0.50 of lora-r16 "
        "(as claimed); time 0.60 of lora-r8 (as claimed); time 1.50 of full (claimed: 0.4); memory 1.00 of full "
        "(claimed: 0.65)."
    ]
    runs[-1] = made("shrink", 0, [0.0] * 20 + RIGHT[20:])
    assert "lora-r16 on 0 of 1 tasks (behind: rte -20.0 ± 4.0)" in table_of(runs).claims[0]
    # Rows of CoLA are compared by right or wrong, the table has Matthews' correlation.
    some = {"task": "cola", "baselines": {}}
    mine = made("shrink", 0, [0.0] * 20 + RIGHT[20:], **some, metrics={"matthews": 10.0})
    both = [made("lora-r16", 0, RIGHT, key="r16cola", **some, metrics={"matthews": 50.0}), mine]
    assert "(behind: cola -20.0 ± 4.0 right rows, -40.0 matthews)" in table_of(both).claims[0]
    # No seed in common on CoLA.
    cola = {"task": "cola", "metrics": {"matthews": 50.0}, "baselines": {}}
    runs += [made("lora-r16", 0, RIGHT, key="r16cola", **cola), made("shrink", 1, [*RIGHT[1:], 0.0], **cola)]
    table = table_of(runs)
    assert "on 0 of 1 tasks (behind: rte -20.0 ± 4.0; no error is known: cola)" in table.claims[0]
    table = table_of(runs[-2:])
    assert table.claims[0].startswith("shrink: not to be compared with lora-r16 on cola, no error is known; param")


def took(seconds: float, slots: int) -> dict[str, Any]:
    return {"slots": slots, "time": {"train_s": seconds, "search_s": 0.0}}


def test_times_are_of_runs_that_had_the_machine_to_themselves() -> None:
    table = table_of([made("full", 0, RIGHT), made("full", 1, RIGHT, **took(50.0, 4))])
    assert table.rows[0].train_s == 2.0
    assert any("Some runs shared the machine" in note for note in table.notes)
    table = table_of([made("full", 0, RIGHT, **took(30.0, 4)), made("full", 1, RIGHT, **took(50.0, 4))])
    assert table.rows[0].train_s == 40.0
    assert any("no task was timed without others" in note for note in table.notes)


def test_times_are_of_tasks_on_which_every_method_ran_alone() -> None:
    """On MRPC only `full` did: its 2 s there against 90 s in company would compare nothing, nor do the claims."""
    mrpc = {"task": "mrpc", "metrics": {"f1": 50.0, "accuracy": 50.0}, "baselines": {}}
    runs = [made(m, 0, RIGHT, **took(t, 1)) for m, t in (("full", 10.0), ("lora-r8", 5.0), ("shrink", 4.0))]
    runs += [made(m, 0, RIGHT, key=f"{m}mrpc", **mrpc, **took(t, slots))
             for m, t, slots in (("full", 2.0, 1), ("lora-r8", 90.0, 4), ("shrink", 90.0, 4))]  # fmt: skip
    table = table_of(runs)
    assert (table.common, table.timed) == (("mrpc", "rte"), ("rte",))
    assert {row.method: row.train_s for row in table.rows} == {"full": 10.0, "lora-r8": 5.0, "shrink": 4.0}
    assert "time 0.80 of lora-r8 (as claimed); time 0.40 of full (as claimed)" in table.claims[0]
    assert any("Times are sums over rte, parameters means over mrpc, rte." in note for note in table.notes)


def test_times_are_of_methods_that_ran_alone_on_every_task() -> None:
    """Two of three did; the third's would look slower or faster than it is, and is left out, of the figure too."""
    runs = [made(m, 0, RIGHT, **took(t, slots))
            for m, t, slots in (("full", 10.0, 1), ("lora-r8", 5.0, 1), ("shrink", 90.0, 4))]  # fmt: skip
    table = table_of(runs)
    assert {row.method: row.train_s for row in table.rows} == {"full": 10.0, "lora-r8": 5.0, "shrink": None}
    assert {name for _, _, name in render.points_of(table, "time")} == {"full", "lora-r8"}
    assert {name for _, _, name in render.points_of(table, "parameters")} == {"full", "lora-r8", "shrink"}
    line = next(line for line in render.markdown(table).splitlines() if line.startswith("| shrink"))
    assert line.endswith("| 10 | – | – | – | – | 1.00 GiB |")
    assert any("missing for methods that had not" in note for note in table.notes)


def test_costs_in_the_csv_are_the_tasks_own() -> None:
    mrpc = {"task": "mrpc", "metrics": {"f1": 50.0, "accuracy": 50.0}, "baselines": {}}
    runs = [made("full", 0, RIGHT, **took(10.0, 2)), made("full", 1, RIGHT, **took(20.0, 3)),
            made("full", 0, RIGHT, key="other", parameters=99, **mrpc, **took(2.0, 1))]  # fmt: skip
    found = {line["task"]: line for line in csv.DictReader(io.StringIO(render.as_csv(table_of(runs))))}
    assert [(float(found[t][c])) for t in ("rte", "mrpc") for c in ("parameters", "train_s", "slots")] == [
        10, 15.0, 3, 99, 2.0, 1,
    ]  # fmt: skip


def test_the_commonest_answer_is_that_of_each_seeds_own_rows() -> None:
    said = [{"baselines": {"commonest": {"accuracy": value}}} for value in (40.0, 60.0)]
    runs = [made(method, seed, RIGHT, **said[seed]) for method in ("full", "base") for seed in (0, 1)]
    assert table_of([*runs, made("houlsby", 0, RIGHT, **said[0])]).baselines == {"commonest": {"rte": 50.0}}


def test_times_from_a_pass_of_their_own() -> None:
    runs = {
        r["key"]: r | {"fingerprint": "f"}
        for r in (made("full", 0, RIGHT, **took(50.0, 4)), made("full", 1, RIGHT, **took(60.0, 4)))
    }
    again = {"full0": runs["full0"] | {**took(7.0, 1), "rows": [], "peak_bytes": 5}}
    table = build(runs, again)
    assert (table.rows[0].train_s, table.rows[0].cells["rte"].values) == (7.0, (90.0, 90.0))
    assert runs["full0"]["time"]["train_s"] == 50.0
    with pytest.raises(RankraceError, match="no run of the table was done again"):
        build(runs, {"other": again["full0"]})
    with pytest.raises(RankraceError, match="full0 was run with other settings"):
        build(runs, {"full0": again["full0"] | {"fingerprint": "g"}})


def test_a_run_alone_is_not_compared_with_one_in_company() -> None:
    """Two methods that take the same, one of them done again alone, in a tenth of the time."""
    runs = {
        r["key"]: r | {"fingerprint": "f"}
        for r in (made("lora-r8", 0, RIGHT, **took(50.0, 4)), made("shrink", 0, RIGHT, **took(50.0, 4)))
    }
    table = build(runs, {"lora-r80": runs["lora-r80"] | took(5.0, 1)})
    assert {row.method: row.train_s for row in table.rows} == {"lora-r8": 50.0, "shrink": 50.0}
    assert "time 1.00 of lora-r8 (claimed: 0.95)" in table.claims[0]
    again = {key: r | took(t, 1) for (key, r), t in zip(runs.items(), (5.0, 4.0), strict=True)}
    table = build(runs, again)
    assert {row.method: row.train_s for row in table.rows} == {"lora-r8": 5.0, "shrink": 4.0}
    assert "time 0.80 of lora-r8 (as claimed)" in table.claims[0]


def test_the_notes_say_what_costs_mean() -> None:
    small = ["Out of memory in a pass of 512 tokens (512 × 1) at step 3: taken again, from now on with at most 256."]
    notes = "\n".join(table_of([made("full", 0, RIGHT, notes=small), made("lora-r8", 0, RIGHT)]).notes)
    assert "GLUE: the mean over rte, each by the mean of its metrics (MRPC: F1 and accuracy)." in notes
    assert "after running out of memory beside others: full 1." in notes
    assert "Peak memory: the largest of a method's runs." in notes
    assert "Trained on: rte 50 rows (by hand)." in notes
    of_two = table_of([made("full", 0, RIGHT, documents=[0, 1] * 50), made("lora-r8", 0, RIGHT)])
    assert any(note.startswith("Test rows: rte 100 in 2 documents.") for note in of_two.notes)
    long = {"data": {"train_examples": 50, "how": "by hand", "test_sha256": "t", "test_truncated": 7}}
    averaged = table_of([made("full", 0, RIGHT), made("lora-r16-average", 0, RIGHT, **long)])
    assert any(note.startswith("Test rows: rte 100, 7 of them cut to fit.") for note in averaged.notes)
    assert any("stops early; those named -average may end with the average" in note for note in averaged.notes)
    assert "named -average" not in notes


def test_an_average_is_held_against_an_average() -> None:
    """Else what it gains would be the choice's."""
    right = {"lora-r16": 90, "lora-r16-average": 95, "shrink": 90, "shrink-average": 95}
    runs = [made(name, 0, [1.0] * n + [0.0] * (100 - n)) for name, n in right.items()]
    assert [claim.partition(";")[0] for claim in table_of(runs).claims] == [
        "shrink: at most one paired standard error behind lora-r16 on 1 of 1 tasks",
        "shrink-average: at most one paired standard error behind lora-r16-average on 1 of 1 tasks",
    ]
    assert "behind lora" not in "".join(table_of(runs[:1] + runs[3:]).claims)


def test_a_run_at_a_rate_that_is_no_more_the_best_does_not_count() -> None:
    """The tuning run at 3 had failed, so 1 was taken; done again, it is the best."""
    runs = [made("full", 0, [0.0] * 100), made("full", 0, RIGHT, key="full0lr3", scale=3.0)]
    tuned = [made("full", 0, [], key=f"tuning{scale}", scale=scale, tuning=True, validation_loss=loss)
             | {"metrics": {}} for scale, loss in ((1.0, 0.5), (3.0, 0.4))]  # fmt: skip
    assert table_of(runs + tuned).rows[0].cells["rte"].values == (90.0,)
    tuned[1] |= {"status": "failed", "validation_loss": None, "error": "out of memory"}
    assert table_of(runs + tuned).rows[0].cells["rte"].values == (0.0,)


def test_costs_are_of_tasks_that_all_methods_have_run_on() -> None:
    other = {"task": "sst2", "key": "other", "time": {"train_s": 100.0, "search_s": 0.0}, "parameters": 1000}
    table = table_of([made("full", 0, RIGHT), made("full", 0, RIGHT, **other), made("lora-r8", 0, RIGHT)])
    assert table.common == ("rte",)
    assert {row.method: (row.train_s, row.parameters) for row in table.rows} == {
        "full": (2.0, 10),
        "lora-r8": (2.0, 10),
    }


def test_runs_on_different_test_rows_make_no_table() -> None:
    with pytest.raises(RankraceError, match="different test rows"):
        table_of([made("full", 0, RIGHT), made("lora-r8", 0, RIGHT[1:])])
    elsewhere = {"data": {"train_examples": 50, "how": "by hand", "test_sha256": "u"}}
    with pytest.raises(RankraceError, match="different test rows"):
        table_of([made("full", 0, RIGHT), made("lora-r8", 0, RIGHT, **elsewhere)])


def test_the_interval_is_students() -> None:
    """By a printed table: t(2) = 4.303; s = 1, n = 3."""
    assert t_half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(t_half_width([1.0]))


@pytest.mark.parametrize(("given", "dirty"), [("c0ffee", False), ("c0ffee+", True)])
def test_a_copy_of_the_code_says_what_it_is_a_copy_of(
    given: str, dirty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKRACE_COMMIT", given)
    found = provenance()
    assert (found["commit"], found["dirty"]) == ("c0ffee", dirty)
    assert len(found["code_sha256"]) == 64
    monkeypatch.delenv("RANKRACE_COMMIT")
    assert provenance()["commit"] != "c0ffee"

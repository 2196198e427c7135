"""Runs the jobs of an experiment as Ray tasks: on this machine's own cluster, or the one that Ray finds.

A worker that is killed in mid-run is started again by Ray, and its run goes on from its checkpoint: all nodes have to
see the results folder.
"""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from rankrace.bench.experiment import Experiment, Job
from rankrace.bench.job import Stopped, perform
from rankrace.bench.local import POLL_S, Next, record_failure
from rankrace.bench.record import Record
from rankrace.bench.store import Store
from rankrace.errors import RankraceError

RETRIES = 3
"""How often a run whose worker died is started again."""
LOST = ("WorkerCrashedError", "OutOfMemoryError", "NodeDiedError", "LocalRayletDiedError", "ObjectLostError")
"""What Ray raises when a worker, its node or what it returned is gone; its other errors are not the run's."""


def run_ray(
    experiment: Experiment, store: Store, upcoming: Next, device: str, save_s: float, slots: int
) -> Iterator[Record]:
    """Up to `slots` runs at once; on a GPU each has one of its own.

    Raises:
        RankraceError: Ray is not installed.
    """
    try:
        ray: Any = import_module("ray")
    except ImportError as error:
        raise RankraceError(
            "--runner ray needs the package ray",
            why="it is an optional part of rankrace",
            fix="pip install 'rankrace[ray]', or use --runner local",
        ) from error
    ray.init(ignore_reinit_error=True, log_to_driver=False, include_dashboard=False)
    # The cluster's, not this machine's; and each run sees one, whatever its number is here.
    gpu = device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    if not gpu and device not in ("auto", "cpu"):
        raise RankraceError(
            f"--device {device}: no node of the Ray cluster has a GPU",
            why="no run could ever start",
            fix="use --device auto or cpu, or start a node with one",
        )
    device = "cuda" if gpu else "cpu"
    remote = ray.remote(perform).options(
        max_retries=RETRIES, num_cpus=1, num_gpus=1 if gpu else 0, scheduling_strategy="SPREAD"
    )
    folder = store.folder.absolute()
    working: dict[Any, Job] = {}
    sharing = 1 if gpu else slots
    try:
        while True:
            for job in upcoming({job.key for job in working.values()})[: slots - len(working)]:
                working[remote.remote(experiment, job, folder, device, save_s, sharing)] = job
            if not working:
                return
            done, _ = ray.wait(list(working), num_returns=1, timeout=POLL_S)
            if not done:
                continue
            job = working.pop(done[0])
            try:
                yield ray.get(done[0])
            except (Stopped, ray.exceptions.TaskCancelledError):  # a run that was asked to stop is missing still
                continue
            except ray.exceptions.RayTaskError as error:  # it could not write its own record
                what = f"{type(error.cause).__name__}: {error.cause}"
                yield record_failure(experiment, job, folder, what, sharing)
            except tuple(getattr(ray.exceptions, name) for name in LOST) as error:
                what = f"the run's worker was lost {RETRIES + 1} times: {str(error).splitlines()[0]}"
                yield record_failure(experiment, job, folder, what, sharing)
    finally:
        ray.shutdown()

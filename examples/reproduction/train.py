#!/usr/bin/env python3
"""Train experiments on this machine: several files share what they have in common.

Like `lrpath run`, for hundreds of short trainings: on the CPU processes are forked from a process that has imported
torch and Megatron, so that each starts in two seconds instead of fifteen; on a GPU they share it, and a model is
evaluated while others train. Called again it continues where it stopped.

  train.py examples/paper/small/tables-1-3.yaml examples/paper/small/table-2.yaml --jobs 2 --seeds 1
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron_lrpath.experiment.load import Experiment, load_together
from megatron_lrpath.experiment.run import PointTask, shared_tasks, write_plans
from megatron_lrpath.launch.process import new_log
from megatron_lrpath.launch.warm import PRELOADED
from megatron_lrpath.runs.results import fresh_evaluation
from megatron_lrpath.runs.state import parent_available
from megatron_lrpath.runs.tasks import link_aliases

# A process that has opened a GPU cannot fork a process that uses one; with the CPU backend, it can.
CONTEXTS: dict[str, ForkServerContext | SpawnContext] = {
    "cpu": multiprocessing.get_context("forkserver"),
    "cuda": multiprocessing.get_context("spawn"),
}
TRAIN, EVALUATE = "megatron_lrpath.training.pretrain", "megatron_lrpath.evaluate.worker"


@dataclass
class Job:
    """Process that works on a task, with its log."""

    task: PointTask
    process: BaseProcess
    log: Path
    started: float


def call(module: str, argv: Sequence[str], log: Path) -> None:
    """Run `module.main(argv)` in a forked process, with its output in `log`."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # As in a process started by itself: Megatron's data loaders can only be forked.
    multiprocessing.set_start_method("fork", force=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    importlib.import_module(module).main(list(argv))


def start(task: PointTask, device: str) -> Job:
    """Start what the task needs next: its training, or the evaluation of the trained model."""
    plan = ["--plan", str(task.plan_path), "--device", device]
    if task.complete:
        module, argv = EVALUATE, [*plan, "--runs", f"{task.run.paradigm}/{task.run.name}"]
    else:
        module, argv = TRAIN, [*plan, "--paradigm", task.run.paradigm, "--run", task.run.name]
    log = new_log(task.folder)
    process = CONTEXTS[device].Process(target=call, args=(module, argv, log))
    process.start()
    return Job(task, process, log, time.monotonic())


def finished(task: PointTask) -> bool:
    """Return whether the task is trained and, if it is a version's model, evaluated."""
    return task.complete and (
        task.run.kind == "main" or fresh_evaluation(task.folder, task.run.last_step) is not None
    )


def carry_out(tasks: Sequence[PointTask], jobs: int, device: str) -> None:
    """Train and evaluate, `jobs` processes at a time, the tasks in order as far as their parents allow.

    After the first failure start no further process; raise SystemExit if trainings are left. If this process is
    stopped, its trainings save and stop first.
    """
    folders = {task.key: task.folder for task in tasks}
    for task in tasks:
        link_aliases(task)
    todo = [task for task in tasks if not finished(task)]
    print(
        f"{len(tasks)} trainings, {len(todo)} to do, {sum(task.run.steps for task in todo)} steps", flush=True
    )
    active: list[Job] = []
    try:
        todo = finish(todo, active, folders, jobs, device)
    finally:
        for job in active:
            job.process.terminate()
        for job in active:
            job.process.join()
    if todo:
        sys.exit(f"{len(todo)} trainings are left; call again to continue")


def finish(
    todo: list[PointTask], active: list[Job], folders: Mapping[str, Path], jobs: int, device: str
) -> list[PointTask]:
    """Start the processes of the tasks and wait for them; return the tasks that are left after a failure.

    `active` has the processes that are running.
    """
    failed = False
    while todo or active:
        while not failed and len(active) < jobs:
            busy = {job.task.key for job in active}
            ready = (
                task for task in todo
                if task.key not in busy and parent_available(task, folders.get(task.parent or ""))
            )  # fmt: skip
            following = next(ready, None)
            if following is None:
                break
            active.append(start(following, device))
        if not active:
            break
        wait([job.process.sentinel for job in active], timeout=5)
        for job in [job for job in active if not job.process.is_alive()]:
            active.remove(job)
            failed |= not report(job)
        todo = [task for task in todo if not finished(task)]
    return todo


def report(job: Job) -> bool:
    """Print how a process ended; return whether it succeeded."""
    good = job.process.exitcode == 0 and job.task.complete
    seconds = time.monotonic() - job.started
    outcome = "done" if good else f"FAILED ({job.process.exitcode}), see {job.log}"
    line = f"{job.task.key}: {job.task.run.steps} steps, {seconds:.0f} s, {outcome}"
    print(time.strftime("%H:%M:%S"), line, flush=True)
    return good


def chosen(experiment: Experiment, seed: int | None, patterns: Sequence[str]) -> Experiment:
    """Return the experiment with only this seed (None: all) and the variations that match a pattern."""
    points = tuple(
        point
        for point in experiment.points
        if seed in (None, point.plan.seed) and any(fnmatchcase(point.group, pattern) for pattern in patterns)
    )
    return replace(experiment, points=points)


def wanted(experiments: Sequence[Experiment], seed: int | None, patterns: Sequence[str]) -> list[PointTask]:
    """Return the trainings that the chosen variations need, in the folders shared with all others."""
    some = shared_tasks([chosen(one, seed, patterns) for one in experiments])
    folders = {folder for task in some for folder in (task.folder, *task.aliases)}
    every = shared_tasks([chosen(one, seed, ["*"]) for one in experiments])
    return [task for task in every if folders & {task.folder, *task.aliases}]


def main() -> None:
    """Train the remaining trainings of the experiments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="+", type=Path, metavar="EXPERIMENT", help="experiment files")
    parser.add_argument(
        "--jobs", type=int, default=2, help="trainings side by side, a thread each (default: 2)"
    )
    parser.add_argument("--device", choices=sorted(CONTEXTS), default="cpu", help="default: cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="only these seeds, in this order")
    parser.add_argument(
        "--variations", nargs="+", default=["*"], metavar="PATTERN", help="only these, as cosine*"
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    experiments = load_together(args.experiments)
    for experiment in experiments:
        write_plans(experiment)
    CONTEXTS["cpu"].set_forkserver_preload([PRELOADED])
    tasks = [task for seed in args.seeds or [None] for task in wanted(experiments, seed, args.variations)]
    carry_out(tasks, args.jobs, args.device)


if __name__ == "__main__":
    main()

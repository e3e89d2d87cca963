"""One run as processes: torchrun under a supervisor, its output in a log file, the run's folder locked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_lrpath.launch.supervisor import LEFTOVER_SECONDS
from megatron_lrpath.locks import FolderLock
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.runs.tasks import Task

ENTRY_MODULE = "megatron_lrpath.training.pretrain"


def torchrun_command(
    plan: Path, task: Task, nproc: int, device: str | None = None, extra: Sequence[str] = ()
) -> list[str]:
    """The command of a run: the training entry under torchrun, at a rendezvous of its own on a free port.

    `device` is given on only where it was chosen; `extra` are Megatron arguments as the user typed them.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    # `--`: torchrun's parser would take our --run for its own --run-path
    entry = [
        "-m",
        "--",
        ENTRY_MODULE,
        "--plan",
        str(plan),
        "--paradigm",
        task.run.paradigm,
        "--run",
        task.run.name,
    ]
    chosen = ["--device", device] if device else []
    return [sys.executable, *launcher, "--nproc-per-node", str(nproc), *entry, *chosen, *extra]


class RunProcess:
    """A started run. Its supervisor inherits the folder's lock, which so lasts as long as the run does."""

    def __init__(self, task: Task, process: subprocess.Popen[bytes], log: Path, slot: int) -> None:
        self.task = task
        self.log = log
        self.slot = slot
        self.started = time.monotonic()
        self._process = process

    @classmethod
    def start(
        cls,
        task: Task,
        command: Sequence[str],
        environment: Mapping[str, str],
        grace: float,
        slot: int,
        patience: float = 1.0,
    ) -> RunProcess:
        """Start `command` for `task`; raises `LockHeldError` when another process is at this run."""
        lock = FolderLock.acquire(task.folder, patience)
        try:
            log = new_log(task.folder)
            process = supervised(command, environment, grace, log, (lock.fileno(),))
        finally:
            lock.close()
        return cls(task, process, log, slot)

    def poll(self) -> int | None:
        """The exit status, None while the run goes on."""
        return self._process.poll()

    def terminate(self) -> None:
        """Ask the run to end within its grace period."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the run at once."""
        self._signal(signal.SIGINT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)


def supervised(
    command: Sequence[str],
    environment: Mapping[str, str],
    grace: float,
    log: Path | None = None,
    descriptors: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `command` under a supervisor that ends it, and all that it started, when this process is gone.

    To be called from the main thread: the kernel's signal comes when the thread that started a process ends.
    """
    options = ["--parent", str(os.getpid()), "--grace", str(grace)]
    options += ["--log", str(log)] if log else []
    options += [option for descriptor in descriptors for option in ("--pass-fd", str(descriptor))]
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_lrpath.launch.supervisor", *options, "--", *command],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if log else None,
        pass_fds=tuple(descriptors),
        start_new_session=True,  # a Ctrl-C of the terminal reaches the runner alone
    )


def stop_all(processes: Sequence[RunProcess], grace: float) -> None:
    """End the runs, all at the same time; whoever is not gone after the grace period is killed.

    A second Ctrl-C kills them at once.
    """
    for process in processes:
        process.terminate()
    try:
        _wait(processes, grace + 2 * LEFTOVER_SECONDS)
    except KeyboardInterrupt:
        pass
    finally:
        for process in processes:
            process.kill()
        _wait(processes, 2 * LEFTOVER_SECONDS)


def new_log(folder: Path) -> Path:
    """A log file that is not there yet: `logs/<date>-<time>.log` in the run's folder."""
    logs = RunFolder(folder).logs
    logs.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = [f"{stamp}.log", *(f"{stamp}-{number}.log" for number in range(2, 1000))]
    return next(logs / name for name in names if not (logs / name).exists())


def _wait(processes: Sequence[RunProcess], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)

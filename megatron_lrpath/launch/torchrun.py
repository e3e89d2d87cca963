"""torchrun as started by `lrpath`: the same program, which also records how the first failing rank ended."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lrpath.exits import SAVED_AND_STOPPED
from megatron_lrpath.runs import failure

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from megatron_lrpath.runs.tasks import Task

CLOSING_SECONDS = 20  # torchrun kills workers that do not end within 30 seconds of its SIGTERM
TRAINING = "megatron_lrpath.training.pretrain"


@dataclass(frozen=True)
class Ranks:
    """A module's `main`, to be called with `argv` in `nproc` processes on this machine.

    `alone`: a single process that needs no launcher.
    """

    module: str
    argv: tuple[str, ...]
    nproc: int = 1
    alone: bool = False

    @property
    def command(self) -> list[str]:
        """Return the command: under torchrun, with its own rendezvous on a free port, unless `alone`."""
        if self.alone:
            return [sys.executable, "-m", self.module, *self.argv]
        options = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(self.nproc)]
        # `--`: torchrun's parser would interpret our --run as its --run-path
        return [sys.executable, "-m", __name__, *options, "-m", "--", self.module, *self.argv]


def training(
    plan: Path, task: Task, nproc: int, device: str | None = None, extra: Sequence[str] = ()
) -> Ranks:
    """Return the ranks of a training; `device` is passed only if it was chosen, `extra` are Megatron
    arguments.
    """
    argv = ["--plan", str(plan), "--paradigm", task.run.paradigm, "--run", task.run.name]
    return Ranks(TRAINING, (*argv, *(["--device", device] if device else []), *extra), nproc)


def main(argv: Sequence[str] | None = None) -> None:
    """Run torchrun; if all its ranks have saved and stopped, exit with their status instead of 1."""
    # Imported here because it takes seconds, and building a command does not need them.
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(argv)
    except ChildFailedError as error:
        if all(one.exitcode == SAVED_AND_STOPPED for one in error.failures.values()):
            sys.exit(SAVED_AND_STOPPED)
        failure.record(first_failure(error))
        raise


def first_failure(error: ChildFailedError) -> failure.Failure:
    """Return how the rank ended that failed first (see `failure.first`).

    torchrun also lists the ranks that it has ended itself after the first failure.
    """
    ranks = error.failures
    order = sorted(ranks, key=lambda one: (ranks[one].exitcode >= 0, ranks[one].timestamp))
    closing = min(process.timestamp for process in ranks.values())
    killed_late = {
        rank
        for rank, process in ranks.items()
        if process.exitcode == -signal.SIGKILL and process.timestamp - closing >= CLOSING_SECONDS
    }
    rank = failure.first({one: ranks[one].exitcode for one in order}, killed_late)
    return failure.of_status(f"rank {rank}", ranks[rank].exitcode, rank, ranks[rank].pid)


if __name__ == "__main__":
    main()

"""What srun starts, once a rank: `FOLDER MODULE WORDS…` turns Slurm's variables into torch's and runs MODULE.

Everything that the rank prints goes to `FOLDER/rank-<n>.log`.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from megatron_lrpath.training.guards.signals import SAVED_AND_STOPPED


def main(words: list[str]) -> None:
    """Run the module as this rank."""
    folder, module, *rest = words
    # Asked to stop before the training can save: nothing is lost by leaving. The training puts its own in place.
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, _leave)
    variables = torch_variables(os.environ)
    os.environ |= variables
    path = Path(folder) / f"rank-{variables['RANK']}.log"
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def torch_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE of a task of srun's, from Slurm's own variables.

    `SLURM_STEP_TASKS_PER_NODE` reads like `8(x2),4`: two nodes with eight tasks, one with four.
    """
    per_node: list[int] = []
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, _, times = part.partition("(x")
        per_node += [int(count)] * (int(times.rstrip(")")) if times else 1)
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(per_node[int(environment["SLURM_NODEID"])]),
    }


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(SAVED_AND_STOPPED)


if __name__ == "__main__":
    main(sys.argv[1:])

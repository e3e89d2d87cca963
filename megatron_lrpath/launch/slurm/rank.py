"""What srun starts, once a rank: `FOLDER MODULE ARGUMENTS…` turns Slurm's variables into torch's and runs MODULE.

Everything that the rank prints goes to `FOLDER/rank-<n>.log`. The module runs in a child of the process that srun
started, which waits for it and writes how it ended: nobody else learns which signal killed which rank.
"""

from __future__ import annotations

import os
import resource
import runpy
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType

from megatron_lrpath.exits import SAVED_AND_STOPPED, leave_at_once
from megatron_lrpath.runs import failure
from megatron_lrpath.training.guards import orphans

PASSED_ON = (signal.SIGUSR2, signal.SIGTERM)


def main(argv: list[str]) -> None:
    """Run the module as this rank, and end as it has ended."""
    folder, module, *arguments = argv
    # Asked to stop before the training can save: nothing is lost by leaving. The training puts its own in place.
    for number in PASSED_ON:
        signal.signal(number, lambda *_: leave_at_once(SAVED_AND_STOPPED))
    variables = torch_variables(os.environ)
    os.environ |= variables
    path = Path(folder) / f"rank-{variables['RANK']}.log"
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    child = os.fork()  # before torch and its threads are there
    if child:
        end_as(wait_for(child, int(variables["RANK"])))
    orphans.RULE.die_with_parent()  # a signal that kills one of the two ends the rank
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    sys.argv = [module, *arguments]
    with failure.recorded():
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def wait_for(child: int, rank: int) -> int:
    """Wait for the rank's process, pass signals on to it, write a failure; its exit status, -n for signal n.

    Slurm's tracking of processes by control groups signals only what srun started, that by process trees the
    child too. A training takes a repeated signal as one.
    """

    def pass_on(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for number in PASSED_ON:
        signal.signal(number, signal.SIG_IGN)
    if status not in (0, SAVED_AND_STOPPED):
        who = f"rank {rank} on {socket.gethostname()}"
        failure.record(failure.of_status(who, status, rank, child))
    return status


def end_as(status: int) -> None:
    """End this process with the child's exit status, or by the signal that killed the child."""
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the child's core is the one to look at
        with suppress(OSError):  # SIGKILL and SIGSTOP have no handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    leave_at_once(status if status >= 0 else 128 - status)


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


if __name__ == "__main__":
    main(sys.argv[1:])

"""Run MODULE on a rank as started by srun: `FOLDER MODULE ARGUMENTS…` sets torch's variables from Slurm's
first.

All output of the rank goes to `FOLDER/rank-<n>.log`. The module runs in a child of the process that srun
started, which waits for it and records its end, because no other process gets the signal that killed a
rank.
"""

from __future__ import annotations

import os
import resource
import runpy
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_lrpath.exits import SAVED_AND_STOPPED, leave_at_once
from megatron_lrpath.launch.slurm.stop import confirmation
from megatron_lrpath.runs import failure
from megatron_lrpath.training.exits import BEGUN
from megatron_lrpath.training.guards import orphans

PASSED_ON = (signal.SIGUSR2, signal.SIGTERM)
WATCHED = (*PASSED_ON, signal.SIGCHLD)
LEAVING_SECONDS = 3.0  # for a rank that has nothing to save yet


def main(argv: list[str]) -> None:
    """Run the module as this rank, and end in the same way."""
    folder, module, *arguments = argv
    # If asked to stop before the training can save, leaving loses nothing. The training replaces the handler.
    for number in PASSED_ON:
        signal.signal(number, lambda *_: leave_at_once(SAVED_AND_STOPPED))
    variables = torch_variables(os.environ)
    os.environ |= variables
    path = Path(folder) / f"rank-{variables['RANK']}.log"
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    begun = os.pipe()
    child = os.fork()  # before torch is imported and starts its threads
    if child:
        os.close(begun[1])
        end_as(Watch(child, int(variables["RANK"]), Path(folder), begun[0]).wait())
    os.close(begun[0])
    os.environ[BEGUN] = str(begun[1])
    orphans.RULE.die_with_parent()  # a signal that kills one of the two ends the rank
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
    sys.argv = [module, *arguments]
    with failure.recorded():
        runpy.run_module(module, run_name="__main__", alter_sys=True)


@dataclass
class Watch:
    """Waits for a rank's process and forwards signals to it.

    `begun` is the read end of a pipe: the training writes to it when it has a state to save.
    """

    child: int
    rank: int
    folder: Path
    begun: int
    asked: bool = False
    killed: bool = False

    def wait(self) -> int:
        """Return the exit status of the rank's process, -n for signal n; record a failure.

        If it is asked to stop before it has a state to save, it is killed if it does not exit by itself:
        Python handles no signals inside a library that waits for other ranks. The status is then
        `SAVED_AND_STOPPED`.

        With control groups, Slurm signals only the process that srun started; with process trees, the
        child, too. A training treats repeated signals as one.
        """
        deadline: float | None = None
        while (ended := os.waitpid(self.child, os.WNOHANG))[0] == 0:
            seconds = 3600.0 if deadline is None else max(0.0, deadline - time.monotonic())
            info = signal.sigtimedwait(WATCHED, seconds)
            if info and info.si_signo in PASSED_ON:
                self.pass_on(info.si_signo)
                deadline = deadline or time.monotonic() + LEAVING_SECONDS
            elif info is None and deadline:
                self.kill_unless_begun()
                deadline = None
        status = os.waitstatus_to_exitcode(ended[1])
        if self.killed or status == -signal.SIGUSR2:
            return SAVED_AND_STOPPED
        if status not in (0, SAVED_AND_STOPPED):
            who = f"rank {self.rank} on {socket.gethostname()}"
            failure.record(failure.of_status(who, status, self.rank, self.child))
        return status

    def pass_on(self, number: int) -> None:
        """Forward a signal, and confirm the first one."""
        with suppress(ProcessLookupError):
            os.kill(self.child, number)
        if not self.asked:
            self.asked = True
            with suppress(OSError):  # a full disk: it is asked again, with no effect
                confirmation(self.folder, self.rank).touch()

    def kill_unless_begun(self) -> None:
        """Kill the rank's process, unless the training has reported a state to save."""
        if not select.select([self.begun], [], [], 0)[0]:
            self.killed = True
            os.kill(self.child, signal.SIGKILL)


def end_as(status: int) -> None:
    """End this process with the child's exit status, or by the signal that killed the child."""
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the useful core is the child's
        with suppress(OSError):  # SIGKILL and SIGSTOP have no handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    leave_at_once(status if status >= 0 else 128 - status)


def torch_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE of a task of srun, from Slurm's variables.

    `SLURM_STEP_TASKS_PER_NODE` has the form `8(x2),4`: two nodes with eight tasks, one with four.
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

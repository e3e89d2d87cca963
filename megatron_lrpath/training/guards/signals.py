"""SIGTERM and SIGUSR2: every rank saves at the end of the step and exits with `SAVED_AND_STOPPED`.

Schedulers send SIGTERM when a job is cancelled or preempted, and (Slurm: `--signal=USR2@600`) a configured
signal some time before the end of a job. One rank that receives a signal is enough: the ranks agree in
every step.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

from megatron_lrpath.exits import SAVED_AND_STOPPED, leave_at_once

WATCHED = (signal.SIGTERM, signal.SIGUSR2)
BEGUN = "LRPATH_BEGUN"  # a pipe, open for writing, to the launcher that wants to know when there is something to save


class Signals:
    """The signals that this process has received, and the decision of all ranks.

    Attributes:
        received: whether this rank was asked to stop.
        training: whether there is a state to save, so that a signal waits for the end of the step.
        stopping: whether the run saves and stops at the end of this step; the same on all ranks.
    """

    def __init__(self) -> None:
        self.received = False
        self.training = False
        self.stopping = False

    def watch(self) -> None:
        """Install the signal handlers of a process that has nothing to save yet."""
        for number in WATCHED:
            signal.signal(number, self._note)

    def let_go(self) -> None:
        """Restore the default handlers: plain Megatron has its own options for signals."""
        for number in WATCHED:
            signal.signal(number, signal.SIG_DFL)

    def begin(self) -> None:
        """Mark that there is a state to save, and notify the launcher if it asked for that."""
        self.training = True
        descriptor = os.environ.pop(BEGUN, None)
        if descriptor is not None:
            os.write(int(descriptor), b"1")

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if not self.training:
            if int(os.environ.get("RANK", "0")) == 0:
                name = signal.Signals(number).name
                os.write(2, f"lrpath: {name} before the first step: nothing to save, stopped\n".encode())
            leave_at_once(SAVED_AND_STOPPED)

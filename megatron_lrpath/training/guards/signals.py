"""SIGTERM and SIGUSR2: every rank saves at the next step boundary and leaves with an exit code of its own.

Schedulers send SIGTERM when a job is cancelled or preempted, and (Slurm: `--signal=USR2@600`) a signal of the
user's choice some time before a job's end. One rank that got it is enough: the ranks agree in every step.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

SAVED_AND_STOPPED = 75  # sysexits.h: EX_TEMPFAIL, "try again later"
WATCHED = (signal.SIGTERM, signal.SIGUSR2)

_received: signal.Signals | None = None
_training = False
_agreed = False


def watch() -> None:
    """Take the signals over, for a process that has nothing to save yet."""
    for number in WATCHED:
        signal.signal(number, _note)


def let_go() -> None:
    """Give the signals back: plain Megatron has its own options for them."""
    for number in WATCHED:
        signal.signal(number, signal.SIG_DFL)


def training_begins() -> None:
    """From now on there is something to save: a signal waits for the end of the step."""
    global _training
    _training = True


def received() -> bool:
    """Whether this rank was told to stop."""
    return _received is not None


def agree_to_stop() -> None:
    """Note that some rank was told to stop, which all ranks know now."""
    global _agreed
    _agreed = True


def stopping() -> bool:
    """Whether the run is to save and stop at the end of this step; the same on all ranks."""
    return _agreed


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    _received = signal.Signals(number)
    if not _training:
        if int(os.environ.get("RANK", "0")) == 0:
            os.write(
                2, f"lrpath: {_received.name} before the first step: nothing to save, stopped\n".encode()
            )
        os._exit(SAVED_AND_STOPPED)

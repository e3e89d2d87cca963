"""A request to stop a job: accepted from the first line of its script on, and forwarded until every rank
confirms it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGUSR2, signal.SIGTERM)  # ahead of the time limit; at the end of the job
LOOK_SECONDS = 0.25
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between an unconfirmed signal and the next
BY_USR2 = (-signal.SIGUSR2, 128 + signal.SIGUSR2)  # statuses of srun: itself, or a rank, was ended by USR2
ASKED = ".asked"  # suffix of the file by which a rank confirms the request


def confirmation(folder: Path, rank: int) -> Path:
    """Return the file, in the folder of the ranks' logs, by which a rank confirms the request to stop."""
    return folder / f"rank-{rank}{ASKED}"


def block_usr2() -> None:
    """Block SIGUSR2 in a child before its program starts, so that the signal stays pending until the program
    handles it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})


@dataclass
class _Step:
    """A running srun that must get the request; `due` is the time, in monotonic seconds."""

    process: subprocess.Popen[bytes]
    ranks: Path
    pause: float = FIRST_PAUSE
    due: float = 0.0

    @property
    def knows(self) -> bool:
        """Return whether every rank has confirmed."""
        wanted = int(os.environ.get("SLURM_NTASKS") or 1)
        return len(list(self.ranks.glob(f"rank-*{ASKED}"))) >= wanted

    def remind(self) -> None:
        """Send SIGUSR2 to srun, which forwards it to its ranks, unless all have confirmed or the last signal
        is recent.

        An srun without ranks yet drops the signal, so that one signal is not enough.
        """
        now = time.monotonic()
        if now < self.due or self.process.poll() is not None or self.knows:
            return
        self.process.send_signal(signal.SIGUSR2)
        self.due, self.pause = now + self.pause, min(2 * self.pause, LONGEST_PAUSE)


class StopRequest:
    """The request to stop this start of a job, if there was any.

    The batch script records its signals in `file`, because this process cannot handle them while it
    starts. A signal to this process itself counts, too.

    Attributes:
        received: the name of the first signal, "" if there was none.
        when: when it was detected, in monotonic seconds.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.received = ""
        self.when = 0.0
        self._step: _Step | None = None

    def watch(self) -> None:
        """Watch for the request in a separate thread."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        self._look()
        threading.Thread(target=self._attend, name="signals", daemon=True).start()

    def tell(self, process: subprocess.Popen[bytes], ranks: Path) -> None:
        """Set the srun to notify, whose ranks log into `ranks`."""
        self._step = _Step(process, ranks)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._note(signal.Signals(number).name)

    def _note(self, name: str) -> None:
        if not self.received:
            self.when = time.monotonic()
            self.received = name

    def _look(self) -> None:
        if self.received or not self.file.exists():
            return
        words = self.file.read_text(encoding="ascii", errors="replace").split()
        self._note(f"SIG{words[0]}" if words else signal.SIGUSR2.name)

    def _attend(self) -> None:
        while True:
            self._look()
            step = self._step
            if self.received and step:
                step.remind()
            time.sleep(LOOK_SECONDS)

"""End a training process: one message, an exit status, the end of the other ranks; handle stop signals.

After SIGTERM or SIGUSR2 every rank saves at the end of the step and exits with `SAVED_AND_STOPPED`. Schedulers send
SIGTERM when a job is cancelled or preempted, and (Slurm: `--signal=USR2@600`) a configured signal some time before the
end of a job. One rank that receives a signal is enough: the ranks agree in every step.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_lrpath.console import say_error
from megatron_lrpath.errors import RendezvousError, TrainingStoppedError, UserError, refusal
from megatron_lrpath.exits import BAD_INPUT, FAILED, leave_at_once
from megatron_lrpath.runs import failure

if TYPE_CHECKING:  # it imports torch, after the choice of the device
    from megatron_lrpath.training.guards.peers import PeerWatch


import signal
from types import FrameType

from megatron_lrpath.exits import SAVED_AND_STOPPED

EXIT_BUILTIN = "_sitebuiltins"  # the module from which `exit()` raises
ON_SIGNAL = "_graceful_shutdown"  # Megatron's reaction to SIGINT and SIGTERM
RERUN = (16, 17)  # the statuses of Megatron's rerun state machine


def reason_of(error: SystemExit, place: str, said: str) -> tuple[Exception, int]:
    """Return the error and the exit status for an exit of Megatron."""
    if error.code in RERUN:
        text = (
            f"Megatron's rerun state machine ended the training (its status {error.code}, {place}): a result was not "
            "what it should be, see its lines above. Call again to continue from the last checkpoint."
        )
        return TrainingStoppedError(text, calling_again_helps=True), FAILED
    said = (error.code if isinstance(error.code, str) else said).strip()
    what = f"Megatron ended the process before the training was done ({place})"
    reason = f": {said}" if said else "; the lines above say why"
    return UserError(f"{what}{reason}. Calling again without a change would fail in the same way."), BAD_INPUT


class Exits:
    """The handling of this process's end.

    Attributes:
        peers: set after rendezvous.
        asked: whether Megatron may exit by itself, because of the user or a signal.
        said: Megatron's last output while it loaded a checkpoint.
    """

    def __init__(self) -> None:
        self.peers: PeerWatch | None = None
        self.asked = False
        self.said = ""

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Convert the exception that ends the block to one message and an exit status.

        A user's error exits with `BAD_INPUT`, a training that cannot continue with `FAILED`. An unexpected
        exception is raised before rendezvous; afterwards it ends all ranks with one message. If Megatron
        exits by itself without a request, that is a user's error, regardless of its status.
        """
        try:
            yield
        except SystemExit as error:
            if (place := self.unasked(error)) is None:
                raise
            self.leave(*reason_of(error, place, self.said))
        except UserError as error:
            self.leave(error, BAD_INPUT)
        except TrainingStoppedError as error:
            self.leave(error, FAILED)
        except OSError as error:
            if (refused := refusal(error)) is None:
                self.report(error)
            self.leave(TrainingStoppedError(refused), FAILED, of_one_rank=True)
        except RendezvousError as error:
            failure.record_error(error)
            say_error(error)
            leave_at_once(FAILED)
        except Exception as error:
            self.report(error)

    def unasked(self, error: SystemExit) -> str | None:
        """Return the place in Megatron of an exit without a request; None for every other exit."""
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        while frames and frames[-1].f_globals.get("__name__") == EXIT_BUILTIN:
            frames.pop()
        if self.asked or not frames or frames[-1].f_code.co_name == ON_SIGNAL:
            return None
        module, line = str(frames[-1].f_globals.get("__name__")), frames[-1].f_lineno
        return f"{module}, line {line}" if module.partition(".")[0] == "megatron" else None

    def report(self, error: Exception) -> NoReturn:
        """Raise an unexpected exception; after rendezvous, name the rank that it ended and end all ranks."""
        if self.peers is None:
            failure.record_error(error)
            raise error
        self.peers.report_error(error)

    def leave(self, error: Exception, status: int, of_one_rank: bool = False) -> NoReturn:
        """Print the error once for all ranks and exit immediately: other ranks may wait in a collective.

        Before rendezvous only rank 0 prints; with `of_one_rank` the failing rank prints itself, because
        rank 0 may not have met the error.
        """
        if self.peers is None:
            failure.record_error(error)
            if of_one_rank or int(os.environ.get("RANK", "0")) == 0:
                say_error(error)
            leave_at_once(status)
        if self.peers.claim():
            failure.record_error(error, self.peers.step)
            say_error(error)
        self.peers.end(status)

    def lost_lock(self, root: Path, owner: str) -> NoReturn:
        """End this rank, and with it the run, before it writes into checkpoints that `owner` writes now."""
        text = f"{root}: {owner} took this run over while this process gave no sign of life; this one ends."
        if self.peers is None or self.peers.claim():
            failure.record(failure.here(failure.STOPPED, text))
            say_error(text)
        if self.peers is not None:
            self.peers.end(FAILED)
        leave_at_once(FAILED)


WATCHED = (signal.SIGTERM, signal.SIGUSR2)
BEGUN = "LRPATH_BEGUN"  # a pipe, open for writing, that shows the launcher that there is something to save


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

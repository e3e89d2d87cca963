"""The ways out of a training process: one message, an exit status, and the end of the other ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_lrpath.console import say_error
from megatron_lrpath.errors import NotMetError, TrainingStoppedError, UserError, refusal
from megatron_lrpath.exits import BAD_INPUT, FAILED, leave_at_once
from megatron_lrpath.runs import failure

if TYPE_CHECKING:  # it imports torch, which the device must precede
    from megatron_lrpath.training.guards.peers import PeerWatch


class Exits:
    """How this process ends. `peers` is set as soon as the ranks have met."""

    def __init__(self) -> None:
        self.peers: PeerWatch | None = None

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Turn what ends the block into one message and an exit status.

        A user's error leaves with `BAD_INPUT`, a training that cannot go on with `FAILED`. An unexpected exception
        is raised before the ranks have met; afterwards it ends all ranks with one message.
        """
        try:
            yield
        except UserError as error:
            self.leave(error, BAD_INPUT)
        except TrainingStoppedError as error:
            self.leave(error, FAILED)
        except OSError as error:
            if (refused := refusal(error)) is None:
                self.report(error)
            self.leave(TrainingStoppedError(refused), FAILED, of_one_rank=True)
        except NotMetError as error:
            failure.record_error(error)
            say_error(error)
            leave_at_once(FAILED)
        except Exception as error:
            self.report(error)

    def report(self, error: Exception) -> NoReturn:
        """Raise an unexpected exception; once ranks have met, name the rank that it ended and end all."""
        if self.peers is None:
            failure.record_error(error)
            raise error
        self.peers.report_error(error)

    def leave(self, error: Exception, status: int, of_one_rank: bool = False) -> NoReturn:
        """Print the error once for all ranks and leave at once: other ranks may wait in a collective.

        Before the ranks have met only rank 0 prints; with `of_one_rank` the failing rank prints itself, since
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

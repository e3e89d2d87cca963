"""Train a session's run to its end: Megatron's loop, and the mark that the run is complete."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.enums import ModelType
from megatron.training import pretrain, set_startup_timestamps

from megatron_lrpath.errors import TrainingStoppedError
from megatron_lrpath.exits import FAILED, SAVED_AND_STOPPED
from megatron_lrpath.runs import failure
from megatron_lrpath.runs.checkpoints import latest_step
from megatron_lrpath.runs.results import write_result
from megatron_lrpath.training import seams, setup
from megatron_lrpath.training.checkpoints.commit import Saves
from megatron_lrpath.training.checkpoints.dist_checkpointing import load_failures
from megatron_lrpath.training.datasets import DatasetProvider
from megatron_lrpath.training.forward import ForwardStep
from megatron_lrpath.training.guards.peers import own_store
from megatron_lrpath.training.session import Session


def train(session: Session, argv: list[str], start: float) -> None:
    """Set Megatron up for the run in `argv` and train it; `start` is the start time of the process (Unix
    time).
    """
    seams.apply(session)
    args = setup.arguments(session, argv)
    set_startup_timestamps(program_start=start, main_entry=time.time())
    if session.context is None:
        session.signals.let_go()
        session.store = own_store()
        return loop(session, args)
    setup.begin(session, args)
    carry_out(session, args, lambda: loop(session, args))


def loop(session: Session, args: Any) -> None:
    """Call Megatron's `pretrain`.

    Raises:
        UserError: the checkpoint cannot be loaded.
        SystemExit: Megatron ends before the last step (a signal, --exit-interval and similar).
    """
    session.exits.asked = bool(
        args.ckpt_convert_format
    )  # Megatron exits when it has converted the checkpoint
    with load_failures(args.load):
        pretrain(
            setup.configuration(args),
            DatasetProvider(session.context),
            ModelType.encoder_or_decoder,
            ForwardStep(session.guard, session.is_packed, session.standstill),
            store=session.store,
        )


def carry_out(session: Session, args: Any, run_loop: Callable[[], None]) -> None:
    """Train from the session's first step to the run's end, unless it is reached already; then mark it
    complete.
    """
    if session.first_step < args.train_iters:
        try:
            run_loop()
        except SystemExit as error:
            if session.exits.unasked(error):
                raise  # possibly only on this rank
            setup.end(session)
            if session.signals.stopping:
                sys.exit(stop_status(session.saves))
            raise
    else:
        kind = session.context.kind if session.context else "run"
        print(f"{kind}: step {args.train_iters} is reached already, nothing to train", flush=True)
    finish(session, args)
    setup.end(session)


def stop_status(saves: Saves | None) -> int:
    """Return the exit status of a run that a signal ended."""
    if saves is not None and not saves.failed_last:
        return SAVED_AND_STOPPED
    text = "a signal ended the training, and its last checkpoint could not be saved (see the log)"
    failure.record(failure.here(failure.STOPPED, text))
    return FAILED


def finish(session: Session, args: Any) -> None:
    """Mark the run complete, if its last checkpoint exists.

    Raises:
        TrainingStoppedError: it does not.
    """
    if int(os.environ["RANK"]) != 0:
        return
    last = latest_step(Path(args.save)) or 0
    if last < args.train_iters:
        raise TrainingStoppedError(
            f"{args.save}: trained to step {args.train_iters}, but the newest checkpoint is of step {last}. "
            "Call again to continue from there.",
            calling_again_helps=True,
        )
    context = session.context
    if context is not None and context.folder is not None and context.run is not None:
        write_result(context.folder, context.run, args.train_iters)

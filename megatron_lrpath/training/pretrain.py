"""The training entry point: what `pretrain_gpt.py`, torchrun and srun start."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lrpath import full_disk
from megatron_lrpath.errors import TrainingStoppedError
from megatron_lrpath.exits import FAILED, SAVED_AND_STOPPED
from megatron_lrpath.files import atomic_write_json
from megatron_lrpath.runs.checkpoints import latest_step
from megatron_lrpath.runs.history import last_loss
from megatron_lrpath.runs.results import RESULT
from megatron_lrpath.training import device as devices
from megatron_lrpath.training.checkpoints.ahead import ReadAhead
from megatron_lrpath.training.exits import Exits
from megatron_lrpath.training.guards.signals import Signals
from megatron_lrpath.training.options.arguments import read_early

if TYPE_CHECKING:
    from megatron_lrpath.training.session import Session


def main(argv: list[str] | None = None) -> None:
    """Train the run that the command line describes.

    A user's error is one message and exit status 2, a training that cannot go on one message and 1; one that
    saved and stopped for a signal leaves with `SAVED_AND_STOPPED`.
    """
    for category in (DeprecationWarning, FutureWarning, SyntaxWarning):
        warnings.filterwarnings("ignore", category=category)
    # Printed on every start where they are not installed; `environment.flags` has drawn the consequences.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|transformer-engine).*")
    exits, signals = Exits(), Signals()
    signals.watch()
    full_disk.keep_printing()
    with exits.reported():
        train(sys.argv[1:] if argv is None else argv, exits, signals)


def open_session(argv: list[str], exits: Exits, signals: Signals) -> Session:
    """The session of this process: reads ahead, chooses the device, and prepares the process for it."""
    early = read_early(argv)
    ahead = ReadAhead()
    ahead.begin(early)
    device = devices.choose_device(early.device)
    devices.activate(device)
    set_single_process_environment()
    from megatron_lrpath.training.session import Session  # imports Megatron, which the device must precede

    return Session(device, exits, signals, ahead)


def train(argv: list[str], exits: Exits, signals: Signals) -> None:
    """Set Megatron up for the run and hand over to its `pretrain`."""
    start = time.time()
    session = open_session(argv, exits, signals)
    from megatron.training import set_startup_timestamps

    from megatron_lrpath.training import seams, setup  # import Megatron, which the device must precede
    from megatron_lrpath.training.guards.peers import own_store

    seams.apply(session)
    args = setup.arguments(session, argv)
    set_startup_timestamps(program_start=start, main_entry=time.time())
    if session.context is None:
        signals.let_go()
        session.store = own_store()
        return loop(session, args)
    setup.begin(session, args)
    carry_out(session, args, lambda: loop(session, args))


def carry_out(session: Session, args: Any, train: Callable[[], None]) -> None:
    """Train from the session's first step to the run's end, unless that is reached; then mark it complete."""
    from megatron_lrpath.training import setup  # imported by now

    if session.first_step < args.train_iters:
        try:
            train()
        except SystemExit:
            setup.end(session)
            if session.signals.stopping:
                saves = session.saves
                sys.exit(FAILED if saves is None or saves.failed_last else SAVED_AND_STOPPED)
            raise
    else:
        kind = session.context.kind if session.context else "run"
        print(f"{kind}: step {args.train_iters} is reached already, nothing to train", flush=True)
    finish(session, args)
    setup.end(session)


def loop(session: Session, args: Any) -> None:
    """Hand over to Megatron's `pretrain`.

    Raises:
        UserError: the checkpoint cannot be loaded.
        SystemExit: Megatron ends before the last step (a signal, --exit-interval and its kind).
    """
    from megatron.core.enums import ModelType
    from megatron.training import pretrain

    from megatron_lrpath.training import setup  # import Megatron, which the device must precede
    from megatron_lrpath.training.checkpoints import unpickle
    from megatron_lrpath.training.datasets import DatasetProvider
    from megatron_lrpath.training.forward import ForwardStep

    with unpickle.load_failures(args.load):
        pretrain(
            setup.configuration(args),
            DatasetProvider(session.context),
            ModelType.encoder_or_decoder,
            ForwardStep(session.guard, session.is_packed),
            store=session.store,
        )


def set_single_process_environment() -> None:
    """Let `python pretrain_gpt.py …` work without a launcher, as one process."""
    if "RANK" not in os.environ:
        from torch.distributed.elastic.utils.distributed import get_free_port

        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # an in-process restart asks for them
        os.environ.setdefault("MASTER_PORT", str(get_free_port()))


def finish(session: Session, args: Any) -> None:
    """Mark the run complete with `result.json`, once its last checkpoint is there.

    Raises:
        TrainingStoppedError: it is not.
    """
    if int(os.environ["RANK"]) != 0:
        return
    last = latest_step(Path(args.save)) or 0
    if last < args.train_iters:
        raise TrainingStoppedError(
            f"{args.save}: trained to step {args.train_iters}, but the newest checkpoint is of step {last}. "
            "Call again to go on from there."
        )
    context = session.context
    if context is not None and context.folder is not None and context.run is not None:
        result = {
            "run": context.run.name,
            "paradigm": context.run.paradigm,
            "version": context.run.version,
            "step": args.train_iters,
            "loss": last_loss(context.folder),
        }
        atomic_write_json(context.folder / RESULT, result)


if __name__ == "__main__":
    main()

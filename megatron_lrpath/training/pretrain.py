"""The training entry point: what `pretrain_gpt.py`, torchrun and srun start."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from megatron_lrpath import full_disk
from megatron_lrpath.console import say_error
from megatron_lrpath.errors import NotMetError, TrainingStoppedError, UserError, refusal
from megatron_lrpath.runs import failure
from megatron_lrpath.runs.checkpoints import latest_step
from megatron_lrpath.runs.results import write_result
from megatron_lrpath.training import device as backend
from megatron_lrpath.training.checkpoints import ahead
from megatron_lrpath.training.guards import signals
from megatron_lrpath.training.options import arguments as early


def main(words: list[str] | None = None) -> None:
    """Train the run that the command line describes.

    A user's error is one message and exit code 2, a training that cannot go on one message and 1; one that
    saved and stopped for a signal leaves with `signals.SAVED_AND_STOPPED`.
    """
    for category in (DeprecationWarning, FutureWarning, SyntaxWarning):
        warnings.filterwarnings("ignore", category=category)
    # Said on every start where they are not installed; `environment.flags` has drawn the consequences.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|transformer-engine).*")
    signals.watch()
    full_disk.keep_printing()
    with told():
        train(sys.argv[1:] if words is None else words)


@contextmanager
def told() -> Iterator[None]:
    """Turn what ends a run into one message and an exit code, see `main`."""
    try:
        yield
    except UserError as error:
        leave(error, 2)
    except TrainingStoppedError as error:
        leave(error, 1)
    except OSError as error:
        if (refused := refusal(error)) is None:
            report(error)
        leave(TrainingStoppedError(refused), 1, of_one_rank=True)
    except NotMetError as error:
        failure.record_error(error)
        say_error(error)
        os._exit(1)
    except Exception as error:
        report(error)


def report(error: Exception) -> NoReturn:
    """Raise what nobody expected, or where ranks have met, say which one it ended and let the others end."""
    from megatron_lrpath.training.guards import peers

    watch = peers.current_watch()
    if watch is None:
        failure.record_error(error)
        raise error
    watch.report_error(error)


def leave(error: Exception, status: int, of_one_rank: bool = False) -> None:
    """Say what was wrong, once for all ranks, and leave at once: other ranks may wait in a collective.

    Before ranks have met, rank 0 speaks for all, unless it may know nothing of what befell `of_one_rank`.
    """
    from megatron_lrpath.training.guards import peers

    watch = peers.current_watch()
    if watch is None:
        failure.record_error(error)
        if of_one_rank or int(os.environ.get("RANK", "0")) == 0:
            say_error(error)
        os._exit(status)
    if watch.claim():
        failure.record_error(error, watch.step)
        say_error(error)
    watch.end(status)


def train(words: list[str]) -> None:
    """Set Megatron up for the run and hand over to its `pretrain`."""
    start = time.time()
    said = early.read(words)
    ahead.begin(said)
    device = backend.choose_device(said.device)
    backend.activate(device)
    set_single_process_environment()

    from megatron.training import set_startup_timestamps

    from megatron_lrpath.training import seams, setup
    from megatron_lrpath.training.guards.peers import own_store

    seams.apply(device)
    args, context = setup.arguments(words, device)
    set_startup_timestamps(program_start=start, main_entry=time.time())
    if context is None:
        signals.let_go()
        return loop(args, own_store())
    first_step, store = setup.begin(args, context, device)
    carry_out(args, context, first_step, lambda: loop(args, store))


def carry_out(args: Any, context: Any, first_step: int, train: Callable[[], None]) -> None:
    """Train from `first_step` to the run's end with `train`, unless that is reached; then mark it complete."""
    from megatron_lrpath.training import setup

    if first_step < args.train_iters:
        try:
            train()
        except SystemExit:
            setup.end()
            if signals.stopping():
                sys.exit(stop_status())
            raise
    else:
        print(f"{context.kind}: step {args.train_iters} is reached already, nothing to train", flush=True)
    finish(args, context)
    setup.end()


def loop(args: Any, store: Any) -> None:
    """Hand over to Megatron's `pretrain`.

    Raises:
        UserError: the checkpoint cannot be loaded.
        SystemExit: Megatron ends before the last step (a signal, --exit-interval and its kind).
    """
    from megatron.core.enums import ModelType
    from megatron.training import pretrain

    from megatron_lrpath.training import datasets, forward, setup
    from megatron_lrpath.training.checkpoints import unpickle

    with unpickle.load_failures(args.load):
        pretrain(
            setup.configuration(args),
            datasets.provide_datasets,
            ModelType.encoder_or_decoder,
            forward.forward_step,
            store=store,
        )


def stop_status() -> int:
    """The exit code of a run that a signal ended."""
    from megatron_lrpath.training.checkpoints.saves import current_saves

    saves = current_saves()
    if saves is not None and not saves.failed_last:
        return signals.SAVED_AND_STOPPED
    text = "a signal ended the training, and its last checkpoint could not be saved (see the log)"
    failure.record(failure.here(failure.STOPPED, text))
    return 1


def set_single_process_environment() -> None:
    """Let `python pretrain_gpt.py …` work without a launcher, as one process."""
    if "RANK" not in os.environ:
        from torch.distributed.elastic.utils.distributed import get_free_port

        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # an in-process restart asks for them
        os.environ.setdefault("MASTER_PORT", str(get_free_port()))


def finish(args: Any, context: Any) -> None:
    """Mark the run complete, once its last checkpoint stands.

    Raises:
        TrainingStoppedError: it does not.
    """
    if int(os.environ["RANK"]) != 0:
        return
    last = latest_step(Path(args.save)) or 0
    if last < args.train_iters:
        raise TrainingStoppedError(
            f"{args.save}: trained to step {args.train_iters}, but the newest checkpoint is of step {last}. "
            "Call again to go on from there."
        )
    if context.folder is not None:
        write_result(context.folder, context.run, args.train_iters)


if __name__ == "__main__":
    main()

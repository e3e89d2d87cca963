"""The training entry point: what `pretrain_gpt.py`, torchrun and srun start."""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from megatron_lrpath import backend
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_write_json


def main(words: list[str] | None = None) -> None:
    """Train the run that the command line describes; a user's error is one message and exit code 2."""
    for category in (DeprecationWarning, FutureWarning, SyntaxWarning):
        warnings.filterwarnings("ignore", category=category)
    # Said on every start where they are not installed; `environment.flags` has drawn the consequences.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|transformer-engine).*")
    try:
        train(sys.argv[1:] if words is None else words)
    except UserError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"lrpath: error: {error}", file=sys.stderr, flush=True)
        # Other ranks may wait in a collective: leave at once, torchrun ends them.
        os._exit(2)


def device_of(words: list[str]) -> str:
    """The --device among `words`, read before Megatron is imported (its backend must stand by then)."""
    for index, word in enumerate(words):
        if word == "--device" and index + 1 < len(words):
            return words[index + 1]
        if word.startswith("--device="):
            return word.partition("=")[2]
    return "auto"


def train(words: list[str]) -> None:
    """Set Megatron up for the run and hand over to its `pretrain`."""
    start = time.time()
    device = backend.choose_device(device_of(words))
    backend.activate(device)
    set_single_process_environment()

    from megatron.core.enums import ModelType
    from megatron.training import pretrain, set_startup_timestamps

    from megatron_lrpath.training import datasets, forward, seams, setup

    seams.apply(device)
    args, context = setup.arguments(words, device)
    set_startup_timestamps(program_start=start, main_entry=time.time())
    if context is not None and setup.begin(args, context) >= args.train_iters:
        print(f"{context.kind}: step {args.train_iters} is reached already, nothing to train", flush=True)
        return finish(args, context)
    pretrain(
        setup.configuration(args),
        datasets.provide_datasets,
        ModelType.encoder_or_decoder,
        forward.forward_step,
    )
    if context is not None:
        finish(args, context)
    setup.end()


def set_single_process_environment() -> None:
    """Let `python pretrain_gpt.py …` work without a launcher, as one process."""
    if "RANK" not in os.environ:
        from torch.distributed.elastic.utils.distributed import get_free_port

        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(get_free_port()))


def finish(args: Any, context: Any) -> None:
    """Mark the run complete with `result.json`, once its last checkpoint stands."""
    from megatron_lrpath.training.checkpoints_on_disk import latest_step
    from megatron_lrpath.training.history import last_loss

    if context.folder is None or int(os.environ["RANK"]) != 0:
        return
    last = latest_step(Path(args.save))
    if last is not None and last >= args.train_iters:
        result = {
            "run": context.run.name,
            "paradigm": context.run.paradigm,
            "version": context.run.version,
            "step": args.train_iters,
            "loss": last_loss(context.folder),
        }
        atomic_write_json(context.folder / "result.json", result)


if __name__ == "__main__":
    main()

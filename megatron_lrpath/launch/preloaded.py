"""The preload module of a fork server: its import loads what every CPU process needs (seconds each), once."""

from __future__ import annotations

import os
import sys

# Only a process with one thread can be forked safely; torch reads this on its first import.
os.environ["OMP_NUM_THREADS"] = "1"

from megatron_lrpath.console import quiet
from megatron_lrpath.training import machine


def import_everything() -> None:
    """Import the modules of a training, an evaluation and their seams. No name of Megatron is replaced yet."""
    machine.activate("cpu")
    # The device must be activated before Megatron's import, and so before all imports below.
    import megatron.core.tokenizers.text.libraries.huggingface_tokenizer
    import megatron.training  # noqa: F401
    import torch
    import torch.distributed.checkpoint

    # Also after the device.
    from megatron_lrpath.evaluate import perplexity  # noqa: F401
    from megatron_lrpath.training import loop, pretrain, seams, setup  # noqa: F401
    from megatron_lrpath.training.options import arguments

    seams.import_rows("cpu")
    # The parser with defaults is built by each process: some of Megatron's defaults come from its environment.
    arguments.full_parser(suppress_defaults=True)
    # The first optimizer of a process imports torch's compiler (seconds).
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).step()


def modified(path: str) -> int | None:
    """Return the modification time of a file in ns; None if there is no such file."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None


def sources() -> dict[str, int | None]:
    """Return the files of all imported modules with their modification times."""
    names = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    return {name: modified(name) for name in names if name}


quiet()
with machine.lasting_imports():
    import_everything()
SOURCES = sources()

"""For a fork server: imports once what every training process on the CPU would import anew (seconds each)."""

from __future__ import annotations

from megatron_lrpath.training import device


def import_everything() -> None:
    """Import what a training, an evaluation and their seams need; nothing is replaced yet. Call in the parent.

    The forked processes should have one thread each: set OMP_NUM_THREADS=1 before the first import of torch.
    """
    device.activate("cpu")
    import megatron.core.tokenizers.text.libraries.huggingface_tokenizer
    import megatron.training  # noqa: F401
    import torch
    import torch.distributed.checkpoint

    from megatron_lrpath.evaluate import perplexity  # noqa: F401  (the device must precede Megatron's import)
    from megatron_lrpath.training import seams, setup  # noqa: F401
    from megatron_lrpath.training.options import arguments  # the same

    seams.import_rows("cpu")
    arguments.full_parser(suppress_defaults=True)
    # The first optimizer of a process imports torch's compiler (seconds).
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).step()

"""Command-line words of Megatron's that every run of a plan has alike."""

from __future__ import annotations

from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.training.checkpoints.on_disk import CHECKPOINTS


def tokenizer_words(plan: Plan) -> list[str]:
    """Megatron's arguments of the plan's tokenizer, the same for every run."""
    tokenizer = plan.tokenizer
    words = ["--tokenizer-type", tokenizer.type]
    if tokenizer.model is not None:
        words += ["--tokenizer-model", str(tokenizer.model)]
    if tokenizer.vocab_size is not None:
        words += ["--vocab-size", str(tokenizer.vocab_size)]
    return words


def output_words(plan: Plan, run: Run) -> list[str]:
    """Where Megatron writes: checkpoints and TensorBoard's files in the run's folder."""
    folder = plan.folder(run)
    return ["--save", str(folder / CHECKPOINTS), "--tensorboard-dir", str(folder / "tensorboard")]

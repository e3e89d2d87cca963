"""Checks of the slices of a branch's mix: disjoint, unchanged and long enough. Without torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_lrpath.data.slice import (
    Slice,
    available_samples,
    check_disjoint,
    open_validation,
    slice_path,
    validation_path,
    verify_slices,
)
from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.plan.mix import Mix
from megatron_lrpath.plan.spec import Data


def require_mix_samples(
    slices: Sequence[Slice], mix: Mix, batch: int, steps: int, seq_length: int
) -> list[int]:
    """How many samples of each slice a branch reads.

    Raises:
        UserError: a slice has fewer, with the plan's line.
    """
    needed = list(mix.samples(batch, steps).values())
    for one, part, count in zip(slices, mix.parts, needed, strict=True):
        available = available_samples(one, seq_length)
        if available < count:
            raise UserError(
                f"{part.place}: its share of {steps:,} steps is {count:,} samples of {seq_length:,} tokens, and "
                f"{one.path or 'the slice'} has {available:,} ({one.tokens:,} tokens); give a smaller share, "
                "or draw the slice with more tokens"
            )
    return needed


def open_mix(data: Data, mix: Mix, verify: bool = True) -> list[Slice]:
    """Load a mix's slices, in its order, and prove them disjoint from each other and from validation.

    They may share documents with the versions: curated data may be a part of them, or an old version is read
    again. With `verify` every source is compared with its fingerprint, as in `open_slices`.

    Raises:
        UserError: a slice or source is missing, damaged or another, or documents are shared.
    """
    slices = []
    for part in mix.parts:
        folder = Path(part.slice).parent if "/" in part.slice else data.slices
        try:
            slices.append(Slice.load(slice_path(folder, part.name)))
        except UserError as error:
            raise UserError(f"{part.place}: {error}") from None
    held = validation_path(data).exists()
    checked: list[Slice] = [*slices, open_validation(data)] if held else slices
    if verify:
        verify_slices(slices)
    check_disjoint(checked)
    return slices


def check_mixes(plan: Plan, runs: Iterable[Run]) -> None:
    """Prove, before days are trained, that the slices of every branch's mix are there and long enough.

    Raises:
        UserError: what `open_mix` and `require_mix_samples` raise.
    """
    opened: dict[Mix, list[Slice]] = {}
    for run in runs:
        if run.mix is None:
            continue
        if run.mix not in opened:
            opened[run.mix] = open_mix(plan.data, run.mix, verify=False)
        batch = plan.batch
        require_mix_samples(opened[run.mix], run.mix, batch.global_batch_size, run.steps, batch.seq_length)

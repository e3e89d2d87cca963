"""Putting many indexed datasets together into one, checked first and copied in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lrpath.data.indexed_check import (
    BLOCK,
    PairReport,
    check_pair,
    find_pairs,
    map_bounds,
    map_lengths,
    strip_ending,
)
from megatron_lrpath.data.preprocess.writer import IntArray, PairWriter, publish_all, refuse_existing
from megatron_lrpath.errors import UserError


def merge_datasets(inputs: Sequence[str], output: str, overwrite: bool = False) -> PairWriter:
    """Merge the datasets `inputs` (prefixes, or folders of datasets) into `output`, in order.

    Returns the finished writer, whose counts are the result's.

    Raises:
        UserError: a part is damaged or of another type, is the output itself, or the output exists.
    """
    prefixes = _expand(inputs)
    if Path(output).resolve() in [Path(prefix).resolve() for prefix in prefixes]:
        raise UserError(f"{output} is one of the datasets to merge; write to another name")
    marker = Path(output).parent / f".{Path(output).name}.publishing"
    refuse_existing([output], marker, overwrite)
    reports = [check_pair(prefix, ids=False) for prefix in prefixes]
    _check_types(reports)
    pair = PairWriter(output, np.dtype(reports[0].header.dtype))
    try:
        refuse_existing([output], marker, overwrite)
        for report in reports:
            pair.append_file(f"{report.header.prefix}.bin")
            pair.append_index(_lengths(report), _counts(report))
        publish_all([pair], marker)
    finally:
        pair.discard()
    return pair


def _expand(inputs: Sequence[str]) -> list[str]:
    prefixes: list[str] = []
    for name in inputs:
        found = find_pairs(Path(name)) if Path(name).is_dir() else [strip_ending(name)]
        if not found:
            raise UserError(f"{name}: no indexed dataset in this folder")
        prefixes += found
    twice = {prefix for prefix in prefixes if prefixes.count(prefix) > 1}
    if twice:
        raise UserError(f"{min(twice)} is named twice; its documents would be there twice")
    return prefixes


def _check_types(reports: Sequence[PairReport]) -> None:
    first = reports[0].header
    for report in reports:
        header = report.header
        if header.dtype != first.dtype:
            raise UserError(
                f"{header.prefix} holds {header.dtype} tokens, {first.prefix} {first.dtype}; datasets of "
                f"different tokenizers do not go together"
            )
        if header.modes:
            raise UserError(f"{header.prefix} is multimodal; Megatron-LM's own tool merges those")


def _lengths(report: PairReport) -> Iterator[IntArray]:
    lengths = map_lengths(report.header)
    for start in range(0, len(lengths), BLOCK):
        yield lengths[start : start + BLOCK]


def _counts(report: PairReport) -> Iterator[IntArray]:
    """Sequences per document."""
    bounds: Any = map_bounds(report.header)
    for start in range(0, len(bounds) - 1, BLOCK):
        yield np.diff(bounds[start : start + BLOCK + 1])

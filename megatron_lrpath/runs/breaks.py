"""Breaks in a run: starts with other libraries, on another device or in another layout than the steps before.

Between breaks, repeated steps are bit-identical; across a break they differ by rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_lrpath.wording import listing

COMPARED = ("megatron-core", "torch", "transformer-engine", "apex", "liger-kernel")
"""The packages whose versions affect rounding."""
LAYOUT = (
    "tensor_model_parallel_size",
    "sequence_parallel",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
"""Megatron's arguments of the layout; the number of processes is recorded separately."""


def new_break(earlier: Sequence[Mapping[str, Any]], start: Mapping[str, Any]) -> list[str]:
    """Return the differences between a start and the one whose steps it continues; empty at the beginning of
    a run.

    A field that the earlier start lacks, because an older version wrote it, counts as equal.
    """
    before = standing([*earlier, start])[-2:-1]
    return _differences(before[0], start) if before else []


def standing(starts: object) -> list[Mapping[str, Any]]:
    """Return the starts whose steps remain: a later start at or before their step replaces them.

    Malformed entries of a damaged lineage are ignored.
    """
    left: list[Mapping[str, Any]] = []
    for start in starts if isinstance(starts, list) else []:
        if not isinstance(start, Mapping) or type(start.get("step")) is not int:
            continue
        while left and left[-1]["step"] >= start["step"]:
            left.pop()
        left.append(start)
    return left


def breaks(lineage: Mapping[str, Any]) -> dict[int, list[str]]:
    """Return the breaks of a run: the step after which each occurred, and the differences."""
    found = {start["step"]: start.get("break") for start in standing(lineage.get("starts"))}
    return {step: [str(clause) for clause in clauses] for step, clauses in found.items()
            if isinstance(clauses, list) and clauses}  # fmt: skip


def breaks_told(lineage: Mapping[str, Any]) -> list[str]:
    """Describe each break of a run in a clause."""
    return [f"continues from step {step:,} with {listing(found)}" for step, found in breaks(lineage).items()]


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    old, new = before.get("packages", {}), now.get("packages", {})
    pairs = [(name, old.get(name, "none"), new.get(name, "none")) for name in COMPARED if old and new]
    pairs += [
        (what, before[name], now[name])
        for name, what in (("device", "device"), ("world_size", "processes"), ("kernels", "GPU kernels"))
        if name in before and name in now
    ]
    layout, laid = before.get("layout"), now.get("layout")
    if layout and laid:
        pairs += [(name, layout.get(name), laid.get(name)) for name in LAYOUT]
    return [f"{name} {new} (before: {old})" for name, old, new in pairs if old != new]

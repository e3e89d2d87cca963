"""Breaks in a run: starts with other libraries, on another device or in another layout than the steps before.

Between breaks the same steps have the same bits; across one they differ as roundings do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_lrpath.wording import listing

COMPARED = ("megatron-core", "torch", "transformer-engine", "apex", "liger-kernel")
"""The packages whose versions decide about roundings."""
LAYOUT = (
    "tensor_model_parallel_size",
    "sequence_parallel",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
"""Megatron's arguments of the layout; the number of processes stands beside them."""


def new_break(earlier: Sequence[Mapping[str, Any]], start: Mapping[str, Any]) -> list[str]:
    """What of a start differs from the one before whose steps it goes on from, a clause each; none where it begins.

    What the earlier one does not say, as an older version wrote it, counts as the same.
    """
    before = standing([*earlier, start])[-2:-1]
    return _differences(before[0], start) if before else []


def standing(starts: object) -> list[Mapping[str, Any]]:
    """The starts of which steps are left: a later start from their step, or before it, has replaced the others.

    What is no start, in a damaged lineage, is passed over.
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
    """The breaks that a run has behind it: the step after which each lies, and what differs."""
    found = {start["step"]: start.get("break") for start in standing(lineage.get("starts"))}
    return {step: [str(clause) for clause in clauses] for step, clauses in found.items()
            if isinstance(clauses, list) and clauses}  # fmt: skip


def breaks_told(lineage: Mapping[str, Any]) -> list[str]:
    """The breaks of a run, a clause each."""
    return [f"goes on from step {step:,} with {listing(found)}" for step, found in breaks(lineage).items()]


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

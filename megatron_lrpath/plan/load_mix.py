"""Reads `branch_mix`: slices and shares, checked."""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_lrpath.plan.key import SAFE_NAME, SHARE
from megatron_lrpath.plan.keys import MIX_KEYS
from megatron_lrpath.plan.mix import Mix, MixPart
from megatron_lrpath.plan.source import Entry, Source
from megatron_lrpath.plan.values import read_key, read_mapping, read_section, read_value


def read_mix(source: Source, entry: Entry | None, seed: int) -> Mix | None:
    """The mix of an entry (a plan's or a version's); None where there is none or it names no slice.

    Raises PlanError for shares outside (0, 1), shares that leave nothing to the main path, and a slice named twice.
    """
    if entry is None or entry.value is None:
        return None
    section = read_section(source, entry, MIX_KEYS)
    named = read_mapping(source, section["slices"])
    if not named:
        if entry.key.startswith("versions"):
            return None  # takes the plan's mix away from this version
        raise source.error(section["slices"], "names no slice; write them like `curated: 0.2`")
    parts = [_part(source, name, child) for name, child in named.items()]
    _check_names(source, parts, named)
    total = sum(part.share for part in parts)
    if total >= 1:
        raise source.error(
            section["slices"],
            f"the shares add up to {float(total):g}, which leaves nothing to the main path's data; they must "
            "add up to less than 1",
        )
    own = next(key for key in MIX_KEYS if key.name == "seed")
    return Mix(tuple(parts), read_key(source, section, own) or seed)


def _part(source: Source, name: str, entry: Entry) -> MixPart:
    share = Fraction(repr(read_value(source, entry, SHARE)))  # 0.1 is a tenth
    return MixPart(name, share, f"{source.path}:{entry.line}: {entry.key}")


def _check_names(source: Source, parts: list[MixPart], named: dict[str, Entry]) -> None:
    seen: dict[str, str] = {}
    for part, entry in zip(parts, named.values(), strict=True):
        if not re.fullmatch(SAFE_NAME, part.name):
            raise source.error(entry, f"{part.slice!r} does not name a slice; give its name or its path")
        if part.name in seen:
            raise source.error(
                entry, f"{part.slice!r} has the name of {seen[part.name]!r}; two slices need two names"
            )
        seen[part.name] = part.slice

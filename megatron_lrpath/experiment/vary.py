"""Changes to a plan's mapping by dotted keys, and the variations that follow from lists of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

_PART = re.compile(r"([A-Za-z_][A-Za-z0-9_-]*)(?:\[([0-9]+)\])?")
_UNSAFE = re.compile(r"[^A-Za-z0-9.-]+")


def change(plan: dict[str, Any], key: str, value: Any) -> None:
    """Set `schedule.max_lr`, `versions[0].cycle_steps.scratch`, `versions.steps` (every version's) …

    None takes the key away, so that its default holds. Raises ValueError for a key that cannot be followed.
    """
    *way, last = key.split(".")
    places: list[dict[str, Any]] = [plan]
    for part in way:
        places = [found for place in places for found in _descend(place, part, key)]
    for place in places:
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value


def variations(
    points: Sequence[Mapping[str, Any]], vary: Mapping[str, Sequence[Any]]
) -> list[tuple[str, dict[str, Any]]]:
    """Every point with every combination of the varied values, each with its name."""
    made = []
    for point in points or [{}]:
        given = dict(point)
        name = given.pop("name", None)
        for values in itertools.product(*vary.values()):
            varied = dict(zip(vary, values, strict=True))
            words = [str(name)] if name is not None else [_word(key, value) for key, value in given.items()]
            words += [_word(key, value) for key, value in varied.items()]
            made.append(("_".join(words) or "plan", given | varied))
    return made


def _word(key: str, value: Any) -> str:
    """A value as part of a folder's name: words as they are, numbers with the last part of their key."""
    text = str(value).rsplit("/", 1)[-1].removesuffix(".yaml") if key == "plan" else str(value)
    text = _UNSAFE.sub("-", text).strip("-.")
    is_word = isinstance(value, str) and value != "inf" and not value[:1].isdigit()
    return text if is_word or key in ("plan", "model") else key.rsplit(".", 1)[-1] + text


def _descend(place: dict[str, Any], part: str, key: str) -> list[dict[str, Any]]:
    match = _PART.fullmatch(part)
    if not match:
        raise ValueError(f"{key!r} is no key; write it like schedule.max_lr or versions[0].steps")
    found = place.setdefault(match[1], {})
    if isinstance(found, list):
        chosen = found if match[2] is None else found[int(match[2]) : int(match[2]) + 1]
        if not chosen:
            raise ValueError(f"{key}: {match[1]} has only {len(found)} entries")
        return chosen
    if not isinstance(found, dict):
        raise ValueError(f"{key}: {match[1]!r} is {found!r} there, not a mapping")
    return [found]

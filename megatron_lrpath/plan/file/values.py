"""Checks of single values and mappings of a plan file, with errors that explain what to write."""

from __future__ import annotations

import math
import re
from typing import Any

from megatron_lrpath.paradigms import CYCLE_KINDS
from megatron_lrpath.plan.file.keys import STEPS, Key
from megatron_lrpath.plan.file.source import Entry, Scalar
from megatron_lrpath.schedule.styles import within
from megatron_lrpath.wording import nearest


def read_section(entry: Entry, keys: tuple[Key, ...]) -> dict[str, Entry]:
    """Return the entries of a mapping by key.

    Raise PlanError if it is not a mapping, has an unknown key (with the most similar known one), or lacks
    a key.
    """
    section = read_mapping(entry)
    known = [key.name for key in keys]
    for name, child in section.items():
        if name not in known:
            raise child.error(f"unknown key{nearest(name, known)}; known keys: {', '.join(known)}")
    for key in keys:
        if key.required and (key.name not in section or section[key.name].value is None):
            place = section.get(key.name, entry)
            raise place.error(f"the key {key.name!r} is missing: {key.about}")
    return section


def read_mapping(entry: Entry) -> dict[str, Entry]:
    """Return the entries of a mapping; raise PlanError for other values."""
    if isinstance(entry.value, dict):
        return entry.value
    raise entry.error(f"must be a mapping, lines of `key: value`, not {described(entry)}")


def read_list(entry: Entry) -> list[Entry]:
    """Return the entries of a list; raise PlanError for other values."""
    if isinstance(entry.value, list):
        return entry.value
    raise entry.error(f"must be a list, not {described(entry)}")


def read_key(section: dict[str, Entry], key: Key) -> Any:
    """Return the checked value of a key in its section, or the default."""
    entry = section.get(key.name)
    if entry is None or entry.value is None:
        return key.default
    return read_value(entry, key.schema)


def read_value(entry: Entry, schema: dict[str, Any]) -> Any:
    """Return the value of an entry, checked against a schema of type integer, number, string or array of
    numbers.
    """
    if schema["type"] == "array":
        items = read_list(entry)
        if not schema["minItems"] <= len(items) <= schema["maxItems"]:
            raise entry.error(f"must be a list of {schema['minItems']} numbers, not of {len(items)}")
        return tuple(read_value(item, schema["items"]) for item in items)
    if schema["type"] == "string":
        return _text(entry, schema)
    return _number(entry, schema)


def read_cycle(entry: Entry | None) -> dict[str, float]:
    """Return `cycle_steps` as a length for each kind of run: from a number or `inf`, or a mapping."""
    if entry is None or entry.value is None:
        return {}
    if not isinstance(entry.value, dict):
        return dict.fromkeys(CYCLE_KINDS, _cycle_length(entry))
    for kind, child in entry.value.items():
        if kind not in CYCLE_KINDS:
            hint = nearest(kind, CYCLE_KINDS)
            raise child.error(f"unknown kind of run{hint}; give {', '.join(CYCLE_KINDS)}")
    return {kind: _cycle_length(child) for kind, child in entry.value.items()}


def read_scalar(entry: Entry) -> Scalar:
    """Return the value of an argument: true, false, a finite number or text; raise PlanError for other
    values.
    """
    value = entry.value
    if value is None or isinstance(value, list | dict):
        raise entry.error(f"must be true, false, a number, text or a list of them, not {described(entry)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise entry.error(f"must be finite, not {value}")
    if isinstance(value, str) and "\0" in value:
        raise entry.error("must not contain a NUL character")
    return value


def described(entry: Entry) -> str:
    """Return a value for an error message, truncated."""
    if isinstance(entry.value, dict):
        return "a mapping"
    if isinstance(entry.value, list):
        return "a list"
    if entry.value is None:
        return "empty"
    text = repr(entry.value) if not isinstance(entry.value, bool) else str(entry.value).lower()
    return text if len(text) <= 60 else text[:57] + "..."


def _text(entry: Entry, schema: dict[str, Any]) -> str:
    value = entry.value
    if not isinstance(value, str):
        hint = "; put it in quotes" if isinstance(value, bool | int | float) else ""
        raise entry.error(f"must be text, not {described(entry)}{hint}")
    if "enum" in schema:
        choices = schema["enum"]
        if value not in choices:
            hint = nearest(value, choices)
            raise entry.error(f"{value!r} is none of {', '.join(choices)}{hint}")
    elif "pattern" in schema:
        if not re.fullmatch(schema["pattern"], value):
            raise entry.error(
                f"{described(entry)} cannot name a folder; use up to 100 letters, digits, `.`, `_` and `-`, "
                "a letter or digit first"
            )
    elif not value.strip() or "\0" in value or len(value) > schema["maxLength"]:
        raise entry.error("must not be empty or overlong")
    return value


def _number(entry: Entry, schema: dict[str, Any]) -> int | float:
    value = entry.value
    kind = "a whole number" if schema["type"] == "integer" else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise entry.error(f"must be {kind}, not {described(entry)}")
    if not math.isfinite(value):
        raise entry.error(f"must be {kind} and finite, not {value}")
    if schema["type"] == "integer" and value != int(value):
        raise entry.error(f"must be a whole number, not {value}")
    if not within(value, schema):
        low = (
            f"at least {schema['minimum']}" if "minimum" in schema else f"above {schema['exclusiveMinimum']}"
        )
        high = (
            f"at most {schema['maximum']}" if "maximum" in schema else f"below {schema['exclusiveMaximum']}"
        )
        raise entry.error(f"must be {low} and {high}, not {described(entry)}")
    return int(value) if schema["type"] == "integer" else float(value)


def _cycle_length(entry: Entry) -> float:
    if entry.value in ("inf", math.inf):
        return math.inf
    return int(_number(entry, STEPS))

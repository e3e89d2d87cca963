"""Checks of single values and mappings of a plan file, with errors that say what to write."""

from __future__ import annotations

import math
import re
from typing import Any

from megatron_lrpath.paradigms import CYCLE_KINDS
from megatron_lrpath.plan.file.keys import STEPS, Key
from megatron_lrpath.plan.file.source import Entry, Scalar, Source
from megatron_lrpath.schedule.styles import within
from megatron_lrpath.wording import nearest

_ARGUMENT = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def read_section(source: Source, entry: Entry, keys: tuple[Key, ...]) -> dict[str, Entry]:
    """The entries of a mapping by key.

    Raises PlanError for something else than a mapping, an unknown key (naming the nearest known one), or a
    missing key.
    """
    section = read_mapping(source, entry)
    known = [key.name for key in keys]
    for name, child in section.items():
        if name not in known:
            raise source.error(child, f"unknown key{nearest(name, known)}; known keys: {', '.join(known)}")
    for key in keys:
        if key.required and (key.name not in section or section[key.name].value is None):
            place = section.get(key.name, entry)
            raise source.error(place, f"the key {key.name!r} is missing: {key.about}")
    return section


def read_mapping(source: Source, entry: Entry) -> dict[str, Entry]:
    """The entries of a mapping; PlanError for anything else."""
    if isinstance(entry.value, dict):
        return entry.value
    raise source.error(entry, f"must be a mapping, lines of `key: value`, not {described(entry)}")


def read_list(source: Source, entry: Entry) -> list[Entry]:
    """The entries of a list; PlanError for anything else."""
    if isinstance(entry.value, list):
        return entry.value
    raise source.error(entry, f"must be a list, not {described(entry)}")


def read_key(source: Source, section: dict[str, Entry], key: Key) -> Any:
    """The checked value of a key in its section, or the default."""
    entry = section.get(key.name)
    if entry is None or entry.value is None:
        return key.default
    return read_value(source, entry, key.schema)


def read_value(source: Source, entry: Entry, schema: dict[str, Any]) -> Any:
    """The value of an entry, checked against a schema of type integer, number, string or array of numbers."""
    if schema["type"] == "array":
        items = read_list(source, entry)
        if not schema["minItems"] <= len(items) <= schema["maxItems"]:
            raise source.error(entry, f"must be a list of {schema['minItems']} numbers, not of {len(items)}")
        return tuple(read_value(source, item, schema["items"]) for item in items)
    if schema["type"] == "string":
        return _text(source, entry, schema)
    return _number(source, entry, schema)


def read_cycle(source: Source, entry: Entry | None) -> dict[str, float]:
    """`cycle_steps` as a length for each kind of run it was given for: a number or `inf`, or a mapping."""
    if entry is None or entry.value is None:
        return {}
    if not isinstance(entry.value, dict):
        length = _cycle_length(source, entry)
        return dict.fromkeys(CYCLE_KINDS, length)
    for kind, child in entry.value.items():
        if kind not in CYCLE_KINDS:
            hint = nearest(kind, CYCLE_KINDS)
            raise source.error(child, f"unknown kind of run{hint}; give {', '.join(CYCLE_KINDS)}")
    return {kind: _cycle_length(source, child) for kind, child in entry.value.items()}


def read_arguments(source: Source, entry: Entry | None) -> dict[str, Any]:
    """A mapping of Megatron arguments, its keys with underscores; values are scalars or lists of them."""
    if entry is None or entry.value is None:
        return {}
    arguments: dict[str, Any] = {}
    for written, child in read_mapping(source, entry).items():
        name = written.replace("-", "_")
        if not _ARGUMENT.fullmatch(written):
            raise source.error(child, "not the name of an argument; write it without the dashes before it")
        if name in arguments:
            raise source.error(child, "given twice, with `-` and with `_`; keep one of them")
        if isinstance(child.value, list):
            arguments[name] = [_scalar(source, item) for item in child.value]
        else:
            arguments[name] = _scalar(source, child)
    return arguments


def described(entry: Entry) -> str:
    """A value as an error message names it, cut short."""
    if isinstance(entry.value, dict):
        return "a mapping"
    if isinstance(entry.value, list):
        return "a list"
    if entry.value is None:
        return "empty"
    text = repr(entry.value) if not isinstance(entry.value, bool) else str(entry.value).lower()
    return text if len(text) <= 60 else text[:57] + "..."


def _text(source: Source, entry: Entry, schema: dict[str, Any]) -> str:
    value = entry.value
    if not isinstance(value, str):
        hint = "; put it in quotes" if isinstance(value, bool | int | float) else ""
        raise source.error(entry, f"must be text, not {described(entry)}{hint}")
    if "enum" in schema:
        choices = schema["enum"]
        if value not in choices:
            hint = nearest(value, choices)
            raise source.error(entry, f"{value!r} is none of {', '.join(choices)}{hint}")
    elif "pattern" in schema:
        if not re.fullmatch(schema["pattern"], value):
            raise source.error(
                entry,
                f"{described(entry)} cannot name a folder; use up to 100 letters, digits, `.`, `_` and `-`, "
                "a letter or digit first",
            )
    elif not value.strip() or "\0" in value or len(value) > schema["maxLength"]:
        raise source.error(entry, "must not be empty or overlong")
    return value


def _number(source: Source, entry: Entry, schema: dict[str, Any]) -> int | float:
    value = entry.value
    kind = "a whole number" if schema["type"] == "integer" else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise source.error(entry, f"must be {kind}, not {described(entry)}")
    if not math.isfinite(value):
        raise source.error(entry, f"must be {kind} and finite, not {value}")
    if schema["type"] == "integer" and value != int(value):
        raise source.error(entry, f"must be a whole number, not {value}")
    if not within(value, schema):
        raise source.error(entry, f"must be {_range(schema)}, not {described(entry)}")
    return int(value) if schema["type"] == "integer" else float(value)


def _range(schema: dict[str, Any]) -> str:
    low = f"at least {schema['minimum']}" if "minimum" in schema else f"above {schema['exclusiveMinimum']}"
    high = f"at most {schema['maximum']}" if "maximum" in schema else f"below {schema['exclusiveMaximum']}"
    return f"{low} and {high}"


def _cycle_length(source: Source, entry: Entry) -> float:
    if entry.value in ("inf", math.inf):
        return math.inf
    return int(_number(source, entry, STEPS))


def _scalar(source: Source, entry: Entry) -> Scalar:
    value = entry.value
    if value is None or isinstance(value, list | dict):
        raise source.error(
            entry, f"must be true, false, a number, text or a list of them, not {described(entry)}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise source.error(entry, f"must be finite, not {value}")
    if isinstance(value, str) and "\0" in value:
        raise source.error(entry, "must not contain a NUL character")
    return value

"""The table of the arguments of Megatron and of this project: their values, and their effect on a run.

`megatron_arguments.toml` has the classes, edited by hand; `megatron_parser.json` the parser's options,
written by `scripts/megatron_arguments.py`. Both are read without torch, so that a plan's arguments are
checked when it is read.
"""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lrpath.reading import read_json
from megatron_lrpath.schedule.styles import within
from megatron_lrpath.wording import nearest

TABLE_FILE = Path(__file__).with_name("megatron_arguments.toml")
PARSER_FILE = Path(__file__).with_name("megatron_parser.json")

NEUTRAL, IDENTITY, SET, REFUSED, START = CLASSES = ("neutral", "identity", "set", "refused", "start")
PLAN, PATH = WAYS = ("plan", "path")
"""The ways to describe a run: --plan, and --lr-path with its companions."""

NOTHING = "nothing"
MEGATRON = "0.19"
"""The version of Megatron whose arguments are in the table."""


@dataclass(frozen=True)
class Argument:
    """A row of the table.

    Attributes:
        name: the parser's destination.
        forms: its spellings, an entry for each option (`no_rope_fusion`) and its values.
        plan, path: its class for a run of a plan, and for a run by --lr-path.
        reason: why it has this class.
        refusal: why it, or some of its values, is refused.
        instead: the replacement if it is refused: `nothing`, `nothing: why`, or its name.
        key: the key of a plan that sets it, instead of `model` and `megatron`.
        allowed, refused_values: if only some values are refused.
        branch: whether a plan's branches can have another value than its main path.
        script: the content of a user's script that reads it, if nothing else does: `a hybrid model`.
    """

    name: str
    forms: Mapping[str, Form]
    plan: str
    path: str
    reason: str = ""
    refusal: str = ""
    instead: str = ""
    key: str = ""
    allowed: tuple[str, ...] = ()
    refused_values: tuple[str, ...] = ()
    branch: bool = False
    script: str = ""

    @property
    def option(self) -> str:
        """The option as on a command line."""
        own = [form for form in self.forms.values() if form.spelling.replace("-", "_") == self.name]
        return "--" + (own or list(self.forms.values()))[0].spelling

    def class_for(self, way: str) -> str:
        """Return the class for this way of describing a run."""
        return self.plan if way == PLAN else self.path

    def refuses(self, way: str, value: Any) -> bool:
        """Return whether the argument is refused with this value (parsed, or from a plan)."""
        if self.class_for(way) == REFUSED:
            return True
        words = {str(getattr(one, "name", one)) for one in (value if isinstance(value, list) else [value])}
        return bool((self.allowed and words - set(self.allowed)) or words & set(self.refused_values))

    def why(self, way: str) -> str:
        """Return the reason for the refusal and the replacement, as the end of a sentence."""
        nothing, _, because = self.instead.partition(NOTHING)
        instead = f"in its place: {self.instead}" if nothing or not self.instead else f"leave it out{because}"
        refusal = "" if way == PATH and self.plan == SET else self.refusal
        return "; ".join(part for part in (refusal, instead if self.instead else "") if part)


def sections(kind: str) -> list[dict[str, Any]]:
    """Return the sections `[[kind]]` of the table's file: group, range, need or companion."""
    return list(_content()[kind])


@functools.cache
def _content() -> dict[str, Any]:
    return tomllib.loads(TABLE_FILE.read_text(encoding="utf-8"))


@functools.cache
def table() -> dict[str, Argument]:
    """Return every argument by its destination."""
    classes = {name: group for group in sections("group") for name in group["names"].split()}
    bounds = {
        name: {limit: row[limit] for limit in LIMITS if limit in row}
        for row in sections("range")
        for name in row["names"].split()
    }
    forms: dict[str, dict[str, Form]] = {name: {} for name in classes}
    for fact in parser_facts():
        for spelling in fact["options"]:
            form = Form(
                spelling,
                fact["type"],
                fact.get("nargs"),
                tuple(fact.get("choices", ())),
                bounds.get(fact["name"], {}) if fact["type"] in ("int", "float") else {},
            )
            forms.setdefault(fact["name"], {})[spelling.replace("-", "_")] = form
    return {name: _argument(name, group, forms[name]) for name, group in classes.items()}


def parser_facts() -> list[dict[str, Any]]:
    """Return the parser's options, a row for each of its actions: name, options, type, nargs, choices."""
    return list(read_json(PARSER_FILE))


def _argument(name: str, group: dict[str, Any], forms: dict[str, Form]) -> Argument:
    fields: dict[str, Any] = {way: group.get("class") or group[way] for way in WAYS}
    fields |= {
        field: group[field]
        for field in ("reason", "refusal", "instead", "key", "branch", "script")
        if field in group
    }
    fields |= {field: tuple(group[field]) for field in ("allowed", "refused_values") if field in group}
    return Argument(name, forms, **fields)


@functools.cache
def by_option() -> dict[str, Argument]:
    """Return every argument by each of its options, with underscores."""
    return {spelling: argument for argument in table().values() for spelling in argument.forms}


def find(name: str) -> Argument | None:
    """Return the argument of an option or a destination (with underscores); None if it is not classified."""
    return by_option().get(name) or table().get(name)


def is_neutral(name: str) -> bool:
    """Return whether an argument, named as above, does not affect the result of a run."""
    argument = find(name)
    return argument is not None and NEUTRAL in (argument.plan, argument.path)


def flag(destination: str) -> str:
    """Return the command-line form of `train_iters`: `--train-iters`."""
    argument = table().get(destination)
    return argument.option if argument else "--" + destination.replace("_", "-")


def hint(name: str, besides: Iterable[str] = ()) -> str:
    """Return ` (did you mean …?)` for an unknown name, empty if no known name is similar."""
    return nearest(name, [*by_option(), *besides])


def option_hint(option: str) -> str:
    """Return ` (did you mean '--log-interval'?)` for an unknown option of a command line, empty if none is
    similar.
    """
    return nearest(option, ["--" + name.replace("_", "-") for name in by_option()])


_CONVERT: dict[str, Callable[[str], object]] = {"int": int, "float": float, "text": str}
_KINDS = {"int": "a whole number", "float": "a number", "text": "text"}
LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
"""The limits of a range, as in JSON schemas, in words."""


@dataclass(frozen=True)
class Form:
    """An option and its values.

    Attributes:
        spelling: the option without its dashes.
        type: flag, int, float or text (including text with a format of Megatron's own).
        nargs: None for one value, a number, `+` or `*`.
        choices: the possible values; empty if any is accepted.
        bounds: the range of a number, by the keys of `LIMITS`; empty if any is accepted.
    """

    spelling: str
    type: str
    nargs: int | str | None
    choices: tuple[Any, ...]
    bounds: Mapping[str, float] = field(default_factory=dict)

    def problem(self, value: Any) -> str | None:
        """Return the problem with a value in a plan; None if the parser accepts it. false omits the option."""
        if value is False:
            return None
        if self.type == "flag":
            return None if value is True else f"is a flag: give true or false, not {value!r}"
        if value is True:
            return f"needs {self._wanted()}, not true"
        if isinstance(value, list) and self.nargs is None:
            return f"takes one value ({self._wanted()}), not a list"
        values = value if isinstance(value, list) else [value]
        if (isinstance(self.nargs, int) and len(values) != self.nargs) or (self.nargs == "+" and not values):
            return f"takes {self.nargs if self.nargs != '+' else 'one or more'} values, not {len(values)}"
        return next((said for one in values if (said := self._item_problem(one))), None)

    def _wanted(self) -> str:
        return f"one of {', '.join(map(str, self.choices))}" if self.choices else _KINDS[self.type]

    def _item_problem(self, value: Any) -> str | None:
        if isinstance(value, bool):
            return f"must be {self._wanted()}, not {str(value).lower()}"
        text = repr(value) if isinstance(value, float) else str(value)
        try:
            converted = _CONVERT[self.type](text)
        except ValueError:
            return f"must be {_KINDS[self.type]}, not {value!r}"
        if isinstance(converted, float) and not math.isfinite(converted):
            return f"must be a finite number, not {text}"
        if self.choices and converted not in self.choices:
            known = [str(one) for one in self.choices]
            return f"{value!r} is none of {', '.join(known)}{nearest(text, known)}"
        if isinstance(converted, int | float) and not within(converted, self.bounds):
            limits = [f"{LIMITS[limit]} {bound:g}" for limit, bound in self.bounds.items()]
            return f"must be {' and '.join(limits)}, not {text}"
        return None

    def schema(self, allowed: tuple[Any, ...] = (), refused: tuple[Any, ...] = ()) -> dict[str, Any]:
        """Return the JSON schema of the values in a plan file; of the choices, those that are `allowed` and
        not `refused`.
        """
        if self.type == "flag":
            return {"type": "boolean"}
        item: dict[str, Any] = (
            {"enum": [one for one in allowed or self.choices if one not in refused]}
            if self.choices
            else {"type": {"int": ["integer"], "float": ["number"], "text": ["string", "number"]}[self.type]}
            | {**self.bounds}
        )
        numbers = [{"type": "string"}] if self.type in ("int", "float") and not self.choices else []
        one = [item, *numbers, {"const": False}]
        return {"anyOf": one if self.nargs is None else [*one, {"type": "array", "items": item}]}

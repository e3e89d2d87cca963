"""The values that Megatron's parser accepts for an option, in the form of a plan file."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_lrpath.wording import nearest

_CONVERT: dict[str, Callable[[str], object]] = {"int": int, "float": float, "text": str}
_KINDS = {"int": "a whole number", "float": "a number", "text": "text"}


@dataclass(frozen=True)
class Form:
    """An option and its values.

    Attributes:
        spelling: the option without its dashes.
        type: flag, int, float or text (including text with a format of Megatron's own).
        nargs: None for one value, a number, `+` or `*`.
        choices: the possible values; empty if any is accepted.
    """

    spelling: str
    type: str
    nargs: int | str | None
    choices: tuple[Any, ...]

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
        )
        numbers = [{"type": "string"}] if self.type in ("int", "float") and not self.choices else []
        one = [item, *numbers, {"const": False}]
        return {"anyOf": one if self.nargs is None else [*one, {"type": "array", "items": item}]}

"""One key of a plan file as data, and the schemas that keys have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SAFE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
REQUIRED = object()


@dataclass(frozen=True)
class Key:
    """One key: `schema` is its JSON schema; `default` is what is taken when it is left out, or REQUIRED."""

    name: str
    schema: dict[str, Any]
    default: Any
    about: str

    @property
    def required(self) -> bool:
        """Whether a plan without this key is refused."""
        return self.default is REQUIRED


def whole(minimum: int, maximum: int) -> dict[str, Any]:
    """The schema of a whole number from `minimum` to `maximum`."""
    return {"type": "integer", "minimum": minimum, "maximum": maximum}


def choice(*values: str) -> dict[str, Any]:
    """The schema of one of some words."""
    return {"type": "string", "enum": list(values)}


TEXT = {"type": "string", "minLength": 1, "maxLength": 4096}
NAME = {"type": "string", "pattern": f"^{SAFE_NAME}$"}
ALPHA = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
SHARE = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
SEED = whole(1, 2**31 - 1)
STEPS = whole(1, 10**9)
RATE = {"type": "number", "exclusiveMinimum": 0, "maximum": 1000}
MIN_RATE = {"type": "number", "minimum": 0, "maximum": 1000}

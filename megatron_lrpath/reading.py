"""The only reader of JSON: it returns a value within bounds, or raises an error with one sentence about the
cause.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from megatron_lrpath.errors import UserError, cause

MAXIMUM_BYTES = 64 * 2**20  # of a file; the largest, tokenizers and manifests, have a few MB
MAXIMUM_DEPTH = 64  # of nested lists and objects
MAXIMUM_DIGITS = 400  # of a number, as written
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # an escaped half of a surrogate pair; as bytes it is not UTF-8


class UnreadableError(ValueError):
    """The content of a file cannot be used; the text gives the reason, without the file's name."""


def parse_json(content: bytes | str, own: bool = False) -> Any:
    """Parse the JSON value in `content`: depth at most `MAXIMUM_DEPTH`, finite numbers, valid text.

    An integer beyond 64 bits is returned as a float.

    Args:
        content: bytes must be UTF-8.
        own: whether this package wrote the file, where a loss can be `NaN` or `Infinity`: both become NaN. In other
            files they are refused.

    Raises:
        UnreadableError: it is not JSON, or exceeds the bounds.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        value = (_OWN if own else _STRICT).decode(text)
    except UnreadableError:
        raise
    except UnicodeDecodeError as error:
        raise UnreadableError(f"not UTF-8 text at byte {error.start + 1}") from None
    except RecursionError:
        raise UnreadableError(f"nested more than {MAXIMUM_DEPTH} levels deep") from None
    except ValueError as error:
        raise UnreadableError(f"not JSON: {error}") from None
    _check_depth(value)
    if _HALF_PAIR.search(text):
        _check_text(value)
    return value


def read_json(path: Path, maximum: int = MAXIMUM_BYTES, own: bool = False) -> Any:
    """Read the JSON value in a file of at most `maximum` bytes, see `parse_json`.

    Raises:
        OSError: the file cannot be read.
        UnreadableError: it is too large, is not JSON, or exceeds the bounds.
    """
    with path.open("rb") as stream:
        about = os.fstat(stream.fileno())
        if about.st_size > maximum:
            raise UnreadableError(f"it has {about.st_size} bytes, more than the {maximum} allowed")
        return parse_json(stream.read(about.st_size), own)


def read_object(path: Path, maximum: int = MAXIMUM_BYTES, own: bool = False) -> dict[str, Any]:
    """Read the JSON object in a file, see `read_json`."""
    value = read_json(path, maximum, own)
    if not isinstance(value, dict):
        raise UnreadableError(f"it is not a JSON object, but {_kind(value)}")
    return value


def required_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a required file, see `read_json`; raise UserError if that fails."""
    try:
        return read_object(path)
    except (OSError, UnreadableError) as error:
        raise UserError(f"{path}: not a JSON file that can be used ({why(error)}).") from None


def why(error: BaseException) -> str:
    """Return the problem with a file, as part of a sentence, for an OSError or an UnreadableError."""
    if isinstance(error, OSError):
        return cause(error)
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return str(error) or type(error).__name__


def _kind(value: Any) -> str:
    """Return the kind of a JSON value, for messages."""
    names = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _whole(text: str) -> int | float:
    if len(text) > MAXIMUM_DIGITS:
        raise UnreadableError(f"a number of {len(text)} digits")
    value = int(text)
    return value if -(2**63) <= value < 2**64 else _decimal(text)


def _decimal(text: str) -> float:
    if len(text) > MAXIMUM_DIGITS:
        raise UnreadableError(f"a number of {len(text)} digits")
    value = float(text)
    if math.isinf(value):
        raise UnreadableError(f"the number {text[:20]} is too large")
    return value


def _refused(name: str) -> float:
    raise UnreadableError(f"{name} is no JSON")


_STRICT = json.JSONDecoder(parse_int=_whole, parse_float=_decimal, parse_constant=_refused)
_OWN = json.JSONDecoder(parse_int=_whole, parse_float=_decimal, parse_constant=lambda name: math.nan)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAXIMUM_DEPTH + 1):
        level = [
            child
            for one in level
            if isinstance(one, dict | list)
            for child in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    raise UnreadableError(f"nested more than {MAXIMUM_DEPTH} levels deep")


def _check_text(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise UnreadableError("half a surrogate pair, which is no text") from None


def build[Kind](kind: type[Kind], row: Any) -> Kind:
    """Build the dataclass `kind` from a JSON object of its fields; a list becomes a tuple.

    Raises:
        UnreadableError: it is not an object, or a field is unknown, missing, or has another type.
    """
    if not isinstance(row, dict):
        raise UnreadableError(f"not a JSON object, but {_kind(row)}")
    hints = get_type_hints(kind)
    wrong = [name for name, value in row.items() if name not in hints or not _fits(value, hints[name])]
    if wrong:
        raise UnreadableError(f"`{wrong[0][:40]}` is unknown, or has another type")
    try:
        return kind(**{name: tuple(one) if isinstance(one, list) else one for name, one in row.items()})
    except TypeError as error:
        raise UnreadableError(str(error)) from None


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a JSON value has a type: bool, int, float, str, None, tuples of these, or a union."""
    if isinstance(hint, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and all(_fits(one, get_args(hint)[0]) for one in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is (NoneType if hint is None else hint)

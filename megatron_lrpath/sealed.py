"""JSON files of this package that carry a checksum of their own: what was changed since is not taken for what was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lrpath.files import atomic_write_json
from megatron_lrpath.reading import MAXIMUM_BYTES, UnreadableError, read_object

SEAL = "content_sha256"


def json_digest(value: Any) -> str:
    """The SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_sealed(path: Path | str, value: Mapping[Any, Any]) -> None:
    """Write an object as JSON, atomically, with the digest of its other fields in `SEAL`."""
    written = json.loads(json.dumps(value))  # keys that are numbers become text
    atomic_write_json(path, {**value, SEAL: json_digest(written)})


def read_sealed(path: Path, maximum: int = MAXIMUM_BYTES) -> tuple[dict[str, Any], bool]:
    """The object in a file without its checksum, and whether it had one: files of earlier versions have none.

    Raises:
        OSError: the file cannot be read.
        UnreadableError: it holds no JSON object, or another one than was written.
    """
    value = read_object(path, maximum, own=True)
    if SEAL not in value:
        return value, False
    seal = value.pop(SEAL)
    if seal != json_digest(value):
        raise UnreadableError("damaged: it holds something else than was written")
    return value, True

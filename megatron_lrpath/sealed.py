"""JSON files of this package with a checksum, so that later changes are detected."""

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
    """Return the SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_sealed(path: Path | str, value: Mapping[Any, Any]) -> None:
    """Write an object as JSON, atomically, with the digest of its other fields in `SEAL`."""
    written = json.loads(json.dumps(value))  # keys that are numbers become text
    atomic_write_json(path, {**value, SEAL: json_digest(written)})


def read_sealed(path: Path, maximum: int = MAXIMUM_BYTES) -> tuple[dict[str, Any], bool]:
    """Return the object in a file without its checksum, and whether it had one (files of earlier versions
    have none).

    Raises:
        OSError: the file cannot be read.
        UnreadableError: it is not a JSON object, or does not match its checksum.
    """
    return unsealed(read_object(path, maximum, own=True))


def unsealed(value: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return an object without its checksum, and whether it had one. Raise UnreadableError if they do not match."""
    content = {name: entry for name, entry in value.items() if name != SEAL}
    if SEAL in value and value[SEAL] != json_digest(content):
        raise UnreadableError("damaged: its content does not match its checksum")
    return content, SEAL in value

"""What a checkpoint consists of: `manifest.json`, written last, checked on loading.

The checksum is XXH3 (128 bits): it finds every accident and costs a fraction of reading the file. It is no
protection against somebody who changes a checkpoint on purpose, and its manifest with it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from megatron_lrpath.files import atomic_write_json

MANIFEST = "manifest.json"
FORMAT = 1
MAXIMUM_BYTES = 64 * 2**20  # of the manifest itself; a file a rank and thread makes 100 bytes each
CHUNK = 4 * 2**20  # bytes read at a time
_RANK_FILE = re.compile(r"__(\d{1,9})_\d+\.distcp")


class ManifestError(ValueError):
    """A manifest that cannot be used; the text says why."""


@dataclass(frozen=True)
class FileSum:
    """A file's size in bytes and the XXH3-128 of its content in hexadecimal."""

    bytes: int
    xxh3_128: str


def sum_file(path: Path) -> FileSum:
    """Read a file and sum it."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(CHUNK))
    size = 0
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return FileSum(size, digest.hexdigest())


def write_manifest(folder: Path, step: int, sums: Mapping[str, FileSum]) -> None:
    """Write the manifest of the checkpoint of `step` in `folder`; `sums` by file name."""
    files = {name: asdict(sums[name]) for name in sorted(sums)}
    atomic_write_json(folder / MANIFEST, {"format": FORMAT, "step": step, "files": files})


def read_manifest(folder: Path) -> dict[str, FileSum]:
    """The files of a checkpoint by name.

    Raises:
        ManifestError: there is none, or it cannot be used.
    """
    try:
        with (folder / MANIFEST).open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            content = stream.read() if size <= MAXIMUM_BYTES else b""
    except OSError as error:
        raise ManifestError(f"{MANIFEST} cannot be read ({error.strerror})") from None
    if size > MAXIMUM_BYTES:
        raise ManifestError(f"{MANIFEST} has {size} bytes; none has more than {MAXIMUM_BYTES}")
    try:
        value = json.loads(content)
        return parse_manifest(value, folder.name)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{MANIFEST} is damaged ({error})") from None


def parse_manifest(value: object, folder_name: str) -> dict[str, FileSum]:
    """Check a manifest's content for the folder it was found in; raises ValueError."""
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(f"not a manifest of format {FORMAT}")
    step, files = value.get("step"), value.get("files")
    if not isinstance(step, int) or not folder_name.startswith(f"iter_{step:07d}"):
        raise ValueError(f"it belongs to step {step!r}")
    if not isinstance(files, dict) or not files:
        raise ValueError("it lists no files")
    return {name: _file_sum(name, entry) for name, entry in files.items()}


def _file_sum(name: str, entry: object) -> FileSum:
    if name != Path(name).name or name in ("", ".", "..") or "\0" in name:
        raise ValueError(f"{name!r} is no file name")
    size = entry.get("bytes") if isinstance(entry, dict) else None
    checksum = entry.get("xxh3_128") if isinstance(entry, dict) else None
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ValueError(f"{name}: {size!r} is no size")
    if not isinstance(checksum, str) or not re.fullmatch("[0-9a-f]{32}", checksum):
        raise ValueError(f"{name}: {checksum!r} is no checksum")
    return FileSum(size, checksum)


def wrong_sizes(folder: Path, sums: Mapping[str, FileSum]) -> list[str]:
    """What is missing or of another size, in words."""
    found = []
    for name, expected in sums.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
            continue
        if size != expected.bytes:
            found.append(f"{name} has {size} bytes instead of {expected.bytes}")
    return found


def wrong_content(folder: Path, sums: Mapping[str, FileSum], names: Iterable[str]) -> list[str]:
    """Which of `names` do not hold what was written, in words."""
    found = []
    for name in names:
        try:
            actual = sum_file(folder / name)
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
            continue
        if actual != sums[name]:
            found.append(f"{name} holds other bytes than were written")
    return found


def share_of(rank: int, world: int, names: Collection[str]) -> list[str]:
    """The files that `rank` of `world` sums: its own, as its node then has them in memory for loading."""
    owners = {name: int(match[1]) if (match := _RANK_FILE.fullmatch(name)) else 0 for name in names}
    return sorted(name for name, owner in owners.items() if owner % world == rank)

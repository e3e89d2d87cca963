"""Files that are either whole or not there: write aside, sync, rename."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

NAME_LIMIT, PATH_LIMIT = 255, 4095  # bytes, on Linux
ROOM = 300  # bytes, for a run and its longest files below an output


def length_problem(folder: Path | str) -> str | None:
    """Why the file system would not take a folder with runs in it; None where it would. Nothing needs to exist."""
    whole = os.path.abspath(folder)
    longest = max(len(os.fsencode(part)) for part in Path(whole).parts)
    if longest > NAME_LIMIT:
        return (
            f"a folder's name in it has {longest} bytes, and {NAME_LIMIT} is the most; give it a shorter name"
        )
    most, length = PATH_LIMIT - ROOM, len(os.fsencode(whole))
    if length > most:
        return (
            f"the path has {length} bytes, and {most} leave room for the files below it; choose a shorter one"
        )
    return None


@contextmanager
def atomic_open(path: Path | str) -> Iterator[BinaryIO]:
    """Open a file for binary writing that appears under `path` only once the block ends without an error.

    The temporary file lies in the same folder (a rename is atomic only within one file system); data and
    folder entry are synced before and after the rename.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with naming(target), os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o666 & ~current_umask())
        os.replace(name, target)
        sync_folder(target.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the system name `path` where it names no file, as those of writing do not."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    """Write `data` to `path`: a reader sees the old content or the new one, never a part."""
    with atomic_open(path) as stream:
        stream.write(data)


def atomic_write_text(path: Path | str, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: Path | str, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sweep_unfinished(path: Path) -> None:
    """Remove what killed processes left of `atomic_open(path)`. Only for who alone writes that file."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)


@contextmanager
def appearing_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its place once the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o777 & ~current_umask())
        if target.exists():
            shutil.rmtree(target)
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def current_umask() -> int:
    """The process's umask, which `mkstemp` ignores and a finished file should follow."""
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""Atomic writes of files and folders: write to a temporary name, sync, rename."""

from __future__ import annotations

import ctypes
import fcntl
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from megatron_lrpath.errors import UserError

TEMPORARY = ".tmp"  # suffix of unfinished files; `.NAME.xxxxxxxx.tmp` will become NAME
REPLACED = ".old"  # suffix of a file or folder while it is replaced
ABANDONED_SECONDS = 86400.0  # age of abandoned temporary files on a disk without locks
EXCHANGE = 2  # renameat2: RENAME_EXCHANGE
AT_FDCWD = -100
NAME_LIMIT, PATH_LIMIT = 255, 4095  # bytes, on Linux
ROOM = 300  # bytes for a run and its longest file names below an output


def length_problem(folder: Path | str) -> str | None:
    """Return why the file system cannot have a folder of this name with runs, or None; it need not exist."""
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


def named_twice(names: Iterable[Path | str]) -> tuple[str, str] | None:
    """Return the first two names of one file (or dataset), links resolved; None if every name is another's."""
    seen: dict[str, str] = {}
    for name in map(str, names):
        whole = os.path.realpath(name)
        if whole in seen:
            return seen[whole], name
        seen[whole] = name
    return None


def check_prefix(prefix: str, option: str = "--output-prefix") -> None:
    """Raise UserError if a prefix of files' names names a folder: the files would be hidden, or next to it."""
    if not os.path.basename(prefix):
        raise UserError(
            f"{option} {prefix or repr('')}: is a folder; add the beginning of the files' names, as in data/web"
        )


@contextmanager
def atomic_open(path: Path | str, mode: int | None = None) -> Iterator[BinaryIO]:
    """Open a binary file for writing that replaces `path` only if the block ends without an error.

    The file gets the permissions `mode` (default: those of the umask).

    The temporary file is in the same folder, because a rename is atomic only within one file system. Data
    and folder entry are synced before and after the rename. Leftovers of killed processes for the same
    file are removed.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep_abandoned(target)
    descriptor, name = _new_file(target)
    try:
        # the copy keeps the lock until the file has its name
        with naming(target), os.fdopen(os.dup(descriptor), "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o666 & ~current_umask() if mode is None else mode)
        os.replace(name, target)
        sync_folder(target.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _new_file(target: Path) -> tuple[int, str]:
    """Create a temporary file for `target`, locked while its descriptor is open: (descriptor, name)."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=TEMPORARY, dir=target.parent)
        with suppress(OSError):  # a disk without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, name
        os.close(descriptor)  # another process removed it as abandoned before it was locked


def sweep_abandoned(target: Path) -> bool:
    """Remove temporary files that killed writers of `target` left; return whether a process is writing it
    now.
    """
    at_work = False
    for left in target.parent.glob(f".{glob.escape(target.name)}.{'?' * 8}{TEMPORARY}"):
        at_work |= not _remove_abandoned(left)
    return at_work


def _remove_abandoned(path: Path) -> bool:
    """Remove a temporary file or folder unless its writer is alive (it holds the lock); return whether it was
    removed.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:
        return True  # removed in the meantime, or owned by another user
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    except OSError:
        if time.time() - os.fstat(descriptor).st_mtime < ABANDONED_SECONDS:
            os.close(descriptor)
            return False
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    os.close(descriptor)
    return True


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to an OSError without a file name, as raised by writes."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    """Write `data` to `path` atomically: a reader sees the old or the new content, never a part."""
    with atomic_open(path) as stream:
        stream.write(data)


def atomic_rewrite(path: Path | str, data: bytes) -> None:
    """Replace the content of a user's file atomically; links are followed, and its permissions stay."""
    target = Path(path).resolve()
    with atomic_open(target, target.stat().st_mode & 0o7777) as stream:
        stream.write(data)


def atomic_write_text(path: Path | str, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: Path | str, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sweep_unfinished(path: Path) -> None:
    """Remove leftovers of killed `atomic_open(path)` calls. Only the sole writer of the file may call it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)


@contextmanager
def appearing_folder(target: Path) -> Iterator[Path]:
    """Create a folder next to `target` that replaces it if the block ends without an error.

    Until then the existing `target` is kept. Leftovers of killed processes for the same folder are
    removed.

    Raises:
        UserError: another process is writing `target` now.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, folder = _new_folder(target)
    try:
        yield folder
        folder.chmod(0o777 & ~current_umask())
        _put_in_place(folder, target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # the replaced content, or the unfinished one
        os.close(descriptor)


def _new_folder(target: Path) -> tuple[int, Path]:
    """Create a temporary folder for `target`, locked while its descriptor is open: (descriptor, folder)."""
    parent = os.open(target.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # one process at a time looks for leftovers and creates its folder
            fcntl.flock(parent, fcntl.LOCK_EX)
        _restore(target)
        if sweep_abandoned(target):
            raise UserError(
                f"{target}: another process is writing it now. Wait for it; call again if it is still needed then."
            )
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=TEMPORARY, dir=target.parent))
        descriptor = os.open(folder, os.O_RDONLY)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(parent)
    return descriptor, folder


def _put_in_place(folder: Path, target: Path) -> None:
    """Replace `target` with `folder`; the old content is then in `folder`, or removed."""
    if not target.exists():
        folder.rename(target)
        return
    if _exchange(folder, target):
        return
    old = target.with_name(f".{target.name}{REPLACED}")  # a kill in between: `_restore` brings it back
    target.rename(old)
    folder.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _restore(target: Path) -> None:
    """Finish an interrupted replacement: restore the old content, or remove it if its replacement is
    complete.
    """
    old = target.with_name(f".{target.name}{REPLACED}")
    if old.exists() and target.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(target)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically; return whether the kernel and the file system support that."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        done: int = libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), EXCHANGE)
    except AttributeError:  # an old C library
        return False
    return done == 0


def sync_folder(folder: Path) -> None:
    """Sync `folder`, so that a rename in it survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def current_umask() -> int:
    """Return the process's umask, which `mkstemp` ignores and a finished file must follow."""
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""Locks on folders that end with their owner: an advisory `flock` on a file that names who holds it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from megatron_lrpath.files import naming
from megatron_lrpath.reading import read_json

LOCK_NAME = ".lock"
MAX_BYTES = 4096  # of the owner


class LockHeldError(Exception):
    """Somebody else holds the lock; the text names them as far as the file tells."""


class FolderLock:
    """An exclusive lock on `folder`, held through an open file.

    The kernel lets go of it when the last process that has the file open is gone, however it went, so a
    dead owner never blocks the next one. Children that inherit `fileno()` go on holding it.
    """

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.folder = folder
        self._descriptor = descriptor

    @classmethod
    def acquire(cls, folder: Path, patience: float = 1.0) -> FolderLock:
        """Lock `folder` (created when missing), trying for `patience` seconds.

        A reader that looks whether the lock is held takes it for an instant, hence the patience.
        Raises `LockHeldError` when another process holds it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        deadline = time.monotonic() + patience
        while not _try_lock(descriptor, fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                os.close(descriptor)
                raise LockHeldError(describe_owner(folder))
            time.sleep(0.05)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": int(time.time())}
        with naming(folder / LOCK_NAME):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        return cls(folder, descriptor)

    def fileno(self) -> int:
        """The open file's number, to be passed on to a child that is to hold the lock too."""
        return self._descriptor

    def close(self) -> None:
        """Let go here; the lock itself lasts while a child still has it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def is_held(folder: Path) -> bool:
    """Whether some process holds the lock of `folder` now. Needs no right to write there."""
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _try_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def owner_of(folder: Path) -> dict[str, Any]:
    """What the last owner wrote into the lock: `pid`, `host`, `since` (Unix seconds); empty if unreadable."""
    try:
        owner = read_json(folder / LOCK_NAME, MAX_BYTES)
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def describe_owner(folder: Path) -> str:
    """The owner for a message: `process 4711 on node3`."""
    owner = owner_of(folder)
    if "pid" not in owner:
        return "another process"
    return f"process {owner['pid']} on {owner.get('host', 'an unknown host')}"


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

"""Locks on folders that end with their owner: an advisory `flock` on a file that names the owner."""

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
MAX_BYTES = 4096  # of the owner's entry


class LockHeldError(Exception):
    """Another process holds the lock; the text names it if the file does."""


class FolderLock:
    """An exclusive lock on `folder`, held through an open file.

    The kernel releases it when the last process with the open file ends, for any reason, so a dead owner
    never blocks the next one. Children that inherit `fileno()` also hold it.
    """

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.folder = folder
        self._descriptor = descriptor

    @classmethod
    def acquire(cls, folder: Path, patience: float = 1.0) -> FolderLock:
        """Lock `folder` (created if missing); retry for `patience` seconds.

        A reader that tests whether the lock is held acquires it for a moment, so a single try can fail.
        Raise `LockHeldError` if another process holds the lock.
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
        """Return the file descriptor, to be inherited by a child that must also hold the lock."""
        return self._descriptor

    def close(self) -> None:
        """Release the lock in this process; children with the descriptor still hold it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def is_held(folder: Path) -> bool:
    """Return whether a process holds the lock of `folder` now. Needs no write permission."""
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _try_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def owner_of(folder: Path) -> dict[str, Any]:
    """Return the last owner's entry in the lock file: `pid`, `host`, `since` (Unix seconds); empty if
    unreadable.
    """
    try:
        owner = read_json(folder / LOCK_NAME, MAX_BYTES)
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def describe_owner(folder: Path) -> str:
    """Return the owner for a message: `process 4711 on node3`."""
    owner = owner_of(folder)
    if "pid" not in owner:
        return "another process"
    return f"process {owner['pid']} on {owner.get('host', 'an unknown host')}"


def process_space() -> str:
    """Return an identifier of the process-id space, which distinguishes machines and containers with the same
    host name.

    It consists of the kernel's boot id and the namespace of process ids; without /proc it is the host
    name.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

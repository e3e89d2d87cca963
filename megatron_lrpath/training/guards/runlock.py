"""Prevent that two processes train a run: rank 0 holds a lock on the run's checkpoint folder.

The lock is the kernel's (`flock`), which a dead owner never holds; on NFS, and on Lustre with `-o flock`,
it works across machines. If a disk has locks only within one machine, or none, the owner's heartbeat in
the lock file decides: a new owner that finds the name of another machine (or container) there waits for
two heartbeats, and gives up if the file changes. An owner that was suspended for longer finds its
successor's name and ends before it writes.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from megatron_lrpath.errors import FULL, UserError, cause
from megatron_lrpath.locks import (
    LOCK_NAME,
    FolderLock,
    LockHeldError,
    describe_owner,
    owner_of,
    process_space,
)

PATIENCE = 10.0  # seconds for a process that is ending, or its writers, to end
BEAT = 5.0  # seconds between heartbeats
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """The lock on `root`, held until `close` or the end of the process.

    Args:
        root: the checkpoint folder.
        lock: the kernel's lock; None if the file system has no locks.
        lost: ends the process; called with the new owner's name if another process has taken the lock.
    """

    def __init__(self, root: Path, lock: FolderLock | None, lost: Callable[[str], NoReturn]) -> None:
        self.root = root
        self._lock = lock
        self._lost = lost
        self._ended = threading.Event()
        self._beats = 0  # 0: the lock is not confirmed yet
        self._record = {"pid": os.getpid(), "host": socket.gethostname(), "since": int(time.time())}
        # in containers, two owners can have the same process id, host name and second
        self._record |= {"space": process_space(), "token": secrets.token_hex(8)}
        self.write()
        self._thread = threading.Thread(target=self._keep_beating, name="run lock", daemon=True)

    def write(self) -> None:
        """Write the owner into the lock file, with an increasing number."""
        record = {**self._record, "beat": self._beats}
        with (self.root / LOCK_NAME).open("r+b") as stream:
            stream.truncate(stream.write(json.dumps(record).encode()))

    def beat(self) -> None:
        """Write a heartbeat, unless another process has taken the lock.

        The heartbeat also shows a process that is trying to take the lock (whose number is 0) that the
        lock is held.

        Raises:
            LockLostError: another process has taken the lock.
        """
        found = owner_of(self.root)
        if found.get("beat") and not self._is_me(found):
            raise LockLostError(describe_owner(self.root))
        self._beats += 1
        self.write()

    def is_ours(self) -> bool:
        """Return whether the file still names this process as the owner."""
        return self._is_me(owner_of(self.root))

    def start(self) -> None:
        """Confirm the lock, and start the heartbeat."""
        self._beats = 1
        self.write()
        self._thread.start()

    def close(self) -> None:
        """Release the lock and remove the owner's name, so that the next owner need not wait."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        with suppress(FileNotFoundError):  # a rewind has moved the folder away
            (self.root / LOCK_NAME).write_bytes(b"")
        self.give_way()

    def give_way(self) -> None:
        """Release the kernel's lock only: the name in the file is the new owner's."""
        if self._lock is not None:
            self._lock.close()

    def _is_me(self, found: dict[str, Any]) -> bool:
        return all(found.get(key) == value for key, value in self._record.items())

    def _keep_beating(self) -> None:
        while not self._ended.wait(BEAT):
            try:
                self.beat()
            except OSError:
                continue  # a disk that is temporarily unavailable
            except LockLostError as error:
                self._lost(str(error))


class LockLostError(Exception):
    """Another process has taken the lock of the run; the text names it."""


def hold(root: Path, lost: Callable[[str], NoReturn], patience: float = PATIENCE) -> RunLock:
    """Take the lock on the checkpoint folder `root` (created if missing).

    Raises:
        UserError: another process trains this run.
    """
    root.mkdir(parents=True, exist_ok=True)
    before = owner_of(root)
    certain = True
    lock: FolderLock | None = None
    try:
        lock = FolderLock.acquire(root, patience)
    except LockHeldError as error:
        raise UserError(refusal(root, str(error))) from None
    except OSError as error:
        if error.errno in FULL:
            raise
        if error.errno not in NO_LOCKS:
            raise UserError(f"{root}: cannot be locked ({cause(error)}).") from None
        certain = False
    run_lock = RunLock(root, lock, lost)
    # The lock's last owner may be on another machine and may have ended without a record of it.
    elsewhere = bool(before) and not is_here(before)
    if (not certain or elsewhere) and not undisturbed(run_lock):
        run_lock.give_way()
        raise UserError(refusal(root, describe_owner(root)))
    run_lock.start()
    return run_lock


def is_here(owner: dict[str, Any]) -> bool:
    """Return whether an owner has the same kernel and process-id namespace, so that the kernel's lock works
    between them.
    """
    here = owner.get("host") == socket.gethostname()
    return here and owner.get("space", process_space()) == process_space()


def undisturbed(lock: RunLock) -> bool:
    """Return whether no other process writes its name into the lock file for two heartbeats."""
    deadline = time.monotonic() + 2 * BEAT
    while time.monotonic() < deadline:
        time.sleep(BEAT / 10)
        if not lock.is_ours():
            return False
    return True


def refusal(root: Path, owner: str) -> str:
    """Return the message for a second launch."""
    return (
        f"{root}: {owner} is training this run already; a second process would write into its checkpoints. "
        "Wait for it or end it, then call again."
    )

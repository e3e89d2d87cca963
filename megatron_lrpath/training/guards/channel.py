"""Signed values in the ranks' store, whose keys any host on the network can list, change and delete.

Every value carries an HMAC over its key and content under the secret of this start. A value that is
missing, unsigned or foreign is ignored; its author restores it while other ranks may need it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore, Store

from megatron_lrpath.errors import TrainingStoppedError

PREFIX = "lrpath"
SECRET = ".rendezvous-"  # and a digest of the address, so that two launches of one run use different files
STALE_SECONDS = 86400.0  # an older secret is from a killed start
FIRST_PAUSE, LONGEST_PAUSE = 0.02, 0.5  # seconds between polls of the store
ABSENT = "?"  # a value that no rank has signed
TRIES = 20  # to replace a foreign value by a claim


class Channel:
    """The values of this process in the store, and the verified values of the other ranks."""

    def __init__(self, store: Store, secret: bytes) -> None:
        self._store = PrefixStore(PREFIX, store)
        self._secret = secret
        self._own: dict[str, str] = {}

    def put(self, key: str, value: Any) -> None:
        """Write a value (JSON) under `key`; with `restore`, write it again if another process changes it."""
        self._own[key] = self._signed(key, value)
        self._store.set(key, self._own[key])

    def get(self, key: str) -> Any:
        """Return the value that a rank of this start wrote under `key`, or None. Never waits."""
        # `get` would wait for a deleted key, and block other threads' use of the store.
        return self._verified(key, self._store.compare_set(key, ABSENT, ABSENT))

    def claim(self, key: str, value: Any) -> Any:
        """Return the value under `key` of the first rank that claimed it; it is `value` if this rank was
        first.
        """
        text = self._signed(key, value)
        for _ in range(TRIES):
            found = self._store.compare_set(key, "", text)
            if (claimed := self._verified(key, found)) is not None:
                break
            self._store.delete_key(key)
        else:
            claimed = value  # two messages are better than none
        if claimed == value:
            self._own[key] = text
        return claimed

    def wait(self, keys: Sequence[str], patience: timedelta) -> list[Any]:
        """Return the values under `keys` when all of them exist.

        Raises:
            TrainingStoppedError: some are missing after `patience`.
        """
        deadline, pause = time.monotonic() + patience.total_seconds(), FIRST_PAUSE
        while True:
            found = [self.get(key) for key in keys]
            missing = [key for key, value in zip(keys, found, strict=True) if value is None]
            if not missing:
                return found
            if time.monotonic() >= deadline:
                raise TrainingStoppedError(
                    f"no rank has written {', '.join(missing[:4])} into the store for {patience}: a rank "
                    "has stalled, or another host on the network deletes the run's values. Check the output of the "
                    "other ranks, then call again."
                )
            self.restore()
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def restore(self) -> None:
        """Write this process's values again if another process has changed or deleted them."""
        for key, text in list(self._own.items()):
            if self._store.compare_set(key, ABSENT, ABSENT) != text.encode():
                self._store.set(key, text)

    def _signed(self, key: str, value: Any) -> str:
        text = json.dumps(value)
        return f"{self._code(key, text.encode())} {text}"

    def _verified(self, key: str, found: bytes) -> Any:
        code, _, text = found.partition(b" ")
        if not hmac.compare_digest(code, self._code(key, text).encode()):
            return None
        return json.loads(text)

    def _code(self, key: str, text: bytes) -> str:
        return hmac.new(self._secret, key.encode() + b"\0" + text, hashlib.sha256).hexdigest()


def secret_file(folder: Path, address: str) -> Path:
    """Return the file in which rank 0 stores the secret during rendezvous at `address`."""
    return folder / f"{SECRET}{hashlib.sha256(address.encode()).hexdigest()[:12]}"


def meet(store: Store, rank: int, world: int, file: Path, patience: timedelta) -> Channel | None:
    """Agree with the other ranks on a secret that rank 0 generates; None if not all ranks join within
    `patience`.

    The secret is in `file`, readable by the user only, until all ranks have it.

    Raises:
        OSError: rank 0 cannot write the file.
    """
    deadline = time.monotonic() + patience.total_seconds()
    return _lead(store, world, file, deadline) if rank == 0 else _follow(store, rank, file, deadline)


def _lead(store: Store, world: int, file: Path, deadline: float) -> Channel | None:
    secret = secrets.token_bytes(32)
    _write_secret(file, secret)
    try:
        channel = Channel(store, secret)
        keys = [f"here/{rank}" for rank in range(1, world)]
        while None in (marks := [channel.get(key) for key in keys]):
            if time.monotonic() >= deadline:
                return None
            time.sleep(FIRST_PAUSE)
        channel.put("met", marks)
    finally:
        file.unlink(missing_ok=True)
    return channel


def _follow(store: Store, rank: int, file: Path, deadline: float) -> Channel | None:
    mark, channel, known = secrets.token_hex(16), None, b""
    while time.monotonic() < deadline:
        with suppress(OSError):  # not there yet; after the ranks have met it is gone, and this rank has it
            if (secret := file.read_bytes()) and secret != known:
                channel, known = Channel(store, secret), secret  # an earlier start's is replaced
                channel.put(f"here/{rank}", mark)
        if channel is not None:
            met = channel.get("met")
            if met is not None and met[rank - 1] == mark:
                return channel
            channel.restore()
        time.sleep(FIRST_PAUSE)
    return None


def _write_secret(file: Path, secret: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    for other in file.parent.glob(f"{SECRET}*"):
        with suppress(OSError):
            if time.time() - other.stat().st_mtime > STALE_SECONDS:
                other.unlink()
    descriptor, name = tempfile.mkstemp(prefix=f"{file.name}.", dir=file.parent)  # mode 600
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(secret)
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise

"""What a full disk must not end: files and logs whose lines wait in memory until there is room."""

from __future__ import annotations

import functools
import io
import os
import stat
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from megatron_lrpath.errors import FULL
from megatron_lrpath.files import naming
from megatron_lrpath.training.messages import say, warn


def write_waiting(descriptor: int, waiting: bytearray) -> None:
    """Write what waits, and forget of it what is written.

    Raises:
        OSError: a part is not. It follows what is written at the next call, so that no line is torn for good.
    """
    while waiting:
        del waiting[: os.write(descriptor, waiting)]


class PatientFile:
    """An append-only binary file. What the disk refuses waits in memory and is written before what comes later.

    One message says that the disk refuses, another that nothing is missing any more. Threads may share it.

    Args:
        path: the file; it is made with the first bytes.
        what: what it holds, for the messages.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self.what = what
        self._waiting = bytearray()
        self._refused = False
        self._descriptor: int | None = None
        self._lock = threading.Lock()

    @property
    def closed(self) -> bool:
        """Whether no file is open."""
        return self._descriptor is None

    def write(self, data: bytes) -> None:
        """Add `data`, now or when there is room."""
        with self._lock:
            self._waiting += data
            self._try()

    def flush(self) -> None:
        """Try once more to write what waits."""
        with self._lock:
            self._try()

    def sync(self) -> None:
        """Let all that was written survive a power cut.

        Raises:
            OSError: the disk still refuses a part of it; the error names the file.
        """
        with self._lock, naming(self.path):
            self._drain()
            if self._descriptor is not None:
                os.fsync(self._descriptor)

    def close(self) -> None:
        """Try once more, then close the file."""
        with self._lock:
            self._try()
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def _try(self) -> None:
        try:
            self._drain()
        except OSError as error:
            if not self._refused:
                warn(
                    f"{self.path}: {error.strerror}. {self.what} cannot be written and waits in memory; the "
                    "training goes on. Make room: what still waits at its end is lost."
                )
            self._refused = True

    def _drain(self) -> None:
        if self._waiting and self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        if self._descriptor is not None:
            write_waiting(self._descriptor, self._waiting)
        if self._refused:
            say(f"lrpath: {self.path}: written again, nothing is missing.")
        self._refused = False


def wrap_record_writer(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """TensorBoard's event files wait for room too. (Those on object stores are left to TensorBoard.)"""

    @functools.wraps(original)
    def record_writer(writer: Any) -> Any:
        name = os.fsdecode(
            getattr(writer, "filename", b"") or getattr(writer, "name", "")
        )  # TensorFlow's: name
        local = name and "://" not in name
        return original(PatientFile(Path(name), "What TensorBoard shows") if local else writer)

    return record_writer


class PatientLog(io.RawIOBase):
    """Where a log goes; what a full disk refuses waits in memory."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._waiting = bytearray()

    def writable(self) -> bool:
        """Yes."""
        return True

    def fileno(self) -> int:
        """The file's descriptor."""
        return self._descriptor

    def write(self, data: Any) -> int:
        """Write, now or when there is room."""
        self._waiting += data
        try:
            write_waiting(self._descriptor, self._waiting)
        except OSError as error:
            if error.errno not in FULL:
                raise
        return len(data)


_replaced: list[TextIO] = []
"""Streams that would close their descriptors if nobody held them."""


def keep_printing() -> None:
    """Let a print into a file on a full disk wait, not end the process; terminals and pipes stay as they are."""
    _replaced.extend((sys.stdout, sys.stderr))
    sys.stdout, sys.stderr = patient_log(sys.stdout), patient_log(sys.stderr)


def patient_log(stream: TextIO) -> TextIO:
    """The stream, or where it goes to a file another one to the same file that bears a full disk."""
    try:
        descriptor = stream.fileno()
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
    except (OSError, ValueError):
        return stream
    if not is_file:
        return stream
    with suppress(OSError):
        stream.flush()
    buffer = io.BufferedWriter(PatientLog(descriptor))
    return io.TextIOWrapper(buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=True)

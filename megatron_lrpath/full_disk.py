"""What a full disk must not end: files and logs whose lines wait in memory until there is room."""

from __future__ import annotations

import atexit
import io
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from megatron_lrpath.console import say, warn
from megatron_lrpath.errors import cause
from megatron_lrpath.files import naming


def write_waiting(descriptor: int, waiting: bytearray) -> Iterator[bytes]:
    """Write what waits, forget of it what is written, and give that back part by part.

    Raises:
        OSError: a part is not. It follows what is written at the next call, so that no line is torn for good.
    """
    while waiting:
        written = bytes(waiting[: os.write(descriptor, waiting)])
        del waiting[: len(written)]
        yield written


class PatientFile:
    """An append-only binary file. What the disk refuses waits in memory and is written before what comes later.

    One message says that the disk refuses, another that nothing is missing any more. Threads may share it.

    Args:
        path: the file; it is made with the first bytes.
        what: what it holds, for the messages.
        synced: it will be synced: what was not yet is kept, for a disk may take bytes and lose them at the sync.
    """

    def __init__(self, path: Path, what: str, synced: bool = False) -> None:
        self.path = path
        self.what = what
        self._waiting = bytearray()
        self._unsynced: bytearray | None = bytearray() if synced else None
        self._safe = 0  # bytes of the file that were there when it was opened, or are synced
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
                try:
                    os.fsync(self._descriptor)
                except OSError:
                    self._take_back()
                    raise
                if self._unsynced is not None:
                    self._safe += len(self._unsynced)
                    self._unsynced.clear()

    def close(self) -> None:
        """Try once more, then close the file."""
        with self._lock:
            self._try()
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def _take_back(self) -> None:
        """Let what a sync has not saved wait again: the next sync would not tell that it is lost."""
        if self._unsynced and self._descriptor is not None:
            os.ftruncate(self._descriptor, self._safe)
            self._waiting[:0] = self._unsynced
            self._unsynced.clear()

    def _try(self) -> None:
        try:
            self._drain()
        except OSError as error:
            if not self._refused:
                warn(
                    f"{self.path}: {cause(error)}. {self.what} cannot be written and waits in memory; the "
                    "training goes on. Make room: what still waits at its end is lost."
                )
            self._refused = True

    def _drain(self) -> None:
        if self._waiting and self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            self._safe = os.fstat(self._descriptor).st_size
        if self._descriptor is not None:
            for written in write_waiting(self._descriptor, self._waiting):
                if self._unsynced is not None:
                    self._unsynced += written
        if self._refused:
            say(f"lrpath: {self.path}: written again, nothing is missing.")
        self._refused = False


def record_writer(original: Callable[[Any], Any], writer: Any) -> Any:
    """TensorBoard's event files wait for room too. (Those on object stores are left to TensorBoard.)"""
    # TensorFlow's: name.
    name = os.fsdecode(getattr(writer, "filename", b"") or getattr(writer, "name", ""))
    local = name and "://" not in name
    return original(PatientFile(Path(name), "What TensorBoard shows") if local else writer)


@dataclass
class LogFile:
    """The file behind one or more streams of this process, and what the disk has refused of it, in order."""

    descriptor: int
    waiting: bytearray = field(default_factory=bytearray)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, data: Any) -> None:
        """Write, now or when there is room. No error of the disk ends a process for what it prints."""
        with self.lock, suppress(OSError):
            self.waiting += data
            for _ in write_waiting(self.descriptor, self.waiting):
                pass


class PatientLog(io.RawIOBase):
    """Takes the place of `stream`, which goes to the log file; held, since it would close its descriptor."""

    def __init__(self, file: LogFile, stream: TextIO) -> None:
        super().__init__()
        self._file = file
        self._stream = stream

    def writable(self) -> bool:
        """Yes."""
        return True

    def fileno(self) -> int:
        """The stream's own descriptor."""
        return self._stream.fileno()

    def write(self, data: Any) -> int:
        """Write, now or when there is room."""
        self._file.write(data)
        return len(data)


def keep_printing() -> None:
    """Let a print into a file on a full disk wait, not end the process; terminals and pipes stay as they are."""
    files: dict[tuple[int, int], LogFile] = {}
    sys.stdout, sys.stderr = patient_log(sys.stdout, files), patient_log(sys.stderr, files)
    for file in files.values():
        atexit.register(file.write, b"")


def patient_log(stream: TextIO, files: dict[tuple[int, int], LogFile]) -> TextIO:
    """The stream, or where it goes to a file another one to the same file that bears a full disk.

    Streams to one file, by device and inode in `files`, keep their lines in order.
    """
    try:
        descriptor = stream.fileno()
        status = os.fstat(descriptor)
    except (OSError, ValueError):
        return stream
    if not stat.S_ISREG(status.st_mode):
        return stream
    with suppress(OSError):
        stream.flush()
    file = files.setdefault((status.st_dev, status.st_ino), LogFile(descriptor))
    buffer = io.BufferedWriter(PatientLog(file, stream))
    return io.TextIOWrapper(buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=True)

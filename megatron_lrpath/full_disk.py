"""Files and logs that buffer their lines in memory while the disk is full, so that the training continues."""

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
    """Write the buffered parts; remove and yield each part that was written.

    Raises:
        OSError: a part was not fully written. The rest stays queued and is written first at the next call, so that no
            line stays incomplete.
    """
    while waiting:
        written = bytes(waiting[: os.write(descriptor, waiting)])
        del waiting[: len(written)]
        yield written


class PatientFile:
    """An append-only binary file. Data that the disk rejects is buffered in memory and written before later
    data.

    One message reports that the disk rejects writes, another that all data is written. Threads can share
    the object.

    Args:
        path: the file; it is created with the first bytes.
        what: the content, for the messages.
        synced: whether the file will be synced: unsynced data is kept, because a disk can accept bytes and lose them at
            the sync.
    """

    def __init__(self, path: Path, what: str, synced: bool = False) -> None:
        self.path = path
        self.what = what
        self._waiting = bytearray()
        self._unsynced: bytearray | None = bytearray() if synced else None
        self._safe = 0  # bytes of the file that existed when it was opened, or are synced
        self._refused = False
        self._descriptor: int | None = None
        self._lock = threading.Lock()

    @property
    def closed(self) -> bool:
        """Return whether no file is open."""
        return self._descriptor is None

    def write(self, data: bytes) -> None:
        """Add `data`; write it now or when there is space."""
        with self._lock:
            self._waiting += data
            self._try()

    def flush(self) -> None:
        """Retry to write the buffered data."""
        with self._lock:
            self._try()

    def sync(self) -> None:
        """Sync the file, so that all written data survives a power failure.

        Raises:
            OSError: the disk still rejects a part of it; the error names the file.
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
        """Retry once more, then close the file."""
        with self._lock:
            self._try()
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def _take_back(self) -> None:
        """Buffer data again that a sync did not save: the next sync would not report the loss."""
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
                    f"{self.path}: {cause(error)}. {self.what} cannot be written and is buffered in memory; the "
                    "training continues. Free disk space: data still buffered at the end is lost."
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
            say(f"lrpath: {self.path}: the disk accepts writes again, no data is lost.")
        self._refused = False


def record_writer(original: Callable[[Any], Any], writer: Any) -> Any:
    """Buffer TensorBoard's event files, too, except those on object stores."""
    # `name` is the attribute of TensorFlow's writer.
    name = os.fsdecode(getattr(writer, "filename", b"") or getattr(writer, "name", ""))
    local = name and "://" not in name
    return original(PatientFile(Path(name), "What TensorBoard shows") if local else writer)


@dataclass
class LogFile:
    """The file behind one or more streams of this process, and its unwritten data in order."""

    descriptor: int
    waiting: bytearray = field(default_factory=bytearray)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, data: Any) -> None:
        """Write now or when there is space. Disk errors in prints never end the process."""
        with self.lock, suppress(OSError):
            self.waiting += data
            for _ in write_waiting(self.descriptor, self.waiting):
                pass


class PatientLog(io.RawIOBase):
    """A stream that replaces `stream`; it keeps a reference, because closing `stream` would close the
    descriptor.
    """

    def __init__(self, file: LogFile, stream: TextIO) -> None:
        super().__init__()
        self._file = file
        self._stream = stream

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the stream's descriptor."""
        return self._stream.fileno()

    def write(self, data: Any) -> int:
        """Write now or when there is space."""
        self._file.write(data)
        return len(data)


def keep_printing() -> None:
    """Buffer prints into a file on a full disk instead of ending the process; terminals and pipes are
    unchanged.
    """
    files: dict[tuple[int, int], LogFile] = {}
    sys.stdout, sys.stderr = patient_log(sys.stdout, files), patient_log(sys.stderr, files)
    for file in files.values():
        atexit.register(file.write, b"")


def patient_log(stream: TextIO, files: dict[tuple[int, int], LogFile]) -> TextIO:
    """Return the stream, or if it writes to a file, a stream to the same file that tolerates a full disk.

    Streams to one file, identified by device and inode in `files`, keep their lines in order.
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

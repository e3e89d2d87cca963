"""Limits of time and memory for untrusted code, such as a chat template."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

AGAIN = 0.5  # seconds after which code that suppressed the first signal gets another


class TooMuchError(BaseException):  # `except Exception` of the bounded code does not swallow it
    """The limited code exceeded its time or memory."""


@contextmanager
def bounded(seconds: float, extra_bytes: int) -> Iterator[None]:
    """Limit the block to `seconds`, and to `extra_bytes` of address space in addition to the process's
    current size.

    The time is limited only in a process's main thread, because only that thread receives signals.

    Raises:
        TooMuchError: the block exceeds a limit.
    """
    try:
        with _bounded_memory(extra_bytes), _bounded_time(seconds):
            yield
    except MemoryError:
        raise TooMuchError(f"more than {extra_bytes >> 20:,} MiB of memory") from None


@contextmanager
def _bounded_memory(extra_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as stream:
        used = int(stream.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    wanted = used + extra_bytes
    if soft not in (resource.RLIM_INFINITY, -1) and soft <= wanted:
        wanted = soft
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _bounded_time(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expired(number: int, frame: Any) -> None:
        raise TooMuchError(f"more than {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, expired)
    begun = time.monotonic()
    before, interval = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if before:  # the caller's timer
            signal.setitimer(signal.ITIMER_REAL, max(0.001, before - (time.monotonic() - begun)), interval)

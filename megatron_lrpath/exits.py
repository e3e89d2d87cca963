"""The exit statuses of all processes of this project, and the only function that ends a process immediately."""

from __future__ import annotations

import os
from typing import NoReturn

FAILED = 1  # a retry may succeed
BAD_INPUT = 2  # the user must change something first
SAVED_AND_STOPPED = 75  # sysexits.h EX_TEMPFAIL: saved after a signal, to be resumed by a retry
INTERRUPTED = 130
PIPE_CLOSED = 141


def leave_at_once(status: int) -> NoReturn:
    """End this process without cleanup: other threads or ranks might wait forever in a collective."""
    os._exit(status)

"""Let forked processes die with their parent: writers and loaders end when a training is killed.

Importing this module enables the rule for the importing process. Without it, Megatron's processes for
asynchronous saves wait for work forever and keep the run's lock, which they inherit.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading

from megatron_lrpath.exits import leave_at_once

PR_SET_PDEATHSIG = 1


class ForkRule:
    """The process and thread that a forked child was forked from."""

    def __init__(self) -> None:
        self.parent = os.getpid()
        self.from_main_thread = True

    def before_fork(self) -> None:
        """Record the forking process and thread."""
        self.parent = os.getpid()
        self.from_main_thread = threading.current_thread() is threading.main_thread()

    def die_with_parent(self) -> None:
        """Ask the kernel (Linux) for a SIGKILL when the parent process ends."""
        if not self.from_main_thread:
            return  # the kernel already sends it at the end of the forking thread
        function = getattr(ctypes.CDLL(None), "prctl", None)
        if function is not None:
            function(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != self.parent:
            leave_at_once(1)


RULE = ForkRule()
os.register_at_fork(before=RULE.before_fork, after_in_child=RULE.die_with_parent)

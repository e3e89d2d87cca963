"""No process outlives the one that forked it: writers and loaders die with a killed training.

Importing this module registers the rule for the importing process. Megatron's helpers for asynchronous saving
wait for work forever otherwise, and would hold the run's lock, which they inherit.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading

from megatron_lrpath.exits import leave_at_once

PR_SET_PDEATHSIG = 1


class ForkRule:
    """What a forked child must know of the process and the thread that forked it."""

    def __init__(self) -> None:
        self.parent = os.getpid()
        self.from_main_thread = True

    def before_fork(self) -> None:
        """Note who forks."""
        self.parent = os.getpid()
        self.from_main_thread = threading.current_thread() is threading.main_thread()

    def die_with_parent(self) -> None:
        """Ask the kernel (Linux) for a SIGKILL when the process that forked this one ends."""
        if not self.from_main_thread:
            return  # the kernel would send it at the end of the forking thread already
        function = getattr(ctypes.CDLL(None), "prctl", None)
        if function is not None:
            function(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != self.parent:
            leave_at_once(1)


RULE = ForkRule()
os.register_at_fork(before=RULE.before_fork, after_in_child=RULE.die_with_parent)

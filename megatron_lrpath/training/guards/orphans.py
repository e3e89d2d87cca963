"""No process outlives the one that forked it: writers and loaders die with a killed training.

Importing this module registers the rule for the importing process. Megatron's helpers for asynchronous saving
wait for work for ever otherwise, and would hold the run's lock, which they inherit.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading

PR_SET_PDEATHSIG = 1

_parent = os.getpid()
_from_main_thread = True


def die_with_parent() -> None:
    """Ask the kernel (Linux) for a SIGKILL when the process that forked this one ends."""
    if not _from_main_thread:
        return  # the kernel would send it at the end of the forking thread already
    function = getattr(ctypes.CDLL(None), "prctl", None)
    if function is not None:
        function(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != _parent:
        os._exit(1)


def _before_fork() -> None:
    global _parent, _from_main_thread
    _parent = os.getpid()
    _from_main_thread = threading.current_thread() is threading.main_thread()


os.register_at_fork(before=_before_fork, after_in_child=die_with_parent)

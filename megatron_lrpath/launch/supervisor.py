"""The process between the runner and one run: ends the whole run, grandchildren too, when told or left alone.

torchrun puts every worker into a session of its own, so that a signal to its process group does not reach
them, and a killed torchrun leaves them behind. This process is their reaper (Linux:
`PR_SET_CHILD_SUBREAPER`): whatever of the run loses its parent becomes a child of it. It asks the kernel
for a SIGTERM when its own parent dies (`PR_SET_PDEATHSIG`), and asks the same for torchrun. SIGTERM ends
the run with a grace period, SIGINT at once.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
WATCHED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
LEFTOVER_SECONDS = 5.0  # what a run that has ended may still take to clean up


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command until it ends or this process is told to end it; its exit status, 128+n for signal n."""
    parser = argparse.ArgumentParser(prog="python -m megatron_lrpath.launch.supervisor")
    parser.add_argument("--parent", type=int, required=True, help="process id of the runner")
    parser.add_argument("--grace", type=float, required=True, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("--log", type=Path, help="file for the command's output; inherited without")
    parser.add_argument("--pass-fd", type=int, action="append", default=[], help="open file to hand on")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args(argv)
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != args.parent:  # died before the kernel was asked
        return 128 + signal.SIGTERM
    child = start(args.command, args.log, args.pass_fd)
    status = wait(child.pid, args.grace)
    end_leftovers(LEFTOVER_SECONDS)
    return status


def start(command: Sequence[str], log: Path | None, descriptors: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start `command` with the signals unblocked and a SIGTERM due when this process dies."""
    output = log.open("ab") if log else None
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            pass_fds=descriptors,
            preexec_fn=_child_setup(os.getpid()),
        )
    finally:
        if output:
            output.close()


def wait(pid: int, grace: float) -> int:
    """Wait for the command `pid`; on SIGTERM, SIGHUP or SIGINT end it. Returns its exit status."""
    deadline: float | None = None
    while True:
        status = reap(pid)
        if status is not None:
            return status
        if deadline is None:
            received = signal.sigwaitinfo(WATCHED).si_signo
        else:
            info = signal.sigtimedwait(WATCHED, max(0.0, deadline - time.monotonic()))
            received = info.si_signo if info else signal.SIGINT
        if received == signal.SIGINT:
            kill_all(signal.SIGKILL)
            deadline = time.monotonic() + 1.0
        elif received != signal.SIGCHLD and deadline is None:
            os.kill(pid, signal.SIGTERM)  # torchrun hands it on to its workers
            deadline = time.monotonic() + grace


def reap(pid: int) -> int | None:
    """Collect every child that has ended; the exit status of `pid` where it is among them."""
    found: int | None = None
    while True:
        try:
            ended, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if ended == 0:
            return found
        if ended == pid:
            code = os.waitstatus_to_exitcode(status)
            found = code if code >= 0 else 128 - code


def end_leftovers(seconds: float) -> None:
    """End what the command left behind: SIGTERM, and SIGKILL after `seconds`."""
    deadline = time.monotonic() + seconds
    kill_all(signal.SIGTERM)
    while psutil.Process().children():
        if time.monotonic() >= deadline:
            kill_all(signal.SIGKILL)
        reap(-1)
        time.sleep(0.02)


def kill_all(number: signal.Signals) -> None:
    """Send `number` to every descendant."""
    for process in psutil.Process().children(recursive=True):
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def prctl(option: int, value: int) -> None:
    """Linux's prctl(2). Nothing elsewhere: there a SIGKILL of the runner leaves its runs to end alone."""
    function = getattr(ctypes.CDLL(None), "prctl", None)
    if function is not None:
        function(option, ctypes.c_ulong(value), 0, 0, 0)


def _child_setup(parent: int) -> Callable[[], None]:
    def setup() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGTERM)

    return setup


if __name__ == "__main__":
    sys.exit(main())

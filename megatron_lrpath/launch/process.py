"""Run a command as processes: under a supervisor, its output in a log file, the run's folder locked.

torchrun starts every worker in a new session, so that a signal to its process group does not reach the
workers, and a killed torchrun leaves them running. The supervisor (`python -m` this module) is between the
runner and the run and is the subreaper of the run (Linux: `PR_SET_CHILD_SUBREAPER`): orphaned processes of
the run become its children. It asks the kernel for a SIGTERM when its own parent dies
(`PR_SET_PDEATHSIG`), and does the same for torchrun. SIGTERM ends the run with a grace period, SIGINT
immediately.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Protocol

import psutil

from megatron_lrpath.errors import UserError
from megatron_lrpath.exits import SAVED_AND_STOPPED
from megatron_lrpath.launch.torchrun import Ranks
from megatron_lrpath.locks import FolderLock, LockHeldError
from megatron_lrpath.runs import failure
from megatron_lrpath.runs.folder import RunFolder

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
WATCHED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
CLOSING_SECONDS = 30.0  # for ranks to end after another has failed, as under torchrun
LEFTOVER_SECONDS = 5.0  # for an ended run to clean up


@contextmanager
def only_one(folder: Path, doing: str, patience: float = 1.0, without_locks: bool = False) -> Iterator[None]:
    """Hold the lock of `folder`. Raise `UserError`, with what the other process is `doing`, if it is held.

    `without_locks`: continue on a file system without locks, too.
    """
    lock = None
    try:
        lock = FolderLock.acquire(folder, patience)
    except LockHeldError as error:
        raise UserError(f"{folder}: {error} {doing}") from None
    except OSError:
        if not without_locks:
            raise
    try:
        yield
    finally:
        if lock:
            lock.close()


Starter = Callable[[Ranks | Sequence[str], Mapping[str, str], float, Path | None, Sequence[int]], "Process"]
"""Starts a command, or the ranks of a run, under a supervisor: `supervised`, or `warm.start`."""


def supervised(
    command: Ranks | Sequence[str],
    environment: Mapping[str, str],
    grace: float,
    log: Path | None = None,
    descriptors: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `command` under a supervisor that ends it, with all its processes, when this process ends.

    Ranks run under torchrun. `log` is a file for the output; without one it is this process's.

    Call it from the main thread: the kernel sends its signal when the thread that started a process ends.
    """
    argv = command.command if isinstance(command, Ranks) else command
    return subprocess.Popen(
        supervisor_command(argv, os.getpid(), grace, log, descriptors),
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if log else None,
        pass_fds=tuple(descriptors),
        start_new_session=True,  # a Ctrl-C of the terminal reaches only the runner
    )


def supervisor_command(
    command: Sequence[str], parent: int, grace: float, log: Path | None, descriptors: Sequence[int]
) -> list[str]:
    """Return the command of a supervisor whose parent is the process `parent`."""
    options = ["--parent", str(parent), "--grace", str(grace)]
    options += ["--log", str(log)] if log else []
    options += [option for descriptor in descriptors for option in ("--pass-fd", str(descriptor))]
    return [sys.executable, "-m", __name__, *options, "--", *command]


class Process(Protocol):
    """A started supervisor, as seen by its runner."""

    def poll(self) -> int | None:
        """Return the exit status, -n for signal n, None while it runs."""

    def send_signal(self, number: int, /) -> None:
        """Send a signal, unless it has ended."""

    def wait(self) -> int | None:
        """Wait for the end; return the exit status."""

    def terminate(self) -> None:
        """Send SIGTERM, unless it has ended."""


def stop_all(processes: Sequence[Process], grace: float) -> None:
    """End supervised runs concurrently; kill those that still run after the grace period.

    A second Ctrl-C kills them immediately.
    """
    for process in processes:
        process.terminate()
    try:
        _wait_for_all(processes, grace + 2 * LEFTOVER_SECONDS)
    except KeyboardInterrupt:
        pass
    finally:
        for process in processes:
            process.send_signal(signal.SIGINT)
        _wait_for_all(processes, 2 * LEFTOVER_SECONDS)


def new_log(folder: Path) -> Path:
    """Return the name of a new log file: `logs/<date>-<time>.log` in the run's folder."""
    logs = RunFolder(folder).logs
    logs.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = [f"{stamp}.log", *(f"{stamp}-{number}.log" for number in range(2, 1000))]
    return next(logs / name for name in names if not (logs / name).exists())


def _wait_for_all(processes: Sequence[Process], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)


# --- the supervisor ---------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Supervise a command; return its exit status, 128+n for signal n."""
    parser = argparse.ArgumentParser(prog="python -m megatron_lrpath.launch.process")
    parser.add_argument("--parent", type=int, required=True, help="process id of the runner")
    parser.add_argument("--grace", type=float, required=True, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("--log", type=Path, help="file for the command's output; inherited without")
    parser.add_argument("--pass-fd", type=int, action="append", default=[], help="open file to pass on")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args(argv)

    def begin() -> list[int]:
        return [start(args.command, args.log, args.pass_fd).pid]

    return supervise(args.parent, args.grace, begin)


def supervise(parent: int, grace: float, begin: Callable[[], list[int]]) -> int:
    """Supervise the processes that `begin` starts, one for each rank, until they have ended or are ended
    here.

    If they end without a failure file of their own, the supervisor writes one.

    Args:
        parent: the process whose end ends them.
        grace: seconds between SIGTERM and SIGKILL.
        begin: starts them as children of this process and returns their ids.

    Returns:
        0 if all have succeeded, else the exit status of the first that failed, 128+n for signal n.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the parent died before the kernel was asked
        return 128 + signal.SIGTERM
    pids = begin()
    statuses, asked_to_end = wait(pids, grace)
    pid = failure.first(statuses)
    status = statuses[pid]
    if status not in (0, SAVED_AND_STOPPED) and not asked_to_end:
        who = "its process" if len(pids) == 1 else f"rank {pids.index(pid)}"
        rank = None if len(pids) == 1 else pids.index(pid)
        failure.record(failure.of_status(who, status, rank, pid=pid))
    end_leftovers(LEFTOVER_SECONDS)
    return status if status >= 0 else 128 - status


def die_with_parent(parent: int) -> None:
    """Set up a child of a supervisor: unblock the signals, and request a SIGTERM when the supervisor `parent`
    dies.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGTERM)


def start(command: Sequence[str], log: Path | None, descriptors: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start `command` with the signals unblocked and a SIGTERM at the end of this process."""
    parent = os.getpid()
    with log.open("ab") if log else nullcontext() as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            pass_fds=descriptors,
            preexec_fn=lambda: die_with_parent(parent),
        )


def wait(pids: Sequence[int], grace: float) -> tuple[dict[int, int], bool]:
    """Wait for the processes; end them on SIGTERM, SIGHUP or SIGINT, or when one of them fails.

    Returns:
        Their statuses (-n: killed by signal n) in the order in which they ended; whether a signal requested the end.
    """
    statuses: dict[int, int] = {}
    deadline: float | None = None
    asked = False
    while True:
        statuses |= reap(pids)
        left = [pid for pid in pids if pid not in statuses]
        if not left:
            return statuses, asked
        if any(statuses.values()) and deadline is None:
            deadline = terminate(left, min(grace, CLOSING_SECONDS))
        if deadline is None:
            received = signal.sigwaitinfo(WATCHED).si_signo
            asked = received != signal.SIGCHLD
        else:
            info = signal.sigtimedwait(WATCHED, max(0.0, deadline - time.monotonic()))
            received = info.si_signo if info else signal.SIGINT
            asked = asked or (info is not None and received != signal.SIGCHLD)
        if received == signal.SIGINT:
            kill_all(signal.SIGKILL)
            deadline = time.monotonic() + 1.0
        elif received != signal.SIGCHLD and deadline is None:
            deadline = terminate(left, grace)


def terminate(pids: Sequence[int], grace: float) -> float:
    """Send SIGTERM (which torchrun forwards to its workers); return the end of the grace period."""
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    return time.monotonic() + grace


def reap(pids: Sequence[int]) -> dict[int, int]:
    """Reap every child that has ended; return the exit statuses (-n: killed by signal n) of those in `pids`."""
    found: dict[int, int] = {}
    while True:
        try:
            ended, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if ended == 0:
            return found
        if ended in pids:
            found[ended] = os.waitstatus_to_exitcode(status)


def end_leftovers(seconds: float) -> None:
    """End the remaining processes of the command: SIGTERM, and SIGKILL after `seconds`."""
    deadline = time.monotonic() + seconds
    kill_all(signal.SIGTERM)
    while psutil.Process().children():
        if time.monotonic() >= deadline:
            kill_all(signal.SIGKILL)
        reap(())
        time.sleep(0.02)


def kill_all(number: signal.Signals) -> None:
    """Send `number` to every descendant."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def prctl(option: int, value: int) -> None:
    """Call Linux's prctl(2). On other systems do nothing: runs outlive a runner that is killed with SIGKILL
    there.
    """
    function = getattr(ctypes.CDLL(None), "prctl", None)
    if function is not None:
        function(option, ctypes.c_ulong(value), 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())

"""Runs on the CPU, forked from one process that has imported everything, which saves the seconds of each
import.

The fork server is multiprocessing's, with `preloaded` imported. It forks a supervisor for each run, with
the guarantees of `process`, and the supervisor forks the ranks. A supervisor whose server has several
threads, or whose source files have changed since their import, starts its run cold instead.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from megatron_lrpath.launch.process import (
    Process,
    die_with_parent,
    supervise,
    supervised,
    supervisor_command,
)
from megatron_lrpath.launch.torchrun import Ranks

PRELOADED = "megatron_lrpath.launch.preloaded"
HOST = "127.0.0.1"
SOCKET, SOCKET_LIMIT = "/pymp-12345678/listener-12345678", 107
"""Multiprocessing's socket below the folder of temporary files, and Linux's maximum length of an address."""


class WarmProcess:
    """A forked supervisor with the interface of `subprocess.Popen` that the runner uses."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process

    def poll(self) -> int | None:
        """Return the exit status (-n: killed by signal n), None while it runs."""
        return self._process.exitcode

    def wait(self) -> int | None:
        """Wait for the end; return the exit status."""
        self._process.join()
        return self.poll()

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None and self._process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM, unless it has ended."""
        self.send_signal(signal.SIGTERM)


def start(
    command: Ranks | Sequence[str],
    environment: Mapping[str, str],
    grace: float,
    log: Path | None,
    descriptors: Sequence[int] = (),
) -> Process:
    """Start ranks in forked processes under a supervisor, as `process.supervised` starts a command.

    The first call starts the server, which ends with this process. A process that the server has forked
    needs no other server. A command that is not `Ranks` starts cold; all commands do if the path of the
    server's socket would be too long.
    """
    if not isinstance(command, Ranks) or not (is_warm() or has_room_for_sockets()):
        return supervised(command, environment, grace, log, descriptors)
    process: BaseProcess
    if is_warm():
        arguments = (command, dict(environment), grace, log, list(descriptors))
        process = multiprocessing.get_context("fork").Process(target=forked_supervisor, args=arguments)
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([PRELOADED])
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # the server reads it once, for runs of all sizes
        passed = (command, dict(environment), grace, log, Descriptors(descriptors))
        process = context.Process(target=forked_supervisor, args=passed)
    process.start()
    return WarmProcess(process)


def is_warm() -> bool:
    """Return whether this process was forked by a server that has imported everything."""
    return PRELOADED in sys.modules


def has_room_for_sockets() -> bool:
    """Return whether the path of the folder of temporary files (`TMPDIR`) is short enough for the server's
    socket.
    """
    return len(os.fsencode(tempfile.gettempdir())) + len(SOCKET) <= SOCKET_LIMIT


class Descriptors:
    """Open files that are passed to a process when the server forks it."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = tuple(numbers)

    def __reduce__(self) -> tuple[Any, ...]:
        return received, tuple(DupFd(number) for number in self.numbers)


def received(*files: Any) -> list[int]:
    """Return the descriptors of the files in this process."""
    return [file.detach() for file in files]


# --- in the forked processes ------------------------------------------------------------------------------


def forked_supervisor(
    ranks: Ranks, environment: dict[str, str], grace: float, log: Path | None, descriptors: list[int]
) -> None:
    """Supervise the ranks in this process and exit with their status.

    Their output goes into `log`, or without one to the server's output.
    """
    os.setsid()  # a Ctrl-C of the terminal reaches only the runner
    os.environ.update(environment)
    if not is_forkable():
        for number in descriptors:
            os.set_inheritable(number, True)
        command = supervisor_command(ranks.command, os.getppid(), grace, log, descriptors)
        os.execv(command[0], command)
    nothing = os.open(os.devnull, os.O_RDONLY)
    if nothing:  # is 0 already if the runner was started with closed standard input
        os.dup2(nothing, 0)
        os.close(nothing)
    if log is not None:
        with log.open("ab") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.exit(supervise(os.getppid(), grace, ForkedRanks(ranks).start))


def is_forkable() -> bool:
    """Return whether this process equals a fresh start: one thread, current source files."""
    preloaded = sys.modules.get(PRELOADED)
    if preloaded is None:  # its import failed: the cold start reports the reason
        return False
    try:
        threads = len(os.listdir(f"/proc/{os.getppid()}/task"))
    except OSError:
        return False
    return threads == 1 and all(preloaded.modified(name) == then for name, then in preloaded.SOURCES.items())


class ForkedRanks:
    """The ranks of a run, and their rendezvous store; as under torchrun, the launcher hosts the store."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.store: Any = None

    def start(self) -> list[int]:
        """Fork the ranks; return their process ids."""
        listener = socket.create_server((HOST, 0)) if self.ranks.nproc > 1 else None
        parent, pids = os.getpid(), []
        for rank in range(self.ranks.nproc):
            pid = os.fork()
            if pid == 0:
                die_with_parent(parent)
                be_rank(self.ranks, rank, listener)
            pids.append(pid)
        # Threads start when no further fork follows.
        if listener is not None:
            from torch.distributed import TCPStore  # imported by the server already

            port, descriptor = listener.getsockname()[1], listener.detach()
            self.store = TCPStore(
                HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor
            )
        threading.Thread(target=end_with_runner, daemon=True).start()
        return pids


def end_with_runner() -> None:
    """Make this supervisor end when the process that started it dies.

    The server detects that only after the last process that it has forked.
    """
    runner = multiprocessing.parent_process()
    if runner is not None:
        runner.join()
        os.kill(os.getpid(), signal.SIGTERM)


def be_rank(ranks: Ranks, rank: int, listener: socket.socket | None) -> None:
    """Run the module as this rank, in the environment that torchrun sets; exit with its status."""
    import torch  # imported by the server already

    if listener is not None:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks.nproc),
            "LOCAL_WORLD_SIZE": str(ranks.nproc),
            "MASTER_ADDR": HOST,
            "MASTER_PORT": str(listener.getsockname()[1]),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        listener.close()
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # As in a separately started process: Megatron's data loaders can only be forked.
    multiprocessing.set_start_method("fork", force=True)
    module = importlib.import_module(ranks.module)
    sys.argv = [str(module.__file__), *ranks.argv]
    sys.exit(module.main(list(ranks.argv)))

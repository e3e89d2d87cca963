"""Communication of the ranks outside the process group; if one rank dies, all end with one message that names
it.

Every rank watches its neighbor on the same machine (the kernel reports its end at once) and polls for
reports from other machines. Errors that follow from the death of a rank, such as a closed connection or a
collective that never ends, are not reported.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed import DistError, HashStore, PrefixStore, Store, rendezvous
from torch.distributed.constants import default_pg_timeout

from megatron_lrpath.console import say, say_error
from megatron_lrpath.errors import CONSEQUENCES, RendezvousError, TrainingStoppedError, would_repeat
from megatron_lrpath.exits import FAILED, leave_at_once
from megatron_lrpath.locks import process_space
from megatron_lrpath.runs import failure
from megatron_lrpath.training.guards.channel import Channel, meet, secret_file

MEETING = timedelta(minutes=10)  # from the first rank's arrival to the last one's
PATIENCE = timedelta(hours=1)  # rank 0 may read a large checkpoint before it answers


def own_store() -> Store | None:
    """Return the in-memory store of a single process for `init_process_group`, which needs no port; None for
    more processes.
    """
    return HashStore() if os.environ.get("WORLD_SIZE", "1") == "1" else None


class Ranks:
    """The ranks of this run. All of them call `share` and `collect` in the same order.

    Attributes:
        rank, world: this process's rank and the number of processes.
        store: the rendezvous store for `init_process_group`; None for a single process.
        channel: the signed values in it; None for a single process.
        store_is_launchers: whether the store outlives rank 0.
    """

    def __init__(self, rank: int, world: int, store: Store | None, channel: Channel | None = None) -> None:
        self.rank = rank
        self.world = world
        self.store = store
        self.store_is_launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.channel = channel
        self._calls = 0

    @classmethod
    def from_environment(cls, folder: Path) -> Ranks:
        """Meet the other ranks at the address that torchrun or srun set in the environment.

        Args:
            folder: the folder of the run, on the file system that all ranks share; has the secret during
                rendezvous.

        Raises:
            RendezvousError: some ranks do not join within ten minutes.
        """
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if world == 1:
            return cls(rank, world, None)
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        file, reason = secret_file(folder, address), ""
        channel: Channel | None = None
        try:
            # torchrun may keep its store when it restarts the ranks (--max-restarts): addresses and reports
            # of an earlier attempt must not be used.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = PrefixStore(f"attempt/{attempt}", next(rendezvous("env://", timeout=MEETING))[0])
            channel = meet(store, rank, world, file, MEETING)
            store.set_timeout(default_pg_timeout)  # as torch would set it
        except DistError as error:
            reason = f" ({str(error).splitlines()[0]})"
        if channel is None:
            raise RendezvousError(
                f"rank {rank}: not all {world} ranks joined at {address} within "
                f"{MEETING.total_seconds() / 60:g} minutes: a rank has ended, cannot reach that address, or "
                f"cannot access {folder}, which must be on a shared file system. Check the output of the other ranks, "
                "then call again."
                f"{reason}"
            )
        return cls(rank, world, store, channel)

    def share(self, value: Any = None) -> Any:
        """Broadcast rank 0's value (JSON) to every rank."""
        if self.channel is None:
            return value
        self._calls += 1
        key = f"share/{self._calls}"
        if self.rank == 0:
            self.channel.put(key, [value])  # a list, because None is a value, too
            return value
        return self.channel.wait([key], PATIENCE)[0][0]

    def collect(self, value: Any) -> list[Any]:
        """Gather the values (JSON) of all ranks, in order, on rank 0; the other ranks get an empty list."""
        if self.channel is None:
            return [value]
        self._calls += 1
        keys = [f"collect/{self._calls}/{rank}" for rank in range(self.world)]
        self.channel.put(keys[self.rank], [value])
        if self.rank:
            return []
        return [found for (found,) in self.channel.wait(keys, PATIENCE)]


LOOK_SECONDS = 2.0  # between polls of the store
SETTLE_SECONDS = 2.0  # until the cause of a broken connection is reported
LINGER = timedelta(seconds=15)  # maximum time that the rank with the store waits for the others
HOW_TO_GO_ON = "All ranks end; call again to continue from the last checkpoint."
NO_USE = "All ranks end; calling again would fail in the same way. The lines above say where it was raised."


@dataclass(frozen=True)
class Peer:
    """The host and process of a rank; `space` distinguishes machines (and namespaces of process ids)."""

    pid: int
    host: str
    space: str

    @classmethod
    def me(cls) -> Peer:
        """Return this process."""
        return cls(os.getpid(), socket.gethostname(), process_space())


class PeerWatch:
    """The watch over the other ranks of this process's run, until `leave`.

    Attributes:
        peers: the process of each rank.
        step: the last finished step of this start.
        leaving: set when this rank ends for a known reason.
        between_looks: called every other second in the watching thread; can raise RuntimeError if the store is lost.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.channel = ranks.channel
        self.peers = [Peer(**one) for one in ranks.share(ranks.collect(vars(Peer.me())))]
        self.step: int | None = None
        self.leaving = threading.Event()
        self.between_looks: list[Callable[[], None]] = []
        self._reporting = threading.Lock()  # never released: its holder ends the process

    @property
    def where(self) -> str:
        """The progress of this rank, for messages."""
        return "before the first step" if self.step is None else f"after step {self.step}"

    def start(self) -> None:
        """Start the watch if there are other ranks."""
        if self.channel is None:
            return
        threading.Thread(target=self._look_around, name="peers", daemon=True).start()
        neighbour = self.neighbour()
        if neighbour is not None:
            with suppress(OSError):  # an old kernel, or the process has ended: the launcher reports it
                arguments = (neighbour, os.pidfd_open(self.peers[neighbour].pid))
                threading.Thread(target=self._wait_for, args=arguments, name="neighbour", daemon=True).start()

    def neighbour(self) -> int | None:
        """Return the next rank on this machine, in a circle; None if this rank is alone on it."""
        mine = self.peers[self.ranks.rank].space
        here = [rank for rank, peer in enumerate(self.peers) if peer.space == mine]
        following = here[(here.index(self.ranks.rank) + 1) % len(here)]
        return None if following == self.ranks.rank else following

    def leave(self) -> None:
        """Announce that this rank ends for a known reason; it reports nothing from now on."""
        self.leaving.set()
        if self.channel is not None:
            self.channel.put(f"left/{self.ranks.rank}", True)

    def claim(self) -> bool:
        """Claim the report of the end; return whether no other rank has reported an end before.

        Raises:
            RuntimeError: the store and rank 0 are lost.
        """
        self._reporting.acquire()
        self.leaving.set()
        rank = self.ranks.rank
        return self.channel is None or bool(self.channel.claim("report", rank) == rank)

    def end(self, status: int, dead: int | None = None) -> NoReturn:
        """End this process. If it hosts the store, it waits for the living ranks first."""
        with suppress(RuntimeError):
            self.leave()
            self.see_others_off(dead)
        leave_at_once(status)

    def see_others_off(self, dead: int | None = None) -> None:
        """Wait until the living ranks no longer need the store, if this process hosts it."""
        if self.channel is not None and self.ranks.rank == 0 and not self.ranks.store_is_launchers:
            others = [rank for rank in range(1, self.ranks.world) if rank != dead]
            with suppress(TrainingStoppedError):
                self.channel.wait([f"left/{rank}" for rank in others], LINGER)

    def report_death(self, rank: int) -> NoReturn:
        """Report that `rank` died, unless another rank has, and end this process."""
        try:
            first = self.claim()
        except RuntimeError:
            first = rank == 0  # the store ends with rank 0; errors that follow from that are not reported
        if first:
            peer = self.peers[rank]
            text = (
                f"rank {rank} died {self.where} (process {peer.pid} on {peer.host}: killed or "
                f"crashed without a message, often out of memory). {HOW_TO_GO_ON}"
            )
            self._say_dead(text, rank)
        self.end(FAILED, dead=rank)

    def report_error(self, error: BaseException) -> NoReturn:
        """Report why this rank ended, unless it follows from the end of another rank, and end this process."""
        text = f"{type(error).__name__}: {error}"
        consequence = self.channel is not None and any(mark in text for mark in CONSEQUENCES)
        if consequence:
            self._let_the_death_be_reported()
        try:
            first = self.claim()
        except RuntimeError:
            first = False
        if first:
            again = would_repeat(error, self.step)
            report = f"rank {self.ranks.rank} ended {self.where}: {text}. {NO_USE if again else HOW_TO_GO_ON}"
            known = {
                "step": self.step,
                "consequence": consequence,
                "calling_again_helps": False if again else None,
            }
            failure.record(failure.here(failure.EXCEPTION, report, **known))
            say("".join(traceback.format_exception(error)).rstrip())
            say_error(report)
        self.end(FAILED)

    def _wait_for(self, rank: int, process: int) -> None:
        poll = select.poll()
        poll.register(process, select.POLLIN)
        poll.poll()
        time.sleep(SETTLE_SECONDS)  # a signal that ended the neighbor may also be sent to this process
        if not self.leaving.is_set() and not self._has_left(rank):
            self.report_death(rank)

    def _has_left(self, rank: int) -> bool:
        assert self.channel is not None
        try:
            return self.channel.get(f"left/{rank}") is not None
        except RuntimeError:
            return False

    def _look_around(self) -> None:
        assert self.channel is not None
        while not self.leaving.wait(LOOK_SECONDS):
            try:
                self.channel.restore()
                for look in self.between_looks:
                    look()
                if (reporter := self.channel.get("report")) is None:
                    continue
                self._see_reason(reporter)
            except RuntimeError as error:
                if self.neighbour() == 0:
                    self._let_the_death_be_reported()
                self._lost_store(error)
            self._reporting.acquire()
            self.end(FAILED)

    def _see_reason(self, reporter: int) -> None:
        """Wait until the reporting rank has given the reason; print a message if it does not."""
        assert self.channel is not None
        try:
            self.channel.wait([f"left/{reporter}"], timedelta(seconds=2 * SETTLE_SECONDS))
        except TrainingStoppedError:
            if self.ranks.rank == (1 if reporter == 0 else 0):
                say_error(f"rank {reporter} ended the run {self.where} and gave no reason. {HOW_TO_GO_ON}")

    def _let_the_death_be_reported(self) -> None:
        """Wait for the report of the rank's watcher, which can be another thread of this process."""
        time.sleep(2 * SETTLE_SECONDS)

    def _lost_store(self, error: RuntimeError) -> None:
        """Report that rank 0's machine is lost: the first rank of each other machine does so."""
        mine = self.peers[self.ranks.rank].space
        first = next(rank for rank, peer in enumerate(self.peers) if peer.space == mine)
        if first == self.ranks.rank and mine != self.peers[0].space and not self.leaving.is_set():
            self._say_dead(f"rank 0 on {self.peers[0].host} cannot be reached ({error}). All ranks end.", 0)

    def _say_dead(self, text: str, rank: int) -> None:
        peer, now = self.peers[rank], failure.now()
        failure.record(failure.Failure(failure.DIED, text, rank, peer.host, peer.pid, self.step, time=now))
        say_error(text)

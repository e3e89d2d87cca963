"""Detect a step that does not end, find the rank that the others wait for, and end the run with its name.

Every rank measures the time of its own step. The first rank that exceeds the limit asks the others for
their state; each answers repeatedly from a separate thread. A process that is stopped (SIGSTOP, a hung
disk or machine) does not answer; a process that is busy outside a collective answers that.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_lrpath.console import say_error, warn
from megatron_lrpath.exits import FAILED, leave_at_once
from megatron_lrpath.runs import failure

if TYPE_CHECKING:
    from types import FrameType

    from megatron_lrpath.training.guards.peers import PeerWatch

LOOK_SECONDS = 2.0  # between checks of the clock
ANSWER_SECONDS = 10.0  # a running thread answers several times in this time
ASKED = "standstill"
# Where the main thread waits for other ranks; on a GPU, where the result of a collective is first needed.
COLLECTIVES = (
    "torch.distributed.distributed_c10d",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron_lrpath.training.guards.guard",
)

MARGIN_MINUTES = 5  # by which a collective's own time limit exceeds this limit


def fit_collectives(args: Any, explicit: Mapping[str, Any]) -> None:
    """Set the time limit of collectives above --rank-timeout, whose message names the rank; warn if it is
    not.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or args.rank_timeout <= 0:
        return
    if "distributed_timeout_minutes" not in explicit:
        least = int(args.rank_timeout) + MARGIN_MINUTES
        args.distributed_timeout_minutes = max(args.distributed_timeout_minutes, least)
    elif args.distributed_timeout_minutes <= args.rank_timeout and os.environ.get("RANK", "0") == "0":
        warn(
            f"--distributed-timeout-minutes {args.distributed_timeout_minutes} is not above --rank-timeout "
            f"{args.rank_timeout:g}: if a rank stalls, the collective fails first, and its message does not "
            "name the rank."
        )


class Standstill:
    """The clock of this rank's step.

    Args:
        peers: the watch over the other ranks.
        minutes: the time limit of a step; 0 means no limit.
    """

    def __init__(self, peers: PeerWatch, minutes: float) -> None:
        self.peers = peers
        self.limit = 60.0 * minutes
        self._step = 0  # increases with every step
        self._under_way = False
        self._answers = 0

    def step_begins(self) -> None:
        """Start the clock: a micro-batch of a step begins."""
        if not self._under_way:
            self._step += 1
            self._under_way = True

    def step_ended(self) -> None:
        """Stop the clock: saves and evaluations have no limit."""
        self._under_way = False

    def start(self) -> None:
        """Start the watch if there are other ranks and a limit."""
        if self.peers.channel is not None and self.limit > 0:
            self.peers.between_looks.append(self.answer)
            threading.Thread(target=self._watch, name="standstill", daemon=True).start()

    def _watch(self) -> None:
        """Add up the time that this process has really run, so that a process that was stopped does not blame
        others.
        """
        counted, waited, last = 0, 0.0, time.monotonic()
        while not self.peers.leaving.wait(LOOK_SECONDS):
            now = time.monotonic()
            waited, last = waited + min(now - last, 2 * LOOK_SECONDS), now
            if counted != self._step or not self._under_way or self.peers.step is None:
                counted, waited = self._step, 0.0
            elif waited > self.limit:
                self._find(counted)

    def answer(self) -> None:
        """Write the state of this rank if another rank has asked; called every few seconds in a separate
        thread.
        """
        channel = self.peers.channel
        assert channel is not None
        if channel.get(ASKED) is not None:
            self._answers += 1
            waits, place = whereabouts() if self._under_way else (False, "between two steps")
            channel.put(answer_key(self.peers.ranks.rank), [self._answers, waits, place])

    def _find(self, step: int) -> None:
        """Ask the ranks for their state and end the run, unless the step has ended meanwhile."""
        found: list[dict[int, list[object]]] = []

        def ask() -> None:
            channel = self.peers.channel
            assert channel is not None
            with suppress(RuntimeError):  # rank 0 has ended, and the store with it: `PeerWatch` reports that
                channel.claim(ASKED, self.peers.ranks.rank)
                for _ in range(2):
                    self.peers.leaving.wait(ANSWER_SECONDS)
                    answers = {rank: channel.get(answer_key(rank)) for rank in range(self.peers.ranks.world)}
                    found.append(answers)

        asking = threading.Thread(target=ask, name="asking", daemon=True)
        asking.start()
        asking.join(4 * ANSWER_SECONDS)  # the store of a stalled rank does not answer
        if self.peers.leaving.is_set() or step != self._step or not self._under_way:
            return
        if len(found) == 2:
            ranks, doing = culprits(*found)
            if self.peers.ranks.rank in ranks and len(ranks) < self.peers.ranks.world:
                return  # a rank that waits for this rank reports it: a launcher may kill this one too early
            self._accuse(ranks, doing)
        elif asking.is_alive() and not self.peers.ranks.store_is_launchers:
            self._accuse_store()

    def _accuse(self, ranks: list[int], doing: str) -> NoReturn:
        minutes = f"{self.limit / 60:g} minutes (--rank-timeout)"
        who = ", ".join(self._name(rank) for rank in ranks)
        if ranks:
            text = (
                f"the step {self.peers.where} has stalled for {minutes}: {who} {doing} and has not entered the "
                "collective that the others wait in."
            )
        else:
            text = (
                f"the step {self.peers.where} has stalled for {minutes}: every rank waits in a collective. "
                "The network between them, or a GPU, does not answer."
            )
        if self.peers.claim():
            self._say(text, ranks[0] if ranks else None)
        self.peers.end(FAILED, dead=ranks[0] if ranks else None)

    def _accuse_store(self) -> NoReturn:
        """Handle a rank 0 that hosts the store and does not answer: all other ranks end, and rank 1 reports
        the reason.
        """
        if self.peers.ranks.rank == 1:
            self._say(
                f"the step {self.peers.where} has stalled for {self.limit / 60:g} minutes (--rank-timeout): "
                f"{self._name(0)} does not answer and has not entered the collective that the others wait in.",
                0,
            )
        leave_at_once(FAILED)

    def _say(self, text: str, rank: int | None) -> None:
        text = f"{text} All ranks end; call again to continue from the last checkpoint."
        peer = self.peers.peers[rank] if rank is not None else None
        host, pid = (peer.host, peer.pid) if peer else ("", None)
        found = failure.Failure(failure.STOPPED, text, rank, host, pid, self.peers.step, time=failure.now())
        failure.record(found)
        say_error(text)

    def _name(self, rank: int) -> str:
        peer = self.peers.peers[rank]
        return f"rank {rank} (process {peer.pid} on {peer.host})"


def answer_key(rank: int) -> str:
    """Return the store key of a rank's state."""
    return f"{ASKED}/{rank}"


def culprits(before: dict[int, list[object]], after: dict[int, list[object]]) -> tuple[list[int], str]:
    """Return the ranks that the others wait for, and what they do, from two rounds of answers.

    A rank that has not answered in between is stalled; if there is none, it is the ranks outside a
    collective.
    """
    silent = [rank for rank, answer in after.items() if answer is None or answer == before[rank]]
    if silent:
        return silent, "does not answer"
    busy = [rank for rank, (_, waits, _) in after.items() if not waits]
    return busy, f"is at {after[busy[0]][2]}" if busy else ""


def whereabouts() -> tuple[bool, str]:
    """Return whether the main thread waits for other ranks, and its place in the code."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = list(_outward(frame))
    names = [str(one.f_globals.get("__name__")) for one in frames]
    inner = next((index for index, name in enumerate(names) if name.partition(".")[0] != "torch"), len(names))
    if inner == len(names):
        return False, "an unknown place"
    # outer frames are not informative: one of Megatron's functions of that kind calls the whole forward pass
    waits = any(name.startswith(COLLECTIVES) for name in names[: inner + 1])
    return waits, f"{names[inner]}, line {frames[inner].f_lineno}"


def _outward(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back

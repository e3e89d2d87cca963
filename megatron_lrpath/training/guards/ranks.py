"""What the ranks of a run tell each other before there is a process group: through torch's store."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, HashStore, PrefixStore, Store, rendezvous
from torch.distributed.constants import default_pg_timeout

from megatron_lrpath.errors import NotMetError

MEETING = timedelta(minutes=10)  # from the first rank's arrival to the last one's
PATIENCE = timedelta(hours=1)  # rank 0 may read a large checkpoint before it answers


def own_store() -> Store | None:
    """For `init_process_group`: a single process meets itself in its memory, at no port; None where there are more."""
    return HashStore() if os.environ.get("WORLD_SIZE", "1") == "1" else None


class Ranks:
    """The ranks of this run. All call `share` and `collect` in the same order.

    Attributes:
        rank, world: this process's number and the number of processes.
        store: where they meet, to be handed to `init_process_group`; None for a single process.
        store_is_launchers: it outlives rank 0.
    """

    def __init__(self, rank: int, world: int, store: Store | None) -> None:
        self.rank = rank
        self.world = world
        self.store = store
        self.store_is_launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._ours = self.beside("start")
        self._calls = 0

    @classmethod
    def from_environment(cls) -> Ranks:
        """Meet the other ranks at the address that torchrun or srun gave in the environment.

        Raises:
            NotMetError: some of them do not come within ten minutes.
        """
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if world == 1:
            return cls(rank, world, None)
        try:
            store = next(rendezvous("env://", timeout=MEETING))[0]
            ranks = cls(rank, world, store)
            ranks._wait_for_all()
            store.set_timeout(default_pg_timeout)  # as torch would have made it
        except DistError as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise NotMetError(
                f"rank {rank}: not all {world} ranks have come to {address} within "
                f"{MEETING.total_seconds() / 60:g} minutes: one has ended before, or cannot reach that address. "
                f"Look at the other ranks' output, then call again. ({str(error).splitlines()[0]})"
            ) from None
        return ranks

    def _wait_for_all(self) -> None:
        assert self._ours is not None
        self._ours.set(f"here/{self.rank}", "1")
        self._ours.wait([f"here/{rank}" for rank in range(self.world)], MEETING)

    def beside(self, name: str) -> Store | None:
        """A part of the store under a name of its own; None for a single process."""
        return PrefixStore(f"lrpath/{name}", self.store) if self.store is not None else None

    def share(self, value: Any = None) -> Any:
        """The value (JSON) that rank 0 calls this with, on every rank."""
        if self._ours is None:
            return value
        self._calls += 1
        key = f"share/{self._calls}"
        if self.rank == 0:
            self._ours.set(key, json.dumps(value))
            return value
        self._ours.wait([key], PATIENCE)
        return json.loads(self._ours.get(key))

    def collect(self, value: Any) -> list[Any]:
        """The values (JSON) of all ranks in their order, on rank 0; nothing on the others."""
        if self._ours is None:
            return [value]
        self._calls += 1
        keys = [f"collect/{self._calls}/{rank}" for rank in range(self.world)]
        self._ours.set(keys[self.rank], json.dumps(value))
        if self.rank:
            return []
        self._ours.wait(keys, PATIENCE)
        return [json.loads(self._ours.get(key)) for key in keys]

"""Ports that no other process takes between choice and use."""

from __future__ import annotations

import os
import random
import socket

# Below Linux's ephemeral ports (from 32768 on), above those of the Slurm tests' few jobs; each of pytest's
# workers has a thousand ports.
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
FIRST, COUNT = 15000 + 1000 * (WORKER % 16), 1000

_last = random.SystemRandom().randrange(COUNT)


def free_ports(count: int) -> list[int]:
    """Return ports that have no listener now, each time the next ones, so that none is reused soon."""
    global _last
    found: list[int] = []
    for _ in range(COUNT):
        _last = (_last + 1) % COUNT
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", FIRST + _last))
            except OSError:
                continue
        found.append(FIRST + _last)
        if len(found) == count:
            return found
    raise AssertionError(f"the ports from {FIRST} to {FIRST + COUNT - 1} are in use")

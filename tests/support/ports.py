"""Ports that no other process takes between their choice and their use."""

from __future__ import annotations

import os
import random
import socket

# Below those that Linux gives to a process that asks for any (from 32768 on), above those of the Slurm tests' few jobs;
# each of pytest's workers has a thousand of its own.
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
FIRST, COUNT = 15000 + 1000 * (WORKER % 16), 1000

_last = random.SystemRandom().randrange(COUNT)


def free_ports(count: int) -> list[int]:
    """Ports without a listener now; the next ones, so that none is reused soon."""
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

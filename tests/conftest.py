"""Settings of every test: one thread a process, and the files that wait longest begin first."""

from __future__ import annotations

import os

import pytest

WAITING = ("test_slurm_training", "test_reliability_kills", "test_slurm_jobs")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what waits longest, so that the other worker is not idle at the end."""
    place = {name: number for number, name in enumerate(WAITING)}
    items.sort(key=lambda item: place.get(item.path.stem, len(WAITING)))

"""Runs that are killed at any moment and restarted end like undisturbed ones and leave no other files."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.support.kill_harness import Harness

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("LRPATH_KILLS", "20"))
SEED = int(os.environ.get("LRPATH_KILL_SEED", time.time_ns() % 1_000_000))


def test_killed_runs_end_as_undisturbed_ones(tmp_path: Path) -> None:
    """LRPATH_KILLS and LRPATH_KILL_SEED choose how many kills there are, and repeat a failure."""
    print(f"LRPATH_KILL_SEED={SEED}")
    harness = Harness(tmp_path, SEED)
    harness.train_undisturbed()
    harness.carry_out(KILLS)
    assert harness.counts.total() >= KILLS

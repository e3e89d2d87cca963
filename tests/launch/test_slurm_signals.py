"""A signal at any moment of a job under a real Slurm: the job saves if it can, is requeued, and never fails.

`LRPATH_SIGNALS` (12) is the number of moments, `LRPATH_SEED` (1) chooses them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.slurm_cluster.site import Site, fake_site

pytestmark = pytest.mark.slow
COUNT = int(os.environ.get("LRPATH_SIGNALS", "12"))
SEED = int(os.environ.get("LRPATH_SEED", "1"))
LONGEST = 3.0  # seconds after the script's first line; by then the stand-in has trained for a while


def at_first_line(number: int, start: int) -> Callable[[], bool]:
    """Return a check that the script of this start (0, 1, …) traps signals; Slurm may drop earlier ones."""
    wanted = {f"SLURM_JOB_ID={number}"}
    if start:  # Slurm omits the variable at the first start
        wanted.add(f"SLURM_RESTART_COUNT={start}")

    def found() -> bool:
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended in the meantime
                if b"slurm_script" not in (process / "cmdline").read_bytes():
                    continue
                variables = set((process / "environ").read_text(errors="replace").split("\0"))
                caught = re.search(r"SigCgt:\s*(\w+)", (process / "status").read_text())
                if wanted <= variables and caught and int(caught[1], 16) & 1 << (signal.SIGUSR2 - 1):
                    return True
        return False

    return found


def attempts(site: Site, number: int) -> list[dict]:
    """Return the records of how the starts of a job ended."""
    file = site.folder / f"runs/slurm/attempts/{number}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def noted(site: Site, number: int, start: int) -> Callable[[], bool]:
    """Return a check that the job has recorded how this start (0, 1, …) ended."""
    return lambda: len(attempts(site, number)) > start


def requeued(site: Site, number: int, start: int) -> Callable[[], bool]:
    """Return a check that Slurm has counted a start after this one."""
    return lambda: int(site.cluster.job(number)["Restarts"]) > start


def test_a_signal_at_any_moment_is_saved_or_stopped_before_the_first_step(tmp_path):
    site = fake_site(tmp_path, processes=2)
    site.write_plan(4000)
    chosen = random.Random(SEED)
    main = site.submit(FAKE_PACE="0.05")["ours/main"]["job"]
    script = next((site.folder / "runs/slurm/scripts").glob("ours.main-*.sh"))
    lines = (line for line in script.read_text().splitlines() if not line.startswith("#"))
    assert next(lines).startswith("trap "), "the first command is the trap"
    for start in range(COUNT):
        job = site.cluster.wait(main, "RUNNING", "FAILED", "CANCELLED", seconds=60)
        assert (job["JobState"], job["Restarts"]) == ("RUNNING", str(start))
        site.cluster.until(at_first_line(main, start), 60)
        pause = chosen.uniform(0.0, LONGEST) if start else 0.0
        time.sleep(pause)
        site.cluster.call("scancel", "--batch", "--signal=USR2", str(main))
        site.cluster.until(noted(site, main, start), 60)
        last = attempts(site, main)[-1]
        assert last["ending"] == "saved", (start, pause, last)
        site.cluster.until(requeued(site, main, start), 60, str(last).strip)
    site.cluster.empty()

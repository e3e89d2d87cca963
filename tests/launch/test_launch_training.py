"""`lrpath run` with the real training: torchrun, Megatron, and the files that they write."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support import ROOT
from tests.support.training_fixtures import history, lrpath, make_plan


def cold(*argv: str) -> subprocess.CompletedProcess[str]:
    """Call the command as a user does, with one thread per process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "megatron_lrpath.cli", *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)


@pytest.mark.slow
def test_a_plan_is_trained_by_the_real_entry_and_complete_afterwards(tmp_path):
    plan = make_plan(tmp_path, (8,))
    argv = ("run", str(plan), "--paradigm", "ours", "--device", "cpu", "--no-evaluate")
    answer = cold(*argv)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    folder = tmp_path / "runs/ours"
    assert [row["step"] for row in history(folder / "main")] == [1, 2, 3, 4]
    assert [row["step"] for row in history(folder / "branch-v1")] == [5, 6, 7, 8]
    assert json.loads((folder / "branch-v1/result.json").read_text())["step"] == 8
    assert "ours/branch-v1: complete at step 8" in answer.stdout
    assert "Warning" not in answer.stdout + answer.stderr
    assert len(answer.stdout.splitlines()) < 40
    again = cold(*argv)
    assert (again.returncode, again.stderr) == (0, "")
    assert "nothing to do: 2 runs" in again.stdout


@pytest.mark.slow
def test_a_mistyped_megatron_argument_is_refused_before_anything_starts(tmp_path):
    plan = make_plan(tmp_path, (8,))
    answer = lrpath("run", plan, "--run", "main", "--device", "cpu", "--", "--lgo-interval", 5)
    assert answer.status == [2]
    assert "--lgo-interval: Megatron has no such argument (did you mean '--log-interval'?)" in answer.output
    assert not (tmp_path / "runs").exists()
    assert "Traceback" not in answer.output

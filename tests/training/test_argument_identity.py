"""A run by --lr-path with checkpoints and no record is compared with their content, then recorded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_lrpath.runs.folder import RunFolder
from tests.support.training_fixtures import make_plan, train
from tests.training.test_training_rates import words_without_plan


def scratch(plan: Path, folder: Path, *extra: str) -> list[str]:
    """Return the command line of an 8-step run from random weights; later arguments override earlier ones."""
    argv = ["--lr-path", "scratch", "--lr", "0.01", "--min-lr", "0.001", "--train-iters", "8"]
    return [*argv, "--save", str(folder / "own"), *words_without_plan(plan, folder), *extra]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a plan (for model and data), and the folder of a run by --lr-path that stopped after step 4."""
    folder = tmp_path_factory.mktemp("begun")
    plan = make_plan(folder, (6, 6))
    train(scratch(plan, folder, "--exit-interval", "4")).ok()
    return plan, folder


def test_a_run_without_a_record_is_compared_with_its_checkpoint(
    begun: tuple[Path, Path], tmp_path: Path
) -> None:
    plan, folder = begun
    shutil.copytree(folder / "own", tmp_path / "own")
    RunFolder(tmp_path / "own").lineage.unlink()
    own = ["--save", str(tmp_path / "own")]
    refused = train(scratch(plan, folder, *own, "--train-iters", "16"))
    assert refused.status == [2], refused.output[-3000:]
    outcome = train(scratch(plan, folder, *own)).ok()
    assert "have no record of the run" in outcome.output
    assert RunFolder(tmp_path / "own").lineage.is_file()

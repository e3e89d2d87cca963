"""`lrpath compare-starts`: a trial resumes from the checkpoint like the run; other losses are reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lrpath.cli import main
from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import load_plan
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.upkeep.compare_starts import Start, difference, prepare, remove_checkpoints, starts_of
from tests.support.training_fixtures import make_plan, run_words, train
from tests.training.test_training_branch import digests


def start(name: str, losses: dict[int, float], torch: str) -> Start:
    return Start(name, losses, {"packages": {"torch": torch}, "device": "cpu", "world_size": 1})


def test_differences_are_over_the_common_steps() -> None:
    old = start("old", {1: 3.0, 2: 2.0, 3: 1.0}, "2.14.1")
    new = start("new", {2: 2.5, 3: 1.0, 4: 9.0}, "2.15.0")
    found = difference(old, new)
    assert found is not None
    assert (found.steps, found.first, found.largest, found.mean, found.equal) == (2, 0.5, 0.5, 0.25, 1)
    assert found.error == pytest.approx(0.25)
    assert found.environment == ("torch 2.15.0 (before: 2.14.1)",)
    assert difference(old, start("later", {7: 1.0}, "2.15.0")) is None


@pytest.mark.slow
def test_a_trial_resumes_as_the_run_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_plan(tmp_path, (6, 6))
    train(run_words(path, "ours", "main")).ok()
    plan = load_plan(path)
    before = digests(plan.folder(plan.main))
    assert main(["compare-starts", str(path), "--step", "3"]) == 0
    assert "Nothing to compare yet" in capsys.readouterr().out
    trial, run = prepare(plan, plan.main, 3, "again")
    train([*run_words(trial.path, "ours", "main"), "--exit-interval", "8"]).ok()
    remove_checkpoints(trial, run)
    assert not RunFolder(trial.folder(run)).checkpoints.exists()
    own, again = starts_of(plan, plan.main, 3, 8)
    assert sorted(again.losses) == [4, 5, 6, 7, 8]
    assert own.losses == again.losses
    assert main(["compare-starts", str(path), "--step", "3"]) == 0
    assert "again: 5 steps: first +0.00e+00" in capsys.readouterr().out
    assert digests(plan.folder(plan.main)) == before, "the run itself is only read"
    with pytest.raises(UserError, match="has no checkpoint of this step; it has steps 3, 6, 9"):
        prepare(plan, plan.main, 4, "again")
    for argv in (["--start", "x"], ["--start", "x", "--steps", "50"], ["--start", "a/b", "--steps", "2"]):
        assert main(["compare-starts", str(path), "--step", "3", *argv]) == 2

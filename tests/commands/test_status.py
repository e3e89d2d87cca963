"""`lrpath status` reads the state of every run only from its files."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from megatron_lrpath.cli import main
from megatron_lrpath.errors import UserError
from megatron_lrpath.locks import FolderLock
from megatron_lrpath.plan import Plan
from megatron_lrpath.runs import failure
from megatron_lrpath.runs.folder import RunFolder
from tests.support.fake_trainer import save
from tests.support.launch_fixtures import write_plan


def trained(plan: Plan, key: str, first: int, last: int, **extra: object) -> Path:
    """Write a run's folder with a history of these steps and a checkpoint at the last; return it."""
    folder = Path(plan.output) / key
    folder.mkdir(parents=True)
    rows = [
        {"step": step, "lr": 1e-3, "loss": 3.0, "seconds": 2.0, **extra}
        for step in range(first + 1, last + 1)
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save(folder / "checkpoints", last)
    return folder


def states(plan: Plan, capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, dict]:
    assert main(["status", str(plan.path), "--json", *argv]) == 0
    answer = json.loads(
        capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )
    return {f"{row['paradigm']}/{row['run']}": row for row in answer["runs"]}


def test_before_anything_has_run(tmp_path, capsys):
    rows = states(write_plan(tmp_path, 2), capsys)
    assert rows["ours/main"]["state"] == "not started"
    assert rows["ours/branch-v2"]["state"] == "waiting"
    assert rows["ours/branch-v2"]["waiting_for"] == "ours/main at step 15"
    assert rows["cpt/continual-v2"]["waiting_for"] == "ptfs/scratch-v1 at step 10"
    assert rows["ptfs/scratch-v1"]["same_as"] == ["cpt/continual-v1"]


def test_a_complete_run_and_the_branch_it_releases(tmp_path, capsys):
    plan = write_plan(tmp_path, 2)
    folder = trained(plan, "ours/main", 0, 15)
    (folder / "result.json").write_text('{"step": 15}')
    rows = states(plan, capsys, "--paradigm", "ours")
    assert (rows["ours/main"]["state"], rows["ours/main"]["step"]) == ("done", 15)
    assert rows["ours/main"]["checkpoints"] == [15]
    assert rows["ours/branch-v2"]["state"] == "not started"
    assert rows["ours/branch-v1"]["state"] == "waiting"


def test_a_locked_run_is_running_with_its_time_left_and_an_unlocked_one_interrupted(tmp_path, capsys):
    plan = write_plan(tmp_path, 2)
    lock = FolderLock.acquire(trained(plan, "ours/main", 0, 4))
    row = states(plan, capsys)["ours/main"]
    assert (row["state"], row["step"], row["lr"], row["loss"]) == ("running", 4, 1e-3, 3.0)
    assert row["seconds_left"] == pytest.approx(22.0)
    lock.close()
    row = states(plan, capsys)["ours/main"]
    assert (row["state"], row["seconds_left"]) == ("interrupted", None)


def test_an_interruption_shows_its_cause(tmp_path, capsys):
    plan = write_plan(tmp_path, 2)
    folder = trained(plan, "ours/main", 0, 4)
    FolderLock.acquire(folder).close()
    failure.write(RunFolder(folder).error, failure.of_error(UserError("slice v1 has moved")))
    assert states(plan, capsys)["ours/main"]["cause"] == "slice v1 has moved"
    assert main(["status", str(plan.path)]) == 0
    assert "ours/main: slice v1 has moved" in capsys.readouterr().out


def test_an_interruption_without_a_failure_names_its_newest_log(tmp_path, capsys):
    plan = write_plan(tmp_path, 2)
    folder = trained(plan, "ours/main", 0, 4)
    FolderLock.acquire(folder).close()
    (folder / "logs").mkdir()
    for name in ("20260101-000000.log", "20260102-000000.log"):
        (folder / "logs" / name).write_text("lrpath: error: a text that no program reads\n")
    row = states(plan, capsys)["ours/main"]
    assert (row["state"], row["cause"]) == ("interrupted", None)
    assert row["log"] == str(folder / "logs/20260102-000000.log")
    assert main(["status", str(plan.path)]) == 0
    assert f"ours/main: see {row['log']}" in capsys.readouterr().out


def test_a_run_started_by_hand_runs_while_its_history_is_fresh(tmp_path, capsys):
    plan = write_plan(tmp_path, 2)
    history = trained(plan, "ours/main", 0, 4) / "history.jsonl"
    assert states(plan, capsys)["ours/main"]["state"] == "running"
    os.utime(history, times=(time.time() - 3600,) * 2)
    assert states(plan, capsys)["ours/main"]["state"] == "interrupted"


def test_a_main_path_made_longer_by_a_version_is_extended(tmp_path, capsys):
    folder = trained(write_plan(tmp_path, 2), "ours/main", 0, 15)
    (folder / "result.json").write_text('{"step": 15}')
    row = states(write_plan(tmp_path, 3), capsys)["ours/main"]
    assert (row["state"], row["step"], row["last_step"]) == ("extended", 15, 25)


def test_a_main_path_that_went_further_than_its_plan_is_shown_as_trained(tmp_path, capsys):
    folder = trained(write_plan(tmp_path, 3), "ours/main", 0, 25)
    (folder / "result.json").write_text('{"step": 25}')
    save(folder / "checkpoints", 15)
    plan = write_plan(tmp_path, 2)
    row = states(plan, capsys)["ours/main"]
    assert (row["state"], row["step"], row["beyond"]) == ("done", 15, 25)
    assert main(["status", str(plan.path)]) == 0
    assert (
        "ours/main: trained to step 25, for versions that the plan no longer has" in capsys.readouterr().out
    )


def test_a_loss_that_is_no_number_is_null(tmp_path, capsys):
    plan = write_plan(tmp_path, 2)
    trained(plan, "ours/main", 0, 4, loss=float("nan"))
    assert states(plan, capsys)["ours/main"]["loss"] is None


def test_the_table_has_a_row_for_every_training(tmp_path, capsys):
    plan = write_plan(tmp_path, 2)
    assert main(["status", str(plan.path)]) == 0
    shown = capsys.readouterr().out
    assert "0/65 steps" in shown
    assert "ptfs/scratch-v1 = cpt/continual-v1" in shown
    assert "waiting for ours/main at step 15" in shown
    assert "\x1b" not in shown


def test_reading_changes_nothing_on_disk(tmp_path, capsys):
    plan = write_plan(tmp_path, 2)
    trained(plan, "ours/main", 0, 4)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    states(plan, capsys)
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before

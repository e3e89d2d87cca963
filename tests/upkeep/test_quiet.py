"""Commands that change an output are refused while a run trains in it or a job waits in Slurm's queue."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lrpath.cli import main
from megatron_lrpath.launch.slurm import queue
from megatron_lrpath.launch.slurm.ledger import Ledger, SubmittedJob
from megatron_lrpath.launch.slurm.queue import QueuedJob, SlurmError
from megatron_lrpath.locks import FolderLock
from megatron_lrpath.plan import Plan
from megatron_lrpath.runs.checkpoints import complete_steps
from megatron_lrpath.runs.folder import RunFolder
from tests.support.years_tree import make_tree

COMMANDS = [("prune", "--yes"), ("rewind", "--to-step", "40", "--drop", "v3")]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return make_tree(tmp_path)


def call(plan: Plan, argv: tuple[str, ...]) -> int:
    return main([argv[0], str(plan.path), *argv[1:]])


def saved(plan: Plan) -> int:
    return len(complete_steps(RunFolder(plan.folder(plan.main)).checkpoints))


@pytest.mark.parametrize("argv", COMMANDS)
@pytest.mark.parametrize("place", ["output", "ledger", "run", "checkpoints"])
def test_while_something_is_at_work(
    plan: Plan, place: str, argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run, ledger = RunFolder(plan.folder(plan.main)), Ledger.of(str(plan.output)).folder
    folders = {"output": Path(plan.output), "ledger": ledger, "run": run.path, "checkpoints": run.checkpoints}
    lock = FolderLock.acquire(folders[place])
    assert call(plan, argv) == 2
    lock.close()
    said = capsys.readouterr().err
    assert str(folders[place]) in said
    assert "then call again" in said
    assert saved(plan) == 10


@pytest.mark.parametrize("argv", COMMANDS)
@pytest.mark.parametrize("answers", [True, False])
def test_while_jobs_of_the_plan_are_in_the_queue(
    plan: Plan,
    answers: bool,
    argv: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ledger = Ledger.of(str(plan.output))
    ledger.folder.mkdir()
    ledger.add(SubmittedJob("ours/main", 17, "main.sh"))

    def squeue() -> dict[int, QueuedJob]:
        if not answers:
            raise SlurmError("squeue: Unable to contact slurm controller")
        return {17: QueuedJob(17, "PENDING", "Resources", "0:00", "", "main.sh submitted", "")}

    monkeypatch.setattr(queue, "queue", squeue)
    assert call(plan, argv) == 2
    said = capsys.readouterr().err
    assert ("ours/main (job 17)" if answers else "squeue does not answer here") in said
    assert saved(plan) == 10
    monkeypatch.setattr(queue, "queue", dict)  # the job is over
    assert call(plan, argv) == 0
    assert saved(plan) < 10


def test_jobs_of_the_experiment_that_wrote_the_plan_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_tree(tmp_path)
    written = tmp_path / "plans/runs.yaml"
    written.parent.mkdir()
    Path(plan.path).rename(written)
    assert main(["rewind", str(written), "--to-step", "40"]) == 2
    assert "was written by an experiment" in capsys.readouterr().err
    ledger = Ledger.of(str(tmp_path))
    ledger.folder.mkdir()
    ledger.add(SubmittedJob("runs/ours/main", 17, "main.sh"))
    job = QueuedJob(17, "RUNNING", "None", "0:09", "", "main.sh submitted", "")
    monkeypatch.setattr(queue, "queue", lambda: {17: job})
    assert main(["prune", str(written), "--yes"]) == 2
    assert "runs/ours/main (job 17)" in capsys.readouterr().err
    assert saved(plan) == 10

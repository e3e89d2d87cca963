"""Jobs in `lrpath status`: running and waiting ones of a training, evaluations, the reason of a stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lrpath.cli import main
from megatron_lrpath.launch.slurm import queue as commands
from megatron_lrpath.launch.slurm.ledger import SAVED, Attempt, Ledger, SubmittedJob, note_attempt
from megatron_lrpath.plan import Plan
from tests.support.launch_fixtures import write_plan


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    made = write_plan(tmp_path, 1)
    ledger = Ledger.of(str(made.output))
    ledger.folder.mkdir(parents=True)
    for number, key in enumerate(("ours/main", "ours/branch-v1", "eval/ours/branch-v1", "report"), start=1):
        ledger.add(SubmittedJob(key, number, "s"))
    return made


def queued(number: int, state: str, reason: str = "None", comment: str = "") -> commands.QueuedJob:
    return commands.QueuedJob(number, state, reason, "1:02", "", "s submitted", comment)


def shown(plan: Plan, monkeypatch, capsys, *jobs: commands.QueuedJob) -> str:
    """Return the output of `lrpath status` with these jobs in the queue."""
    monkeypatch.setattr(commands, "queue", lambda: {job.number: job for job in jobs})
    assert main(["status", str(plan.path), "--paradigm", "ours"]) == 0
    return capsys.readouterr().out


def test_the_running_job_is_shown_before_the_one_that_follows_it(plan, monkeypatch, capsys):
    Ledger.of(str(plan.output)).add(SubmittedJob("ours/main", 9, "s"))
    out = shown(plan, monkeypatch, capsys, queued(1, "RUNNING"), queued(9, "PENDING", "Dependency"))
    assert "1 running 1:02, then 9 pending (Dependency)" in out


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (
            queued(1, "PENDING", "JobHeldUser"),
            "ours/main: job 1: held by you (scontrol hold): scontrol release 1",
        ),
        (queued(1, "PENDING", "JobHeldAdmin"), "ours/main: job 1: held by an operator"),
        (
            queued(1, "PENDING", "DependencyNeverSatisfied"),
            "ours/main: job 1: the job that it waits for is gone",
        ),
        (
            queued(1, "PENDING", "JobHeldUser", "lrpath: held: bad data"),
            "ours/main: held: bad data; fix the cause",
        ),
        (queued(1, "PENDING", "Priority"), None),
    ],
)
def test_a_job_that_can_never_start_is_shown_with_the_reason(plan, monkeypatch, capsys, job, said):
    out = shown(plan, monkeypatch, capsys, job)
    if said is None:
        assert "ours/main:" not in out
    else:
        assert said in out


@pytest.mark.parametrize(
    ("attempt", "jobs", "said"),
    [
        (
            Attempt(0, 4, 4, SAVED),
            [queued(1, "PENDING", "BeginTime")],
            "saved at step 4 of 5; job 1 resumes automatically",
        ),
        (Attempt(0, 4, 4, SAVED), [], "saved at step 4 of 5; the job was ended: `lrpath submit` again"),
        (
            Attempt(0, 0, 0, SAVED, stopped="started 3 times from step 0 … : the time limit is too short"),
            [],
            "the time limit is too short; fix the cause, then `lrpath submit` again",
        ),
    ],
)
def test_the_status_shows_why_a_training_stopped(plan, monkeypatch, capsys, attempt, jobs, said):
    note_attempt(Ledger.of(str(plan.output)).attempts_file(1), attempt)
    assert said in shown(plan, monkeypatch, capsys, *jobs)


def test_an_early_death_shows_the_last_line_of_its_log(plan, monkeypatch, capsys):
    log = Ledger.of(str(plan.output)).folder / "logs/ours.main-1.log"
    log.parent.mkdir()
    log.write_text("/site.sh: No such file or directory\n\n")
    out = shown(plan, monkeypatch, capsys)
    assert "ours/main: job 1 has ended: /site.sh: No such file or directory; `lrpath submit` again" in out
    assert "eval/ours/branch-v1: job 3 has ended" in out
    assert out.count(" missing ") == 2  # the evaluation and the report

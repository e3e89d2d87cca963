"""The state of a plan's jobs for `lrpath status`: number, state, why a job stopped, what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.launch.slurm import queue as commands
from megatron_lrpath.launch.slurm.jobs import REPORT
from megatron_lrpath.launch.slurm.ledger import MARK, SAVED, Attempt, Ledger, SubmittedJob, read_attempts
from megatron_lrpath.runs import failure
from megatron_lrpath.runs.folder import OutputFolder, RunFolder
from megatron_lrpath.runs.results import fresh_evaluation, report_is_fresh
from megatron_lrpath.runs.tasks import Task

AGAIN = "`lrpath submit` again"
# Slurm's reasons of a pending job that need an action (docs/cluster.md has a row for each).
REASONS = {
    "DependencyNeverSatisfied": f"the job that it waits for is gone: {AGAIN}",
    "JobHeldUser": "held by you (scontrol hold): scontrol release {number}",
    "JobHeldAdmin": "held by an operator: ask them what is wrong; only they can release it",
    "launch failed requeued held": "its node could not start it: scontrol release {number}, or ask the operators",
    "PartitionTimeLimit": f"its time limit is above the partition's: a smaller LRPATH_TIME, then {AGAIN}",
    "PartitionNodeLimit": f"it asks for more nodes than the partition gives: a smaller LRPATH_NODES, then {AGAIN}",
    "BadConstraints": "no node of the partition is as the job asks (GPUs, memory, cores): change the settings",
    "AssocGrpBillingMinutes": "the account's budget is spent: ask the operators",
    "AssocGrpCPUMinutesLimit": "the account's budget is spent: ask the operators",
    "AssocGrpGRESMinutes": "the account's budget is spent: ask the operators",
    "InvalidAccount": f"the account does not exist here: fix LRPATH_ACCOUNT, then {AGAIN}",
    "InvalidQOS": f"the QOS does not exist here: fix LRPATH_QOS, then {AGAIN}",
}
_TAIL_BYTES = 4096


@dataclass(frozen=True)
class Jobs:
    """The submissions for an output folder, and the current queue (None: squeue does not answer)."""

    ledger: Ledger
    entries: Sequence[SubmittedJob]
    queue: Mapping[int, commands.QueuedJob] | None

    @classmethod
    def of(cls, output: str) -> Jobs:
        """Return the jobs of the plan or experiment with this output."""
        ledger = Ledger.of(output)
        entries = ledger.entries()
        try:
            return cls(ledger, entries, commands.queue() if entries else {})
        except UserError:
            return cls(ledger, entries, None)

    @cached_property
    def by_key(self) -> dict[str, list[SubmittedJob]]:
        """Return the entries of every key, oldest first."""
        found: dict[str, list[SubmittedJob]] = {}
        for entry in self.entries:
            found.setdefault(entry.key, []).append(entry)
        return found

    def shown(self, key: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Return the running or else the newest job of the key, and the pending job after it."""
        entries = self.by_key.get(key, [])
        alive = [entry for entry in entries if entry.number in (self.queue or {})]
        if not alive:
            return (self.about(entries[-1]) if entries else None), None
        waiting = [entry for entry in alive if (self.queue or {})[entry.number].state == "PENDING"]
        at_work = [entry for entry in alive if entry not in waiting]
        if at_work and waiting:
            return self.about(at_work[-1]), self.about(waiting[-1])
        return self.about(alive[-1]), None

    def about(self, entry: SubmittedJob) -> dict[str, Any]:
        """Return a job as JSON-serializable data: number, state, reason, comment, time_used, nodes, starts."""
        job = (self.queue or {}).get(entry.number)
        starts = len(read_attempts(self.ledger.attempts_file(entry.number)))
        ending = job is not None and self.ledger.cancel_mark(entry.number).exists()
        state = "unknown" if self.queue is None else "ended"
        if job:
            state = "ending" if ending else job.state.lower()
        return {
            "number": entry.number,
            "state": state,
            "reason": job.reason if job and job.state == "PENDING" else "",
            "comment": job.comment.removeprefix(MARK) if job and job.comment.startswith(MARK) else "",
            "time_used": job.time_used if job else "",
            "nodes": job.nodes if job else "",
            "starts": starts + bool(job and job.state == "RUNNING"),
        }

    def last_attempt(self, job: Mapping[str, Any]) -> Attempt | None:
        """Return how the last start of a job ended, if it is recorded."""
        attempts = read_attempts(self.ledger.attempts_file(job["number"]))
        return attempts[-1] if attempts else None

    def last_words(self, key: str, job: Mapping[str, Any]) -> str:
        """Return the last line of a job's log, from the script or from Slurm."""
        path = self.ledger.folder / "logs" / f"{key.replace('/', '.')}-{job['number']}.log"
        try:
            with path.open("rb") as stream:
                stream.seek(max(0, path.stat().st_size - _TAIL_BYTES))
                lines = stream.read().decode("utf-8", errors="replace").split("\n")
        except OSError:
            return f"no log was written (scontrol show job {job['number']} or sacct may say more)"
        said = [line.strip() for line in lines if line.strip()]
        return said[-1] if said else f"its log is empty (scontrol show job {job['number']} may say more)"

    def why(self, key: str, job: Mapping[str, Any], last_step: int) -> str | None:
        """Return why a job does not run, and what to do; None if there is no problem."""
        if job["state"] in ("running", "completing", "configuring", "unknown"):
            return None
        number = job["number"]
        if job["state"] == "ending":
            return f"job {number} was cancelled: it saves and ends"
        if job["comment"]:
            return f"{job['comment']}; fix the cause, then {AGAIN}"
        reason = REASONS.get(job["reason"])
        if reason:
            return f"job {number}: {reason.format(number=number)}"
        attempt = self.last_attempt(job)
        if attempt and attempt.stopped:
            return f"{attempt.stopped}; fix the cause, then {AGAIN}"
        if attempt and job["state"] == "pending":
            how = attempt.said(last_step) + (f" ({attempt.cause})" if attempt.cause else "")
            return f"{how}; job {number} resumes automatically"
        if job["state"] != "ended":
            return None
        if attempt and attempt.ending == SAVED:
            return f"{attempt.said(last_step)}; the job was ended: {AGAIN} to go on"
        if self.ledger.cancel_mark(number).exists():
            return f"job {number} was cancelled: {AGAIN} to go on"
        return f"job {number} has ended: {self.last_words(key, job)}; {AGAIN} to go on"


def add_jobs(output: str, rows: list[dict[str, Any]], tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """Add `job` and `next_job` (see `Jobs.about`; None if there is none) to each row of a run, and the reason
    why it waits.

    `output` is the folder of the plan's (or experiment's) results. Rows without a submission are
    unchanged. A run whose job is running counts as running regardless of its lock file, because locks do
    not always reach other nodes.

    Returns:
        The submitted evaluations and report, as rows with key, kind, state (done, running, waiting, missing), job and
        cause.
    """
    jobs = Jobs.of(output)
    if not jobs.entries:
        return []
    for row in rows:
        row["job"], row["next_job"] = jobs.shown(row["key"])
        job = row["job"]
        if job is None:
            continue
        if job["state"] == "running":
            row["state"] = "running"
            row["waiting_for"] = row["cause"] = row["log"] = None
            pace = row["seconds_per_step"]
            row["seconds_left"] = (row["last_step"] - row["step"]) * pace if pace else None
        elif row["state"] not in ("done", "extended", "running"):
            row["cause"] = _cause(jobs, row)
    return [*_evaluations(jobs, tasks), *_report(jobs, output, tasks)]


def _cause(jobs: Jobs, row: Mapping[str, Any]) -> str | None:
    """Return why a training does not run: the job's reason if it has more information than the run's own
    record.
    """
    found = jobs.why(row["key"], row["job"], row["last_step"])
    own: str | None = row["cause"]
    has_words = row["job"]["comment"] or jobs.last_attempt(row["job"]) or row["job"]["state"] != "ended"
    return found if found and (has_words or not own) else own


def _evaluations(jobs: Jobs, tasks: Sequence[Task]) -> list[dict[str, Any]]:
    rows = []
    for task in tasks:
        key = f"eval/{task.key}"
        job, _ = jobs.shown(key)
        if job is not None:
            done = task.complete and fresh_evaluation(task.folder, task.run.last_step) is not None
            error = failure.read(RunFolder(RunFolder(task.folder).evaluation_job).error)
            rows.append(_other_row(jobs, key, "eval", job, done, error.message if error else None))
    return rows


def _report(jobs: Jobs, output: str, tasks: Sequence[Task]) -> list[dict[str, Any]]:
    job, _ = jobs.shown(REPORT)
    if job is None:
        return []
    folder = OutputFolder(Path(output)).report
    versions = [task for task in tasks if task.run.makes_version and f"eval/{task.key}" in jobs.by_key]
    done = bool(versions) and report_is_fresh(folder, [task.folder for task in versions])
    return [_other_row(jobs, REPORT, "report", job, done, None)]


def _other_row(
    jobs: Jobs, key: str, kind: str, job: dict[str, Any], done: bool, error: str | None
) -> dict[str, Any]:
    """Return the row of an evaluation or of the report."""
    states = {"running": "running", "pending": "waiting", "unknown": "unknown"}
    state = "done" if done else states.get(job["state"], "missing")
    cause = None if done else jobs.why(key, job, 0)
    if state == "missing" and error:
        cause = f"{error}; {AGAIN}"
    return {"key": key, "kind": kind, "state": state, "job": job, "cause": cause}


def job_text(job: dict[str, Any] | None, following: dict[str, Any] | None = None) -> str:
    """Return the job for a table: `4711 running 1:02:03`, `4712 pending (Dependency)`, `4713 running, start
    3`.
    """
    if job is None or job["state"] == "ended":
        return ""
    reason = f" ({job['reason']})" if job["reason"] and job["reason"] != "None" else ""
    again = f", start {job['starts']}" if job["starts"] > 1 else ""
    used = f" {job['time_used']}" if job["state"] == "running" else ""
    then = f", then {job_text(following)}" if following else ""
    return f"{job['number']} {job['state']}{used}{reason}{again}{then}"

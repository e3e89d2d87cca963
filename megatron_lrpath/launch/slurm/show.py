"""The state of a plan's jobs as `lrpath status` shows it."""

from __future__ import annotations

from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.launch.slurm import queue as commands
from megatron_lrpath.launch.slurm.ledger import MARK, Ledger, read_attempts


def add_jobs(output: str, rows: list[dict[str, Any]]) -> None:
    """Give each row of a run its `job`: None, or number, state, reason, time_used, nodes, starts, comment.

    `output` is the folder of the plan's (or experiment's) results. What was never submitted is left as it is.
    Where squeue does not answer, the state is `unknown`. A run whose job is running is running, whatever its
    lock file says here: locks may not reach other nodes.
    """
    ledger = Ledger.of(output)
    newest = ledger.newest()
    if not newest:
        return
    try:
        queue: dict[int, commands.QueuedJob] | None = commands.queue()
    except UserError:
        queue = None
    for row in rows:
        entry = newest.get(row["key"])
        row["job"] = None
        if entry is None:
            continue
        job = (queue or {}).get(entry.number)
        starts = len(read_attempts(ledger.attempts_file(entry.number)))
        row["job"] = {
            "number": entry.number,
            "state": job.state.lower() if job else ("unknown" if queue is None else "ended"),
            "reason": job.reason if job and job.state == "PENDING" else "",
            "comment": job.comment.removeprefix(MARK) if job and job.comment.startswith(MARK) else "",
            "time_used": job.time_used if job else "",
            "nodes": job.nodes if job else "",
            "starts": starts + bool(job and job.state == "RUNNING"),
        }
        if job and job.state == "RUNNING":
            row["state"] = "running"
            row["waiting_for"] = row["cause"] = row["log"] = None
            pace = row["seconds_per_step"]
            row["seconds_left"] = (row["last_step"] - row["step"]) * pace if pace else None
        elif row["job"]["comment"] and not row["cause"]:
            row["cause"] = row["job"]["comment"]


def job_text(job: dict[str, Any] | None) -> str:
    """The job for a table: `4711 running 1:02:03`, `4712 pending (Dependency)`, `4713 running, start 3`."""
    if job is None or job["state"] == "ended":
        return ""
    reason = f" ({job['reason']})" if job["reason"] and job["reason"] != "None" else ""
    again = f", start {job['starts']}" if job["starts"] > 1 else ""
    used = f" {job['time_used']}" if job["state"] == "running" else ""
    return f"{job['number']} {job['state']}{used}{reason}{again}"

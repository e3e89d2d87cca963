"""Call Slurm's commands with lists of arguments, so that a shell interprets nothing in them."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lrpath.errors import UserError

ALIVE = frozenset((
    "PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "COMPLETING", "REQUEUED", "REQUEUE_HOLD",
    "REQUEUE_FED", "RESIZING", "SIGNALING", "STAGE_OUT", "RESV_DEL_HOLD", "SPECIAL_EXIT",
))  # fmt: skip
TIMEOUT_SECONDS = 60.0
PATIENCE_SECONDS = (1.0, 5.0, 20.0)  # between retries if the controller does not answer
_BUSY = ("timed out", "Unable to contact", "Connection refused", "temporarily", "try again")
SUBMITTED = "submitted"  # an argument of every script that `submit` submits; the script does not read it
_SEPARATOR = "\x1f"


class SlurmError(UserError):
    """A failed command of Slurm; the text is its output."""


@dataclass(frozen=True)
class QueuedJob:
    """A job in the queue, as printed by squeue. `script` is the submitted file with its argument."""

    number: int
    state: str
    reason: str
    time_used: str
    nodes: str
    script: str
    comment: str

    @property
    def by_hand(self) -> bool:
        """Return whether a user has called sbatch with the script, instead of `submit`."""
        return not self.script.endswith(f" {SUBMITTED}")


def submit(options: Sequence[str], script: Path) -> int:
    """Call sbatch with these options; return the job's number."""
    output = call("sbatch", "--parsable", *options, str(script), SUBMITTED, tries=1)
    return int(output.strip().splitlines()[-1].partition(";")[0])


def queue() -> dict[int, QueuedJob]:
    """Return the user's jobs that are pending or running, by number."""
    fields = _SEPARATOR.join(["%A", "%T", "%r", "%M", "%N", "%o", "%k"])
    rows = call("squeue", "--me", "--noheader", "--format", fields).splitlines()
    jobs = {}
    for row in rows:
        parts = row.split(_SEPARATOR)
        if len(parts) == 7 and parts[0].isdigit() and parts[1] in ALIVE:
            jobs[int(parts[0])] = QueuedJob(int(parts[0]), *parts[1:])
    return jobs


def may_be_requeued(number: int) -> bool:
    """Return whether a job that has saved may be requeued: it is running, or has just reached its time limit.

    A cancelled job has the state COMPLETING and must not be requeued. A job that Slurm itself requeues (after
    a preemption or a node failure) has the state COMPLETING or PENDING.
    """
    about = show("job", str(number))
    used, limit = (clock_seconds(about.get(name, "")) for name in ("RunTime", "TimeLimit"))
    timed_out = used is not None and limit is not None and used >= limit
    return about.get("JobState") == "RUNNING" or (about.get("JobState") == "COMPLETING" and timed_out)


def seconds_left(number: int) -> float | None:
    """Return the seconds to a job's time limit; None if it has no limit, or Slurm does not answer."""
    try:
        about = show("job", str(number))
    except UserError:
        return None
    used, limit = (clock_seconds(about.get(name, "")) for name in ("RunTime", "TimeLimit"))
    return None if used is None or limit is None else limit - used


def show(kind: str, name: str) -> dict[str, str]:
    """Return the fields that `scontrol show` prints for a job or node; values end at their first space."""
    fields = call("scontrol", "show", kind, "--oneliner", name).split()
    return {name: value for name, joined, value in (part.partition("=") for part in fields) if joined}


def clock_seconds(text: str) -> int | None:
    """Return the seconds of Slurm's `[D-]HH:MM:SS`, None for UNLIMITED and the like."""
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if len(parts) != 3 or not all(part.isdigit() for part in parts) or not (days or "0").isdigit():
        return None
    hours, minutes, seconds = map(int, parts)
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def forget_dependency(number: int) -> None:
    """Remove a pending job's dependencies, so that it can start now."""
    call("scontrol", "update", f"JobId={number}", "Dependency=")


def wait_for(numbers: Sequence[int], number: int) -> None:
    """Let a pending job start after all these jobs have ended in any way; now if there are none."""
    waited = f"afterany:{':'.join(map(str, numbers))}" if numbers else ""
    call("scontrol", "update", f"JobId={number}", f"Dependency={waited}")


def hold(number: int, reason: str) -> None:
    """Hold a pending job and write the reason into its comment."""
    set_comment(number, reason)
    call("scontrol", "uhold", str(number))


def set_comment(number: int, text: str) -> None:
    """Set the comment of the job that squeue shows."""
    line = " ".join(text.split())[:1000]
    call("scontrol", "update", f"JobId={number}", f"Comment={line}")


def cancel(numbers: Sequence[int]) -> None:
    """End jobs, pending or running."""
    if numbers:
        call("scancel", "--quiet", *map(str, numbers))


def ask_to_save(number: int) -> None:
    """Send a running job the signal that it also gets before its time limit."""
    call("scancel", "--quiet", "--batch", "--signal=USR2", str(number))


def call(*argv: str, tries: int = 1 + len(PATIENCE_SECONDS)) -> str:
    """Return the output of a command. Raise `SlurmError` if it fails, after `tries` tries if the controller
    is busy.
    """
    # Slurm's variables of the job of this process would be options of another job
    kept = {name for name in os.environ if not name.startswith("SLURM_") or name == "SLURM_CONF"}
    environment, answered = {name: os.environ[name] for name in kept}, ""
    for wait in (0.0, *PATIENCE_SECONDS)[:tries]:
        time.sleep(wait)
        try:
            answer = subprocess.run(
                argv, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=environment
            )
        except FileNotFoundError:
            raise SlurmError(f"{argv[0]} is not here: Slurm's commands are needed on this machine") from None
        except subprocess.TimeoutExpired:
            answered = f"timed out after {TIMEOUT_SECONDS:.0f} s"
            continue
        if answer.returncode == 0:
            return answer.stdout
        answered = answer.stderr.strip() or f"exit status {answer.returncode}"
        if not any(mark in answered for mark in _BUSY):
            break
    raise SlurmError(f"{argv[0]}: {answered}")

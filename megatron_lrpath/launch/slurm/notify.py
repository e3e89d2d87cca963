"""Call the user's command when a job has failed permanently, and when the report is written."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

DONE, FAILED, HELD = "done", "failed", "held"
LONGEST_SECONDS = 60.0


def notify(command: Sequence[str], event: str, key: str, text: str) -> None:
    """Call `command EVENT JOB TEXT` (no shell), unless it is empty; if it fails, only print that."""
    if not command:
        return
    try:
        answer = subprocess.run([*command, event, key, text], timeout=LONGEST_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"LRPATH_NOTIFY: {command[0]}: {error}", flush=True)
        return
    if answer.returncode:
        print(f"LRPATH_NOTIFY: {command[0]} ended with status {answer.returncode}", flush=True)

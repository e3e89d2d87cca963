"""How each start of a job ended, and whether it goes on: again into the queue, or stop with a reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

SAME_CHECKPOINT = 3  # starts from one checkpoint without a newer one, after which we give up

COMPLETE, SAVED, FAILED = "complete", "saved", "failed"
REQUEUE, STOP = "requeue", "stop"


@dataclass(frozen=True)
class Attempt:
    """One start of a job.

    `start` is the step it started from, `step` the last one it logged, `checkpoint` the newest complete one at
    its end. `ending`: complete, saved (asked to stop, has saved) or failed; `cause` is a sentence.
    `hopeless` is a failure that another start cannot mend, as bad data.
    """

    start: int
    step: int
    checkpoint: int
    ending: str
    cause: str | None = None
    hopeless: bool = False
    time: str = ""


@dataclass(frozen=True)
class Verdict:
    """What is to be done: complete, requeue, or stop; `reason` says why it stops."""

    action: str
    reason: str = ""


def judge(attempt: Attempt, earlier: Sequence[Attempt]) -> Verdict:
    """What follows from the last attempt and those before it.

    A failure is tried once more, for it may have been the machine's. The same step failing twice stops, and so
    do three starts in a row from one checkpoint that do not get to the next: whatever the reasons, they would
    go on for ever.
    """
    if attempt.ending == COMPLETE:
        return Verdict(COMPLETE)
    cause = attempt.cause or "no cause found"
    if attempt.hopeless:
        return Verdict(STOP, cause)
    failures = [one for one in earlier if one.ending == FAILED]
    if attempt.ending == FAILED and any(one.step == attempt.step for one in failures):
        return Verdict(STOP, f"failed twice at step {attempt.step + 1}: {cause}")
    stuck = 0
    for one in reversed([*earlier, attempt]):
        if one.start != attempt.start or one.checkpoint > one.start:
            break
        stuck += 1
    if stuck >= SAME_CHECKPOINT:
        said = f"; the last time: {cause}" if attempt.ending == FAILED else ": the time limit is too short"
        return Verdict(
            STOP, f"started {stuck} times from step {attempt.start} without a new checkpoint{said}"
        )
    return Verdict(REQUEUE)


def read_attempts(path: Path) -> list[Attempt]:
    """The attempts noted in a file, oldest first; a line that was cut off is left out."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            found.append(Attempt(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def note_attempt(path: Path, attempt: Attempt) -> None:
    """Append an attempt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(attempt)) + "\n")

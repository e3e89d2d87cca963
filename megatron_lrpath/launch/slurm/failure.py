"""Why a step failed, out of the logs of its ranks and what srun said of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_lrpath.launch.cause import find_cause, is_consequence
from megatron_lrpath.launch.slurm.steps import Steps, first_exits

_OWN_ERROR = re.compile(r"\blrpath: error: (.*)")
_TAIL = 200_000  # characters
BAD_INPUT = "Exited with exit code 2"  # as srun says it


@dataclass(frozen=True)
class Failure:
    """The cause in a sentence; `hopeless` where another start would meet it again, as with bad data."""

    text: str
    hopeless: bool = False


def why(steps: Steps, status: int) -> Failure:
    """The cause of a step's failure.

    An error message of ours first; then the exception of a rank, the rank that ended first before the others;
    then how that rank ended. What a rank says only because another is gone comes last. A rank's exit status 2
    means bad input.
    """
    logs = {int(path.stem.partition("-")[2]): path for path in steps.rank_logs()}
    own_log = steps.log.read_text(encoding="utf-8", errors="replace")[-_TAIL:]
    exits = first_exits(own_log)
    hopeless = any(how == BAD_INPUT for _, how in exits)
    texts = [path.read_text(encoding="utf-8", errors="replace")[-_TAIL:] for path in logs.values()]
    said = [match[1].strip() for text in texts for match in _OWN_ERROR.finditer(text)]
    for text in said:
        if not is_consequence(text):
            return Failure(text, hopeless)
    order = [*(rank for rank, _ in exits), *logs]
    ranks = [rank for rank in dict.fromkeys(order) if rank in logs]
    found = [(rank, cause) for rank in ranks if (cause := find_cause(logs[rank]))]
    causes = [(rank, cause) for rank, cause in found if not is_consequence(cause)]
    signals = [(rank, how) for rank, how in exits if not how.startswith("Exited with")]
    if causes:
        return Failure(f"rank {causes[0][0]}: {causes[0][1]}")
    if signals:
        return Failure(f"rank {signals[0][0]} ended by a signal: {signals[0][1]}")
    if status == 124:
        return Failure("it did not end within its time")
    if found or exits:
        rank, text = (found or exits)[0]
        return Failure(f"rank {rank}: {text}")
    return Failure(f"srun ended with status {status}: {last_line(own_log)}")


def last_line(text: str) -> str:
    """The last line that is not ours."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("[lrpath ")]
    return lines[-1].strip() if lines else "it said nothing"

"""Why a run failed, in one line, read from the end of its log."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from megatron_lrpath.errors import CONSEQUENCES

TAIL_BYTES = 4 * 1024 * 1024
_RANK = re.compile(r"^\[(?:default|rank)?(\d+)\]: ?")
_OWN_ERROR = re.compile(r"\blrpath: error: (.*)")
_USAGE_ERROR = re.compile(r"^\S+: error: (.*)")
_ROOT_CAUSE = re.compile(r"^Root Cause")
_TABLE_RANK = re.compile(r"^\s*rank\s*:\s*(\d+)")
_EXIT_CODE = re.compile(r"^\s*exitcode\s*:\s*(-?\d+)")
_EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?::|$)")
# torchrun's own report of a worker's death
_TORCHRUN = ("ChildFailedError", "SignalException", "RendezvousClosedError")
_SIGNALS = {6: "SIGABRT", 7: "SIGBUS", 9: "SIGKILL, perhaps for want of memory", 11: "SIGSEGV", 15: "SIGTERM"}


def find_cause(log: Path) -> str | None:
    """The cause of the failure that `log` ends with, None where the log names none.

    First a line `lrpath: error: ...`, or one of the kind from the argument parser. Else the last exception of
    the rank that torchrun names as the root cause, or the signal that killed it; else the last exception that
    is no mere consequence of another rank's end; else whatever is left.
    """
    lines = _tail(log)
    for pattern in (_OWN_ERROR, _USAGE_ERROR):
        said = [match[1] for line in lines if (match := pattern.search(line))]
        if said:
            return said[0].strip()
    rank, code = _root_cause(lines)
    exceptions = list(_exceptions(lines))
    own = [(who, text) for who, text in exceptions if not any(mark in text for mark in CONSEQUENCES)]
    at_fault = [text for who, text in own if who == rank and rank is not None]
    if at_fault:
        return at_fault[-1]
    if rank is not None and code is not None and code < 0:
        return f"rank {rank} was killed by {_SIGNALS.get(-code, f'signal {-code}')}"
    for found in (own, exceptions):
        if found:
            return found[-1][1]
    return None if code is None else f"rank {rank} exited with status {code}"


def is_consequence(cause: str) -> bool:
    """Whether a cause is only what a rank says when another one is gone."""
    return any(mark in cause for mark in CONSEQUENCES)


def _tail(log: Path) -> list[str]:
    try:
        with log.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - TAIL_BYTES))
            return stream.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _exceptions(lines: Iterable[str]) -> Iterable[tuple[int | None, str]]:
    """(rank, last line) of every traceback but torchrun's own. Lines of several ranks may be interleaved."""
    inside: set[int | None] = set()
    for line in lines:
        match = _RANK.match(line)
        rank, text = (int(match[1]), line[match.end() :]) if match else (None, line)
        if text.startswith("Traceback (most recent call last)"):
            inside.add(rank)
        elif rank in inside and text and not text[0].isspace() and (_EXCEPTION.match(text) or ":" in text):
            inside.discard(rank)
            if not any(mark in text.partition(":")[0] for mark in _TORCHRUN):
                yield rank, text.strip()


def _root_cause(lines: list[str]) -> tuple[int | None, int | None]:
    """Rank and exit code in the last root-cause table of torchrun."""
    starts = [number for number, line in enumerate(lines) if _ROOT_CAUSE.match(line)]
    table = lines[starts[-1] : starts[-1] + 10] if starts else []
    ranks = [int(match[1]) for line in table if (match := _TABLE_RANK.match(line))]
    codes = [int(match[1]) for line in table if (match := _EXIT_CODE.match(line))]
    return (ranks[0] if ranks else None), (codes[0] if codes else None)

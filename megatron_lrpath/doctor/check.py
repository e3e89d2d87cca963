"""One finding of the doctor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron_lrpath.errors import UserError

OK, INFO, WARNING, FAILED = "ok", "info", "warning", "failed"
ORDER = (OK, INFO, WARNING, FAILED)


@dataclass(frozen=True)
class Check:
    """What was looked at, how it stands (ok, info, warning, failed), what was found, what to do about it."""

    name: str
    status: str
    found: str
    advice: str = ""


def worst(checks: Iterable[Check]) -> str:
    """The worst status among the checks."""
    return max((check.status for check in checks), key=ORDER.index, default=OK)


def attempt(name: str, proof: Callable[[], str]) -> Check:
    """`proof`'s words as a finding that is ok; its user error as one that failed."""
    try:
        return Check(name, OK, proof())
    except UserError as error:
        return Check(name, FAILED, str(error))


def gigabytes(number: float) -> str:
    """Bytes for people."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e8 else f"{number / 1e6:,.1f} MB"

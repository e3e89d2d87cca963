"""The result of one check, and what becomes of several."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron_lrpath.errors import UserError

OK, INFO, WARNING, FAILED = "ok", "info", "warning", "failed"
ORDER = (OK, INFO, WARNING, FAILED)


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: what was looked at.
        status: OK, INFO, WARNING or FAILED.
        found: what was found.
        advice: what to do about it, where `found` does not say so.
        is_missing: a file is not there, which contradicts nothing yet.
    """

    name: str
    status: str
    found: str
    advice: str = ""
    is_missing: bool = False

    @property
    def line(self) -> str:
        """The finding in one line."""
        text = f"{self.name}: {self.found}" + (f". {self.advice}" if self.advice else "")
        return " ".join(text.split("\n"))


def worst(findings: Iterable[Finding]) -> str:
    """The worst status among the findings."""
    return max((finding.status for finding in findings), key=ORDER.index, default=OK)


def attempt(name: str, proof: Callable[[], str | None], found: str = "", missing: bool = False) -> Finding:
    """What `proof` returns (or `found`) as a finding that is ok; its user error as one that failed.

    `missing` says that a failure is for want of a file.
    """
    try:
        return Finding(name, OK, proof() or found)
    except UserError as error:
        return Finding(name, FAILED, str(error), is_missing=missing)

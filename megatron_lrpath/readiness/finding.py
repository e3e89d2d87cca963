"""The result of one check, and the summary of several."""

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
        name: the subject of the check.
        status: OK, INFO, WARNING or FAILED.
        found: the result.
        advice: what to do, unless `found` includes that.
        is_missing: whether a file is missing, which is not a contradiction yet.
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
    """Return the worst status among the findings."""
    return max((finding.status for finding in findings), key=ORDER.index, default=OK)


def attempt(name: str, proof: Callable[[], str | None], found: str = "", missing: bool = False) -> Finding:
    """Return an ok finding with the result of `proof` (or `found`), or a failed one with its user error.

    `missing`: whether a failure means that a file is missing.
    """
    try:
        return Finding(name, OK, proof() or found)
    except UserError as error:
        return Finding(name, FAILED, str(error), is_missing=missing)

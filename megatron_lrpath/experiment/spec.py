"""What an experiment file says, and the plans it stands for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lrpath.plan import Plan


@dataclass(frozen=True)
class Point:
    """One variation with one seed: a plan of its own.

    `group` is the variation without its seed, `text` the plan file that it becomes, `values` what was varied
    by its key.
    """

    name: str
    group: str
    values: dict[str, Any]
    plan: Plan
    text: str


@dataclass(frozen=True)
class Experiment:
    """A checked experiment file.

    `paradigms` are those to carry out; `only` the runs to carry out with their ancestors (empty: all); `show`
    the versions that the table has. `paper` holds the paper's perplexities by group and paradigm, in the
    order of `show`.
    """

    path: Path
    name: str
    about: str
    output: Path
    paradigms: tuple[str, ...]
    only: tuple[str, ...]
    show: tuple[str, ...]
    points: tuple[Point, ...]
    paper: dict[str, dict[str, tuple[float, ...]]] = field(default_factory=dict)

    @property
    def groups(self) -> list[str]:
        """The variations, each once, in order."""
        return list(dict.fromkeys(point.group for point in self.points))

    def of(self, group: str) -> list[Point]:
        """The points of a variation, one for each seed."""
        return [point for point in self.points if point.group == group]

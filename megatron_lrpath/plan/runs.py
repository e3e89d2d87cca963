"""The runs of the three paradigms: what starts from what, its length, its learning rate, its data."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_lrpath.plan.mix import Mix
from megatron_lrpath.plan.spec import Parent, Version
from megatron_lrpath.schedule import LRPath, Schedule

PARADIGMS = ("ours", "ptfs", "cpt")


@dataclass(frozen=True)
class Run:
    """One training run. All steps are counted from the first step of its oldest ancestor.

    - `kind`: main, branch (ours), scratch (PTFS) or continual (CPT).
    - `version`, `version_index`: the version it makes, counted from 1; for the main path the last one.
    - `parent`: where it starts from, None for random weights; `first_step` is the parent's step.
    - `path`: its learning rate, positions in steps.
    - `slices`: versions whose data it reads, in order.
    - `keep_steps`: steps whose checkpoints others start from; they outlive any retention.
    - `mix`: other data that a branch reads beside the main path's samples.
    - `same_as`: (paradigm, name) of the run that this one is identical to and is carried out as.
    """

    name: str
    kind: str
    paradigm: str
    version: str
    version_index: int
    parent: Parent | None
    first_step: int
    last_step: int
    path: LRPath
    slices: tuple[str, ...]
    keep_steps: tuple[int, ...] = ()
    same_as: tuple[str, str] | None = None
    mix: Mix | None = None

    @property
    def steps(self) -> int:
        """How many steps the run itself does."""
        return self.last_step - self.first_step

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, as in `lrpath plan --json`."""
        return {
            "name": self.name,
            "kind": self.kind,
            "version": self.version,
            "parent": self.parent.to_dict() if self.parent else None,
            "first_step": self.first_step,
            "last_step": self.last_step,
            "steps": self.steps,
            "slices": list(self.slices),
            "keep_steps": list(self.keep_steps),
            "same_as": {"paradigm": self.same_as[0], "run": self.same_as[1]} if self.same_as else None,
            "mix": self.mix.to_dict() if self.mix else None,
            "path": self.path.to_dict(),
        }


@dataclass(frozen=True)
class Timeline:
    """The steps at which versions end and branches leave, and the runs that follow from them.

    E_i = T_1 + … + T_i; a branch lasts round(α_i·T_i) steps and leaves the main path at B_i = E_i minus that.
    `also_branch_at`: steps at which branches of other plans leave the same main path.
    """

    schedule: Schedule
    alpha: float
    cpt_variant: str
    versions: Sequence[Version]
    also_branch_at: Sequence[int] = ()

    @cached_property
    def ends(self) -> list[int]:
        """E_1 … E_N."""
        return list(itertools.accumulate(version.steps for version in self.versions))

    @cached_property
    def branch_steps(self) -> list[int]:
        """round(α_i·T_i) for each version; halves go to the even number, as Python rounds."""
        return [round((version.alpha or self.alpha) * version.steps) for version in self.versions]

    @cached_property
    def branch_points(self) -> list[int]:
        """B_1 … B_N."""
        return [end - steps for end, steps in zip(self.ends, self.branch_steps, strict=True)]

    def runs(self, paradigm: str) -> list[Run]:
        """The runs of a paradigm, parents before children."""
        if paradigm == "ours":
            return [self._main(), *self._branches()]
        return self._scratch() if paradigm == "ptfs" else self._continual()

    def _names(self, count: int) -> tuple[str, ...]:
        return tuple(version.name for version in self.versions[:count])

    def _main(self) -> Run:
        points, count = {*self.branch_points, *self.also_branch_at}, len(self.versions)
        last = max(points)
        reads_last = last > self.ends[-1] - self.versions[-1].steps
        return Run(
            name="main",
            kind="main",
            paradigm="ours",
            version=self.versions[-1].name,
            version_index=count,
            parent=None,
            first_step=0,
            last_step=last,
            path=LRPath(self.schedule, "plateau", 0, last, warmup=self.schedule.warmup),
            slices=self._names(count if reads_last else count - 1),
            keep_steps=tuple(sorted(points | {end for end in self.ends if end <= last})),
        )

    def _branches(self) -> list[Run]:
        return [
            Run(
                name=f"branch-{version.name}",
                kind="branch",
                paradigm="ours",
                version=version.name,
                version_index=index,
                parent=Parent("main", point),
                first_step=point,
                last_step=end,
                path=LRPath(self.schedule, "branch", point, end, cycle=version.cycle_steps.get("branch")),
                slices=(version.name,),
                mix=version.mix,
            )
            for index, (version, point, end) in enumerate(
                zip(self.versions, self.branch_points, self.ends, strict=True), start=1
            )
        ]

    def _scratch(self) -> list[Run]:
        return [
            Run(
                name=f"scratch-{version.name}",
                kind="scratch",
                paradigm="ptfs",
                version=version.name,
                version_index=index,
                parent=None,
                first_step=0,
                last_step=end,
                path=self._whole(0, end, self.schedule.warmup, version.cycle_steps.get("scratch")),
                slices=self._names(index),
                keep_steps=(end,) if index == 1 else (),  # CPT goes on from the first one
            )
            for index, (version, end) in enumerate(zip(self.versions, self.ends, strict=True), start=1)
        ]

    def _continual(self) -> list[Run]:
        runs: list[Run] = []
        for index, (version, end) in enumerate(zip(self.versions, self.ends, strict=True), start=1):
            begin = end - version.steps
            runs.append(
                Run(
                    name=f"continual-{version.name}",
                    kind="continual",
                    paradigm="cpt",
                    version=version.name,
                    version_index=index,
                    parent=Parent(runs[-1].name, begin) if runs else None,
                    first_step=begin,
                    last_step=end,
                    path=self._continual_path(version, begin, end),
                    slices=(version.name,),
                    keep_steps=(end,),
                    same_as=None if runs else ("ptfs", f"scratch-{version.name}"),
                )
            )
        return runs

    def _continual_path(self, version: Version, begin: int, end: int) -> LRPath:
        if begin == 0:
            return self._whole(0, end, self.schedule.warmup, version.cycle_steps.get("scratch"))
        if self.cpt_variant == "keep-min":
            return LRPath(self.schedule, "floor", begin, end)
        warmup = self.schedule.warmup if self.cpt_variant == "rewarm-max" else 0
        return self._whole(begin, end, warmup, version.cycle_steps.get("continual"))

    def _whole(self, begin: int, end: int, warmup: int, cycle: float | None) -> LRPath:
        return LRPath(self.schedule, "whole", begin, end, warmup=warmup, cycle=cycle)

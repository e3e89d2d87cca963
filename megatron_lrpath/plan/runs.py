"""The runs of the three paradigms: their parents, lengths, learning rates and data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from megatron_lrpath.paradigms import (
    BRANCH,
    CONTINUAL,
    CPT,
    CPT_VARIANTS,
    KINDS,
    MAIN,
    OURS,
    PARADIGM_OF,
    PARADIGMS,
    PTFS,
    SCRATCH,
    SFT,
    Kind,
    path_form,
)
from megatron_lrpath.plan.mix import Mix
from megatron_lrpath.plan.spec import Falling, Parent, Version
from megatron_lrpath.schedule import LRPath, MainRate, Move, Schedule


@dataclass(frozen=True)
class Run:
    """One training run. All steps are counted from the first step of its oldest ancestor.

    - `kind`: main, branch (ours), scratch (PTFS), continual (CPT) or sft; see `paradigms.KINDS`.
    - `version`, `version_index`: the version it makes, counted from 1; for the main path the last one.
    - `parent`: where it starts from, None for random weights; `first_step` is the parent's step.
    - `path`: its learning rate, positions in steps.
    - `slices`: versions whose data it reads, in order.
    - `keep_steps`: steps whose checkpoints other runs start from; any retention keeps them.
    - `mix`: data that a branch reads in addition to the main path's samples.
    - `same_as`: (paradigm, name) of the identical run that is trained in its place.
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
    def key(self) -> str:
        """`<paradigm>/<run>`, unique in a plan."""
        return f"{self.paradigm}/{self.name}"

    @property
    def carried_out_as(self) -> str:
        """The key of the run that performs the training: its own, or that of `same_as`."""
        return "/".join(self.same_as) if self.same_as else self.key

    @property
    def steps(self) -> int:
        """The number of steps of the run itself."""
        return self.last_step - self.first_step

    @property
    def makes_version(self) -> bool:
        """Return whether its end is a version's model, which is true for all except the main path."""
        return KINDS[self.kind].makes_version

    @property
    def is_sft(self) -> bool:
        """Return whether it is a fine-tuning."""
        return self.kind == SFT.name

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serializable data, as in `lrpath plan --json`."""
        return {
            "name": self.name,
            "kind": self.kind,
            "version": self.version,
            "parent": asdict(self.parent) if self.parent else None,
            "first_step": self.first_step,
            "last_step": self.last_step,
            "steps": self.steps,
            "slices": list(self.slices),
            "keep_steps": list(self.keep_steps),
            "same_as": {"paradigm": self.same_as[0], "run": self.same_as[1]} if self.same_as else None,
            "mix": self.mix.to_dict() if self.mix else None,
            "path": self.path.to_dict(),
        }


def run_path(
    schedule: Schedule,
    kind: str,
    first: int,
    last: int,
    cpt_variant: str,
    cycle: float | None = None,
    peak: float | None = None,
) -> LRPath:
    """Return the learning rate of a run of this kind from step `first` to `last`, positions in steps.

    `peak` is the rate at which a decay begins, if it is not max_lr; for a variant with falling maxima, that of
    the schedule over all steps.
    """
    shape, warms_up = path_form(kind, cpt_variant)
    if kind == CONTINUAL.name and first and CPT_VARIANTS[cpt_variant].falls:
        peak = LRPath(schedule, "whole", 0, last, warmup=schedule.warmup, peak=peak).lr_at(first)
    warmup = schedule.warmup if warms_up else 0
    return LRPath(schedule, shape, first, last, warmup=warmup, cycle=cycle, peak=peak)


@dataclass(frozen=True)
class Timeline:
    """The steps at which versions end and branches leave, and the resulting runs.

    E_i = T_1 + … + T_i; a branch lasts round(α_i·T_i) steps and leaves the main path at B_i = E_i minus that; with an
    α_i above 1 it begins on the batches of the versions before.
    With an adopted checkpoint of step `origin`, E_0 is that step; only `ours` has runs then. `batch_size` is the
    samples of the first steps. `also_branch_at`: steps at which branches of other plans leave the same main path.
    `falling`: how the main path's rate falls (None: it does not).
    """

    schedule: Schedule
    alpha: float
    cpt_variant: str
    versions: Sequence[Version]
    also_branch_at: Sequence[int] = ()
    falling: Falling | None = None
    origin: int = 0
    batch_size: int = 1

    @cached_property
    def ends(self) -> list[int]:
        """E_1 … E_N."""
        return list(itertools.accumulate((version.steps for version in self.versions), initial=self.origin))[
            1:
        ]

    @cached_property
    def sizes(self) -> list[int]:
        """The samples of a step of each version's data."""
        sizes = [self.batch_size]
        for version in self.versions:
            sizes.append(version.global_batch_size or sizes[-1])
        return sizes[1:]

    @cached_property
    def scratch_ends(self) -> list[int]:
        """The lengths of PTFS's runs: the whole steps of the new data of all versions so far, Σ(1 - r_i)·T_i.

        In a run from scratch, too, the steps of a version's data have the version's batch size. New samples that do
        not fill a step are left for the next version's steps.
        """
        ends, step, left = [], self.origin, 0
        for version, size in zip(self.versions, self.sizes, strict=True):
            steps, left = divmod(left + version.new_samples(version.steps * size), size)
            step += steps
            ends.append(step)
        return ends

    @cached_property
    def begins(self) -> list[int]:
        """The steps at which the versions' data begin, E_0 … E_(N−1)."""
        return [self.origin, *self.ends[:-1]]

    @cached_property
    def branch_steps(self) -> list[int]:
        """Return round(α_i·T_i) for each version; halves round to the even number, as in Python."""
        return [round((version.alpha or self.alpha) * version.steps) for version in self.versions]

    @cached_property
    def branch_points(self) -> list[int]:
        """B_1 … B_N."""
        return [end - steps for end, steps in zip(self.ends, self.branch_steps, strict=True)]

    @cached_property
    def main_rate(self) -> MainRate | None:
        """Return how the main path's rate changes, positions in steps; None if it stays at max_lr."""
        if self.falling is not None:
            return MainRate(power=self.falling.power, begin=self.falling.begin)
        moves = tuple(
            Move(end - version.steps, self.rate_steps(version), version.max_lr)
            for version, end in zip(self.versions, self.ends, strict=True)
            if version.max_lr is not None
        )
        return MainRate(moves) if moves else None

    def rate_steps(self, version: Version) -> int:
        """Return the steps in which the main path moves to the version's rate: as given, or those of a
        warm-up.
        """
        return self.schedule.warmup if version.rate_steps is None else version.rate_steps

    def rate_of(self, index: int) -> float:
        """Return the rate of version `index` (from 0): its own, or that of the last version before it, else
        max_lr.
        """
        own = [version.max_lr for version in self.versions[: index + 1] if version.max_lr is not None]
        return own[-1] if own else self.schedule.max_lr

    def runs(self, paradigm: str) -> list[Run]:
        """Return the runs of a paradigm, parents before children; with an adopted main path only those of ours."""
        return [] if self.origin and paradigm != OURS.name else _MAKERS[paradigm](self)

    def ours(self) -> list[Run]:
        """Return the main path and a branch for each version."""
        points, count = {*self.branch_points, *self.also_branch_at}, len(self.versions)
        last = max(points)
        slices = self._names(sum(begin < last for begin in self.begins))
        keep = tuple(sorted(points | {end for end in self.ends if end <= last} | ({self.origin} - {0})))
        main = self._run(MAIN, count, (self.origin, last), slices=slices, keep_steps=keep)
        spans = enumerate(zip(self.branch_points, self.ends, strict=True), start=1)
        return [main, *(self._run(BRANCH, i, span, parent=Parent(main.name, span[0])) for i, span in spans)]

    def from_scratch(self) -> list[Run]:
        """Return a run for each version that reads all data so far."""
        return [  # CPT continues from the first one
            self._run(SCRATCH, i, (0, end), slices=self._names(i), keep_steps=(end,) if i == 1 else ())
            for i, end in enumerate(self.scratch_ends, start=1)
        ]

    def continual(self) -> list[Run]:
        """Return a run for each version, from the end of the one before it; the first equals the first one
        from scratch.
        """
        runs: list[Run] = []
        for index, (version, end) in enumerate(zip(self.versions, self.ends, strict=True), start=1):
            begin = end - version.steps
            parent = Parent(runs[-1].name, begin) if runs else None
            run = self._run(CONTINUAL, index, (begin, end), parent=parent, keep_steps=(end,))
            if not runs:
                twin = self.from_scratch()[0]
                run = replace(run, path=twin.path, same_as=(twin.paradigm, twin.name))
            runs.append(run)
        return runs

    def _run(self, kind: Kind, index: int, span: tuple[int, int], **others: Any) -> Run:
        """Return the run of this kind for version `index` (from 1) from one step to another; its slice is the
        version's.
        """
        version, (first, last) = self.versions[index - 1], span
        cycle, rates = version.cycle_steps.get(kind.name), self._rates(kind, index, first)
        if path_form(kind.name, self.cpt_variant)[0] == "floor":
            cycle, rates = None, {}
        path = run_path(self.schedule, kind.name, first, last, self.cpt_variant, cycle, rates.get("peak"))
        path = replace(path, main=rates.get("main"))
        if kind == MAIN and self.origin:
            path = replace(path, warmup=0)  # it continues at its rate
        begin = index - 1  # the first version whose steps it trains, counted from 0
        fields: dict[str, Any] = {"parent": None}
        if kind == BRANCH:
            begin = sum(1 for _ in itertools.takewhile(lambda end: end <= first, self.ends))
            fields |= {"mix": version.mix}
        fields |= {"slices": self._read(begin, index)}
        return Run(
            name=kind.run_name(version.name),
            kind=kind.name,
            paradigm=PARADIGM_OF[kind.name],
            version=version.name,
            version_index=index,
            first_step=first,
            last_step=last,
            path=path,
            **(fields | others),
        )

    def _rates(self, kind: Kind, index: int, first: int) -> dict[str, Any]:
        """Return the settings of a run's rate that the schedule lacks: changes, or the start of its decay.

        A branch decays from the main path's rate at its branch point. Runs from scratch and continual runs
        have the rate of their version; a falling rate of the main path does not affect them.
        """
        main = self.main_rate
        if main is None:
            return {}
        if kind == MAIN:
            return {"main": main}
        rate = self.rate_of(index - 1)
        if kind == BRANCH:
            rate = main.at(first, self.schedule.max_lr, self.schedule.min_lr)
        return {} if rate == self.schedule.max_lr else {"peak": rate}

    def _read(self, begin: int, end: int) -> tuple[str, ...]:
        """Return the versions whose data are read in the steps of the versions `begin` to `end` − 1."""
        names = self._names(end)
        read = {*names[begin:]}
        for index, version in enumerate(self.versions[begin:end], start=begin):
            if version.replay:
                read |= {*version.replay.sources([*names[:index]])}
        return tuple(name for name in names if name in read)

    def _names(self, count: int) -> tuple[str, ...]:
        return tuple(version.name for version in self.versions[:count])


_RUNS: dict[str, Callable[[Timeline], list[Run]]] = {
    OURS.name: Timeline.ours,
    PTFS.name: Timeline.from_scratch,
    CPT.name: Timeline.continual,
}
_MAKERS = {name: _RUNS[name] for name in PARADIGMS}  # raises here for a paradigm without a maker of its runs

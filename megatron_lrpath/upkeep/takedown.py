"""Make slices without given documents, and find which runs must be trained again from which step for them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lrpath.data.document_hashes import ENDING as HASHES
from megatron_lrpath.data.indexed import document_lengths
from megatron_lrpath.data.positions import Wanted, holds
from megatron_lrpath.data.record import ENDING as RECORD
from megatron_lrpath.data.slice import ENDING, Slice, SliceSource, available_samples
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import appearing_folder
from megatron_lrpath.launch.estimate import Pace, pace
from megatron_lrpath.paradigms import MAIN, OURS, PARADIGMS
from megatron_lrpath.plan import Plan
from megatron_lrpath.runs.checkpoints import complete_steps
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.runs.lineage import newest_step
from megatron_lrpath.runs.tasks import Task, build_tasks


@dataclass(frozen=True)
class Reduced:
    """A slice without the documents; `steps`: those that it suffices for, None if its version keeps them."""

    slice: Slice
    removed: int
    steps: int | None


def reduced(plan: Plan, existing: Sequence[Slice], wanted: Wanted) -> list[Reduced]:
    """Return the slices with some of the documents, without these.

    Raises:
        UserError: a slice would be empty.
    """
    found = []
    steps = {version.name: version.steps for version in plan.versions}
    for one in existing:
        here = holds(one, wanted)
        if not here:
            continue
        sources = tuple(_without(source, here.get(source.fingerprint)) for source in one.sources)
        left = replace(one, sources=tuple(source for source in sources if len(source.documents)))
        if not left.sources:
            raise UserError(
                f"{one.path}: nothing would be left of it. Take {one.name} out of the plan instead (`lrpath rewind "
                f"{plan.path} --to-step S --drop {one.name}` for a version that was trained)"
            )
        fits = steps_for(plan, one.name, available_samples(left, plan.batch.seq_length))
        less = fits if fits < steps.get(one.name, 0) else None
        found.append(Reduced(left, sum(len(documents) for documents in here.values()), less))
    return found


def steps_for(plan: Plan, name: str, samples: int) -> int:
    """Return the steps of the version called `name` for which its slice suffices with these samples; 0 for others."""
    for version, size in zip(plan.versions, plan.timeline.sizes, strict=True):
        if version.name == name:
            return version.replay.steps(samples, size) if version.replay else samples // size
    return 0


def _without(source: SliceSource, documents: np.ndarray | None) -> SliceSource:
    """Return a slice's source without some of its documents."""
    if documents is None:
        return source
    left = np.setdiff1d(source.documents, documents).astype(np.int32)
    gone = int(document_lengths(source.prefix)[documents].sum(dtype=np.int64))
    return SliceSource(
        source.prefix, source.fingerprint, source.domain, left, source.tokens - gone, source.tokenizer
    )


def write_slices(output: Path, existing: Sequence[Slice], changed: Sequence[Reduced]) -> None:
    """Write all slices, the changed ones without the documents, into a folder that appears when complete.

    Records and hashes of datasets next to the slices are copied, too.

    Raises:
        UserError: the folder exists.
    """
    if output.exists():
        raise UserError(f"{output}: exists already; name another folder with --output, or remove it")
    by_name = {one.slice.name: one.slice for one in changed}
    with appearing_folder(output) as folder:
        for one in existing:
            content = by_name.get(one.name, one).to_bytes(output)
            (folder / f"{one.name}{ENDING}").write_bytes(content)
            assert one.path is not None
        places = dict.fromkeys(one.path.parent for one in existing if one.path is not None)
        for path in (path for place in places for end in (RECORD, HASHES) for path in place.glob(f"*{end}")):
            _link(path, folder / path.name)
        for path in folder.iterdir():
            _sync(path)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


@dataclass(frozen=True)
class Again:
    """A run that must be trained again from `from_step` (its first step: from the start) to `to_step`.

    `folder` is the present run's folder; `tokens` are those of the steps.
    """

    key: str
    from_step: int
    to_step: int
    folder: Path
    tokens: int

    @property
    def steps(self) -> int:
        """The number of these steps."""
        return self.to_step - self.from_step

    @classmethod
    def of(cls, plan: Plan, task: Task, from_step: int, to_step: int) -> Again:
        """Return the entry for a task from one step to another."""
        samples = plan.sizes_of(task.run).between(from_step, to_step)
        return cls(task.key, from_step, to_step, task.folder, samples * plan.batch_of(task.run).seq_length)


@dataclass(frozen=True)
class Retraining:
    """The runs to train again: `runs` (parents first), the step to rewind the main path to, and the pace.

    `rewind_to` is None if the main path has not read a changed version, 0 if no checkpoint precedes it.
    """

    runs: tuple[Again, ...]
    rewind_to: int | None
    pace: Pace | None

    @property
    def steps(self) -> int:
        """Number of steps of all runs."""
        return sum(one.steps for one in self.runs)

    @property
    def tokens(self) -> int:
        """The tokens of all steps."""
        return sum(one.tokens for one in self.runs)

    @property
    def hours(self) -> float | None:
        """Processes times hours; None if no pace is known."""
        pace = self.pace
        return None if pace is None else self.tokens / pace.tokens * pace.seconds * pace.processes / 3600

    def as_json(self) -> dict[str, Any]:
        """Return JSON-serializable data."""
        rows = [
            {"run": one.key, "from_step": one.from_step, "to_step": one.to_step, "steps": one.steps}
            for one in self.runs
        ]
        return {"runs": rows, "steps": self.steps, "hours": self.hours, "rewind_to": self.rewind_to}


def retraining(plan: Plan, changed: Collection[str]) -> Retraining:
    """Return the begun runs that have read a version (or a slice of a mix) whose documents change.

    The order of all samples of such a version changes, so that a run must return to a checkpoint before it.
    """
    begins = {version.name: begin for version, begin in zip(plan.versions, plan.timeline.begins, strict=True)}
    first = min((begin for name, begin in begins.items() if name in changed), default=None)
    again: dict[str, Again] = {}
    rewind_to = None
    for task in build_tasks(plan, PARADIGMS):
        reached = newest_step(task.folder)
        if reached <= task.run.first_step:
            continue
        if task.run.kind == MAIN.name:
            if first is not None and reached > first:
                steps = complete_steps(RunFolder(task.folder).checkpoints)
                rewind_to = max((step for step in steps if step <= first), default=0)
                again[task.key] = Again.of(plan, task, rewind_to, reached)
        elif _reads(plan, task, changed, first) or _starts_after(task, again, rewind_to):
            again[task.key] = Again.of(plan, task, task.run.first_step, reached)
    return Retraining(tuple(again.values()), rewind_to, pace(plan))


def _reads(plan: Plan, task: Task, changed: Collection[str], first: int | None) -> bool:
    """Return whether a run itself reads a changed slice."""
    run = task.run
    if run.is_sft:
        return False
    if run.mix is not None and any(part.name in changed for part in run.mix.parts):
        return True
    if run.paradigm == OURS.name:
        return any(name in changed for name in run.slices)
    names = [version.name for version in plan.versions[: run.version_index]]
    version = plan.versions[run.version_index - 1]
    replayed = version.replay.sources(names[:-1]) if version.replay else []
    own = names if not run.first_step else [*replayed, version.name]
    return first is not None and any(name in changed for name in own)


def _starts_after(task: Task, again: dict[str, Again], rewind_to: int | None) -> bool:
    """Return whether a run starts from a checkpoint that must be trained again."""
    parent = again.get(task.parent or "")
    if parent is None:
        return False
    return task.parent_step > (rewind_to or 0) if parent.key.endswith(f"/{MAIN.prefix}") else True

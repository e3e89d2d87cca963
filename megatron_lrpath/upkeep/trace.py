"""Trace given documents: the slices that contain them, and the steps and checkpoints that have read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from megatron_lrpath.data.document_hashes import DTYPE, HashFile, hash_documents
from megatron_lrpath.data.draw_random import permutation
from megatron_lrpath.data.indexed import read_header, strip_ending
from megatron_lrpath.data.positions import Numbers, Wanted, holds, sample_numbers
from megatron_lrpath.data.record import recorded_hashes
from megatron_lrpath.data.slice import Slice, SliceSource, held_out, mix_path, slice_path
from megatron_lrpath.data.slice_codec import Documents
from megatron_lrpath.data.versioned_index import places, replay_entries
from megatron_lrpath.errors import UserError
from megatron_lrpath.paradigms import PARADIGMS, SCRATCH
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.plan.mix import Mix
from megatron_lrpath.readiness.output import run_changes
from megatron_lrpath.runs.checkpoints import complete_steps
from megatron_lrpath.runs.lineage import newest_step
from megatron_lrpath.runs.state import read_state
from megatron_lrpath.runs.tasks import Task, build_tasks
from megatron_lrpath.schedule import BatchSizes
from megatron_lrpath.tokenizers.encoders import encoder_of_plan
from megatron_lrpath.wording import listing


@dataclass(frozen=True)
class PlanSlices:
    """The slices of a plan: of its versions in their order, of validation, and of each mix."""

    versions: tuple[Slice, ...]
    validation: tuple[Slice, ...]
    mixes: dict[Mix, tuple[Slice, ...]]

    @classmethod
    def of(cls, plan: Plan) -> PlanSlices:
        """Load the slices. Raise UserError if one is missing or damaged."""
        versions = tuple(Slice.load(slice_path(plan.data.slices, one.name)) for one in plan.versions)
        mixes = {
            one.mix: tuple(Slice.load(mix_path(plan.data, part)) for part in one.mix.parts)
            for one in plan.versions
            if one.mix is not None
        }
        return cls(versions, tuple(held_out(plan.data)), mixes)

    @property
    def all(self) -> tuple[Slice, ...]:
        """All of them, without duplicates."""
        mixed = [one for parts in self.mixes.values() for one in parts]
        by_print = {(one.name, one.fingerprint): one for one in (*self.versions, *self.validation, *mixed)}
        return tuple(by_print.values())

    @cached_property
    def sources(self) -> dict[str, tuple[SliceSource, Path | None]]:
        """Their datasets by fingerprint, each with the folder of a slice that names it."""
        return {
            source.fingerprint: (source, one.path.resolve().parent if one.path else None)
            for one in self.all
            for source in one.sources
        }

    def hashes(self, fingerprint: str) -> HashFile | None:
        """Return the hashes of a dataset's documents; None if there are none."""
        source, folder = self.sources[fingerprint]
        return recorded_hashes(source.prefix, fingerprint, folder)


@dataclass(frozen=True)
class Named:
    """Documents to trace: `wanted` by dataset, `named` as given, datasets without hashes `unhashed`.

    `wanted` includes their copies, documents with the same text.
    """

    wanted: dict[str, Documents]
    named: tuple[tuple[str, int], ...]
    unhashed: tuple[Path, ...]

    @property
    def count(self) -> int:
        """Number of documents, copies included."""
        return sum(len(documents) for documents in self.wanted.values())


def find(plan: Plan, slices: PlanSlices, references: Sequence[str], texts: Sequence[Path]) -> Named:
    """Return the documents `SOURCE:N`, those with the texts of the files `texts`, and all with an equal hash.

    Raises:
        UserError: a reference names no dataset of the plan or no document of it, or texts cannot be hashed.
    """
    named = [parse(slices, text) for text in references]
    hashes: set[int] = set()
    unhashed: dict[Path, None] = {}
    found = {fingerprint: slices.hashes(fingerprint) for fingerprint in slices.sources}
    for fingerprint, one in found.items():
        if one is None:
            unhashed[slices.sources[fingerprint][0].prefix] = None
        else:
            one.verify()
    if texts and all(one is None for one in found.values()):
        raise UserError(
            f"--text-file: no dataset of {plan.path} has hashes of its documents; write them first: "
            "tools/check_dataset.py PREFIX --tokenizer-model MODEL --record"
        )
    for fingerprint, number in named:
        if (one := found[fingerprint]) is not None:
            hashes.add(int(np.fromfile(one.path, dtype=DTYPE, count=1, offset=8 * number)[0]))
    for path in texts:
        hashes |= hashes_of_text(plan, path, {one.eod for one in found.values() if one is not None})
    wanted: dict[str, list[Documents]] = {}
    for fingerprint, number in named:
        wanted.setdefault(fingerprint, []).append(np.array([number], dtype=np.int32))
    looked_for = np.array(sorted(hashes), dtype=np.uint64)
    for fingerprint, one in found.items():
        for start, block in one.blocks() if one is not None and len(looked_for) else ():
            same = start + np.flatnonzero(np.isin(block, looked_for)).astype(np.int32)
            if len(same):
                wanted.setdefault(fingerprint, []).append(same)
    merged = {name: np.unique(np.concatenate(parts)) for name, parts in wanted.items()}
    pairs = tuple((str(slices.sources[name][0].prefix), number) for name, number in named)
    return Named(merged, pairs, tuple(unhashed))


def parse(slices: PlanSlices, text: str) -> tuple[str, int]:
    """Return the fingerprint of the dataset and the number of the document in `SOURCE:N`.

    SOURCE is the dataset's path or its file name. Raise UserError if there is no such document.
    """
    name, _, number = text.rpartition(":")
    if not name or not number.isdecimal():
        raise UserError(f"{text!r}: name a document as SOURCE:N, as in data/web_text_document:1234 (from 0)")
    prefix = strip_ending(name)
    path = Path(prefix).resolve()
    sources = {fingerprint: source for fingerprint, (source, _) in slices.sources.items()}
    matches = [key for key, source in sources.items() if source.prefix.resolve() == path]
    matches = matches or [key for key, source in sources.items() if source.prefix.name == prefix]
    if len(matches) != 1:
        known = listing(sorted({str(source.prefix) for source in sources.values()}))
        what = "more than one dataset has this name" if matches else "no dataset of the plan's slices"
        raise UserError(f"{text}: {what}; name one of {known}")
    source = sources[matches[0]]
    size = documents_in(source, slices.hashes(matches[0]))
    if int(number) >= size:
        raise UserError(f"{text}: {source.prefix} has {size:,} documents, numbered from 0")
    return matches[0], int(number)


def documents_in(source: SliceSource, hashes: HashFile | None) -> int:
    """Return the number of documents of a dataset, by its hashes if it has any."""
    return read_header(str(source.prefix)).sequences if hashes is None else hashes.documents


def hashes_of_text(plan: Plan, path: Path, eods: set[int | None]) -> set[int]:
    """Return the hashes of a document with the text of a file, with and without the line end at its end."""
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text-file {path}: cannot be read as UTF-8 text ({error})") from None
    encoder = encoder_of_plan(plan)
    found = set()
    for form in dict.fromkeys((text, text.removesuffix("\n"))):
        if form:
            ids = np.asarray(encoder.encode(form), dtype=np.int64)
            for eod in eods:
                found.add(int(hash_documents(ids, np.array([len(ids)]), eod)[0]))
    if not found:
        raise UserError(f"--text-file {path}: has no text")
    return found


@dataclass(frozen=True)
class Seen:
    """The documents that a run has read.

    `steps`: its own steps that read them, including planned ones (ascending); `reached`: the step that the
    run has reached; `parent`: the run that it starts from, if that has read them by then; `checkpoints`: its
    complete checkpoints that have read them.
    """

    key: str
    run: Run
    steps: tuple[int, ...]
    reached: int
    parent: str | None
    checkpoints: tuple[int, ...]

    @property
    def trained(self) -> tuple[int, ...]:
        """The trained steps among its own."""
        return tuple(step for step in self.steps if step <= self.reached)

    @property
    def has_seen(self) -> bool:
        """Return whether the current weights of the run have read them."""
        return bool(self.trained) or (self.parent is not None and self.reached >= self.run.first_step)


def trace(plan: Plan, slices: PlanSlices, wanted: Wanted) -> list[Seen]:
    """Return what each run has read of the documents, parents before children; runs without any are omitted.

    Fine-tunings read other data; they are listed if their base model has read the documents.

    Raises:
        UserError: a run was trained under other settings or slices than the plan's, which do not show what it has
            read.
    """
    require_as_trained(plan, slices)
    numbers = [sample_numbers(one, wanted, plan.batch.seq_length, plan.seed) for one in slices.versions]
    positions = chained_positions(plan, numbers)
    found: dict[str, Seen] = {}
    for task in build_tasks(plan, PARADIGMS):
        run = task.run
        steps = () if run.is_sft else steps_of(plan, slices, run, positions, numbers, wanted)
        parent = found.get(task.parent or "")
        inherits = parent is not None and has_by(parent, task.parent_step)
        if steps or inherits:
            found[task.key] = seen(task, steps, task.parent if inherits else None)
    return list(found.values())


def require_as_trained(plan: Plan, slices: PlanSlices) -> None:
    """Raise UserError if a run with a checkpoint was trained under other settings or slices than the plan's."""
    by_name = {one.name: one for one in slices.versions}
    for task in build_tasks(plan, PARADIGMS):
        if found := run_changes(plan, task.run, by_name):
            raise UserError(
                f"{task.folder}: was trained under other settings than the plan's ({listing(found[:2])}), which decide "
                "what it has read; trace with the plan and the slices that it was trained with"
            )


def has_by(one: Seen, step: int) -> bool:
    """Return whether a run's weights at a step have read the documents."""
    return one.parent is not None or bool(one.steps and one.steps[0] <= step)


def seen(task: Task, steps: tuple[int, ...], parent: str | None) -> Seen:
    """Return the run's entry, with its progress."""
    kept = complete_steps(task.checkpoints)
    state = read_state(task.folder, task.run)
    begun = bool(kept) or state.step > task.run.first_step
    reached = max(newest_step(task.folder), state.step) if begun else -1
    first = 0 if parent else min(steps)
    return Seen(task.key, task.run, steps, reached, parent, tuple(step for step in kept if step >= first))


def chained_positions(plan: Plan, numbers: Sequence[Numbers]) -> Numbers:
    """Return the positions (consumed samples) of the main path's order at which the documents are read.

    `numbers` are the samples of each version's slice that have a token of them. A replay reads samples again.
    """
    found = [np.empty(0, dtype=np.int64)]
    spans = zip(plan.timeline.begins, plan.timeline.ends, replay_entries(plan, len(numbers)), strict=True)
    for index, (begin, end, replay) in enumerate(spans):
        count = plan.batch_sizes.between(begin, end)
        here = numbers[index][numbers[index] < count]
        if replay is not None:
            arrays = replay.build()
            order = (index, *range(index))  # of a sample: 0 is the version's own, j the j-th version's
            sets = enumerate(numbers[version] for version in order)
            marks = [(arrays["source"] == which) & np.isin(arrays["sample"], one) for which, one in sets]
            here = np.flatnonzero(np.logical_or.reduce(marks))
        found.append(plan.batch_sizes.samples_at(begin) + here)
    return np.concatenate(found)


def steps_of(
    plan: Plan, slices: PlanSlices, run: Run, positions: Numbers, numbers: Sequence[Numbers], wanted: Wanted
) -> tuple[int, ...]:
    """Return the steps of a run that read the documents, ascending."""
    sizes = plan.sizes_of(run)
    if run.kind == SCRATCH.name:
        counts = plan.scratch_samples(run)
        mark = np.zeros(sum(counts), dtype=bool)
        for one, count, begin in zip(numbers, counts, accumulate(counts, initial=0), strict=False):
            mark[begin + one[one < count]] = True
        positions = np.flatnonzero(mark[permutation(len(mark), "mixture", plan.seed, run.version_index)])
    first, last = sizes.samples_at(run.first_step), sizes.samples_at(run.last_step)
    own = positions[(positions >= first) & (positions < last)]
    if run.mix is not None:
        own = mixed(plan, slices.mixes[run.mix], run, run.mix, own, wanted)
    return tuple(np.unique(step_numbers(sizes, own)).tolist())


def step_numbers(sizes: BatchSizes, positions: Numbers) -> Numbers:
    """Return the step (from 1) of each position (consumed samples before it)."""
    bounds = np.array([bound for bound, _ in sizes.thresholds()])
    steps, samples = np.array(sizes.changes).T
    piece = np.searchsorted(bounds, positions, side="right") - 1
    return steps[piece] + (positions - bounds[piece]) // samples[piece] + 1


def mixed(
    plan: Plan, parts: Sequence[Slice], run: Run, mix: Mix, positions: Numbers, wanted: Wanted
) -> Numbers:
    """Return the positions in a branch with a mix that read them: the main path's samples and the mix's."""
    batch = plan.batch_of(run).global_batch_size
    first, taken = plan.batch_sizes.samples_at(run.first_step), places(mix, batch, run.steps, run.version)
    found = [positions[taken["source"][positions - first] == 0]]
    for number, one in enumerate(parts, start=1):
        numbers = sample_numbers(one, wanted, plan.batch.seq_length, mix.seed)
        here = (taken["source"] == number) & np.isin(taken["sample"], numbers)
        found.append(first + np.flatnonzero(here))
    return np.sort(np.concatenate(found))


def holders(slices: PlanSlices, wanted: Wanted) -> dict[str, int]:
    """Return the number of the documents in each slice, by its name; slices without any are omitted."""
    counts = {
        one.name: sum(len(documents) for documents in holds(one, wanted).values()) for one in slices.all
    }
    return {name: count for name, count in counts.items() if count}

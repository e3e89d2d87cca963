"""The plan: the content of its file and everything derived from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.models import ModelSpec
from megatron_lrpath.paradigms import BRANCH, MAIN, OURS, PARADIGMS, PTFS, SCRATCH, SFT
from megatron_lrpath.plan.runs import Run, Timeline
from megatron_lrpath.plan.sft import DROPPED, FOLDER, PREPARED, Sft
from megatron_lrpath.plan.spec import Adopted, Batch, Data, Falling, Tokenizer, Version
from megatron_lrpath.reading import why
from megatron_lrpath.schedule import BatchSizes, Schedule
from megatron_lrpath.sealed import read_sealed
from megatron_lrpath.wording import nearest


@dataclass(frozen=True)
class Cost:
    """The total cost of a paradigm: steps, tokens, and tokens relative to PTFS."""

    paradigm: str
    steps: int
    tokens: int
    relative: float


@dataclass(frozen=True)
class Plan:
    """A checked plan. Paths are as in the file, relative to the working directory.

    `schedule.warmup` is in steps; `cycle_steps` of the versions has the schedule's own default merged in;
    `megatron` holds further Megatron arguments, their names with underscores. `paradigms` are those that the file
    names (None: no such key, see `runs.tasks.named_paradigms`); commands accept the others, too. `license` is the
    models', for their cards; `prompts` are texts that evaluated models continue. `falling` is how the main path's rate
    falls (None: it does not). `adopted` is the checkpoint that the main path begins with (None: random weights, or
    those of `pretrained_checkpoint`). `archive` is the address of the object store for old checkpoints.
    """

    path: Path
    name: str
    seed: int
    model: ModelSpec
    schedule: Schedule
    alpha: float
    cpt_variant: str
    batch: Batch
    tokenizer: Tokenizer
    data: Data
    versions: tuple[Version, ...]
    output: str
    megatron: dict[str, Any]
    also_branch_at: tuple[int, ...] = ()
    sft: Sft | None = None
    paradigms: tuple[str, ...] | None = None
    license: str | None = None
    prompts: tuple[str, ...] = ()
    falling: Falling | None = None
    adopted: Adopted | None = None
    archive: str | None = None

    @cached_property
    def timeline(self) -> Timeline:
        """Version ends, branch points and the resulting runs."""
        return Timeline(
            self.schedule,
            self.alpha,
            self.cpt_variant,
            self.versions,
            self.also_branch_at,
            self.falling,
            self.adopted.step if self.adopted else 0,
            self.batch.global_batch_size,
        )

    def runs(self, paradigm: str) -> list[Run]:
        """Return the runs of a paradigm, parents before children. Raise UserError for an unknown paradigm."""
        if paradigm not in PARADIGMS:
            hint = nearest(paradigm, PARADIGMS)
            raise UserError(f"there is no paradigm {paradigm!r}{hint}; there are {', '.join(PARADIGMS)}")
        return self.timeline.runs(paradigm)

    @property
    def main(self) -> Run:
        """The main path."""
        return self.run(OURS.name, MAIN.prefix)

    @property
    def highest_rate(self) -> float:
        """The highest rate of all versions."""
        return max(self.timeline.rate_of(index) for index in range(len(self.versions)))

    def sft_runs(self, paradigm: str) -> list[Run]:
        """Return the fine-tunings of a paradigm's versions; none without the section `sft`, or while steps
        are unknown.

        Their steps follow from the epochs after the data are prepared.
        """
        sft = self.sft
        if sft is None or paradigm not in sft.paradigms:
            return []
        steps = sft.steps
        if steps is None and sft.epochs and (record := self.prepared_record()):
            steps = -(-sft.epochs * int(record["train"]["samples"]) // sft.batch.global_batch_size)
        return [sft.run(base, steps) for base in sft.tuned(self.runs(paradigm))] if steps else []

    def run(self, paradigm: str, name: str) -> Run:
        """Return one run by its name, including fine-tunings. Raise UserError with the available names."""
        if name.startswith(SFT.prefix) and paradigm in PARADIGMS:
            return self._sft_run(paradigm, name)
        runs = {run.name: run for run in self.runs(paradigm)}
        if name not in runs:
            hint = nearest(name, runs)
            raise UserError(f"{paradigm} has no run {name!r}{hint}; it has {', '.join(runs)}")
        return runs[name]

    def carried_out(self, run: Run) -> Run:
        """Return the run that performs the training of `run`: itself, or the run that it equals."""
        return self.run(*run.same_as) if run.same_as else run

    def parent_of(self, run: Run) -> Run:
        """Return the run that `run`, which has a parent, starts from."""
        assert run.parent is not None
        return self.carried_out(self.run(run.paradigm, run.parent.run))

    def batch_of(self, run: Run) -> Batch:
        """Return the batch of a run's last step: that of its version, or of the fine-tuning."""
        if run.is_sft and self.sft is not None:
            return self.sft.batch
        return replace(self.batch, global_batch_size=self.sizes_of(run).size_of(run.last_step))

    @cached_property
    def batch_sizes(self) -> BatchSizes:
        """The samples of each step of the main path, its branches and CPT."""
        before = self.adopted.samples if self.adopted else 0
        return BatchSizes.of(zip(self.timeline.begins, self.timeline.sizes, strict=True), before)

    @cached_property
    def scratch_sizes(self) -> BatchSizes:
        """The samples of each step of a run from scratch, which reads replayed samples only once."""
        before = self.adopted.samples if self.adopted else 0
        begins = [self.timeline.origin, *self.timeline.scratch_ends[:-1]]
        return BatchSizes.of(zip(begins, self.timeline.sizes, strict=True), before)

    def sizes_of(self, run: Run) -> BatchSizes:
        """Return the samples of each step of a run: a fine-tuning has its own."""
        if run.is_sft and self.sft is not None:
            return BatchSizes.constant(self.sft.batch.global_batch_size)
        return self.scratch_sizes if run.kind == SCRATCH.name else self.batch_sizes

    def samples_of(self, index: int) -> int:
        """Return the samples of its own slice that the steps of version `index` (from 0) read."""
        begin, end = self.timeline.begins[index], self.timeline.ends[index]
        return self.versions[index].new_samples(self.batch_sizes.between(begin, end))

    def megatron_of(self, run: Run) -> dict[str, Any]:
        """Return the Megatron arguments of a pre-training run in addition to `megatron`: for a branch those
        of its version.
        """
        return self.versions[run.version_index - 1].branch_megatron if run.kind == BRANCH.name else {}

    def folder(self, run: Run) -> Path:
        """Return OUTPUT/<paradigm>/<run>."""
        return Path(self.output) / run.paradigm / run.name

    @property
    def sft_folder(self) -> Path:
        """The folder of the prepared data of the fine-tunings."""
        return Path(self.output) / FOLDER

    def prepared_record(self) -> dict[str, Any] | None:
        """Return the record `prepared.json` of the prepared data; None if they are not prepared.

        Raises:
            UserError: the file cannot be read; the message names the plan file.
        """
        path = self.sft_folder / PREPARED
        try:
            record, _ = read_sealed(path)
            int(record["train"]["samples"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise UserError(
                f"{path}: cannot be read ({why(error)}); remove it and prepare the data again: lrpath sft "
                f"{self.path} --prepare"
            ) from None
        return dict(record)

    @property
    def sft_megatron(self) -> dict[str, Any]:
        """Return Megatron arguments of the fine-tunings: the plan's, except those that do not apply, then
        their own.
        """
        assert self.sft is not None
        kept = {name: value for name, value in self.megatron.items() if name not in DROPPED}
        return kept | self.sft.megatron

    def scratch_samples(self, run: Run) -> list[int]:
        """Return the samples of each version that a run from scratch reads: all new ones, up to its last step."""
        left, counts = self.sizes_of(run).between(0, run.last_step), []
        for index in range(run.version_index):
            counts.append(min(left, self.samples_of(index)))
            left -= counts[-1]
        return counts

    def tokens(self, first: int, last: int) -> int:
        """Return the tokens of the steps `first` + 1 to `last` of the main path."""
        return self.batch_sizes.between(first, last) * self.batch.seq_length

    def tokens_of(self, run: Run) -> int:
        """Return the tokens of a run's own steps."""
        return self.sizes_of(run).between(run.first_step, run.last_step) * self.batch_of(run).seq_length

    def cost(self, paradigm: str) -> Cost:
        """Return steps and tokens of all runs of a paradigm, and the ratio of its tokens to PTFS's.

        The paper counts each paradigm alone (section 3.2), so CPT's includes its first version although that
        run is shared with PTFS. The main path counts up to this plan's own last branch point.
        """
        spans = [(run.first_step, run.last_step) for run in self.runs(paradigm)]
        if paradigm == OURS.name:
            spans[0] = (self.main.first_step, max(self.timeline.branch_points))
        sizes = self.scratch_sizes if paradigm == PTFS.name else self.batch_sizes
        tokens = sum(sizes.between(first, last) for first, last in spans)
        begin, ends = self.timeline.origin, self.timeline.scratch_ends
        scratch = sum(self.scratch_sizes.between(begin, end) for end in ends)
        steps = sum(last - first for first, last in spans)
        return Cost(paradigm, steps, tokens * self.batch.seq_length, tokens / scratch)

    def _sft_run(self, paradigm: str, name: str) -> Run:
        """Return the fine-tuning called `name`. Raise UserError if there is none, or its data must be
        prepared first.
        """
        if self.sft is None:
            raise UserError(f"{self.path}: {name}: the plan has no section `sft`; see docs/sft.md")
        runs = {run.name: run for run in self.sft_runs(paradigm)}
        if name in runs:
            return runs[name]
        names = [SFT.run_name(base.version) for base in self.sft.tuned(self.runs(paradigm))]
        if paradigm not in self.sft.paradigms or name not in names:
            have = ", ".join(names) if paradigm in self.sft.paradigms else "none"
            raise UserError(f"{paradigm} has no run {name!r}; its fine-tunings are: {have}")
        raise UserError(
            f"{name}: with `epochs` its steps follow from the data, which are not prepared yet: "
            f"lrpath sft {self.path} --prepare"
        )

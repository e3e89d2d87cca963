"""The plan: what its file says and everything that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.models import ModelSpec
from megatron_lrpath.paradigms import BRANCH, MAIN, OURS, PARADIGMS, SFT
from megatron_lrpath.plan.runs import Run, Timeline
from megatron_lrpath.plan.sft import DROPPED, FOLDER, PREPARED, Sft
from megatron_lrpath.plan.spec import Batch, Data, Falling, Tokenizer, Version
from megatron_lrpath.reading import why
from megatron_lrpath.schedule import Schedule
from megatron_lrpath.sealed import read_sealed
from megatron_lrpath.wording import nearest


@dataclass(frozen=True)
class Cost:
    """What a paradigm costs in all: steps, tokens, and steps relative to PTFS."""

    paradigm: str
    steps: int
    tokens: int
    relative: float


@dataclass(frozen=True)
class Plan:
    """A checked plan. Paths are as in the file, relative to the working directory.

    `schedule.warmup` is in steps; `cycle_steps` of the versions has the schedule's own default merged in;
    `megatron` holds further Megatron arguments, their names with underscores. `paradigms` are those that the file
    names (None: it does not say, see `runs.tasks.named_paradigms`); every one can be asked for all the same. `license`
    is the models', for their cards; `prompts` are what evaluated models go on from, to be looked at. `falling` says how
    the main path's rate falls (None: not). `archive` is the address of the object store for old checkpoints.
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
    archive: str | None = None

    @cached_property
    def timeline(self) -> Timeline:
        """Version ends, branch points and the runs made of them."""
        return Timeline(
            self.schedule, self.alpha, self.cpt_variant, self.versions, self.also_branch_at, self.falling
        )

    def runs(self, paradigm: str) -> list[Run]:
        """The runs of a paradigm, parents before children. UserError for an unknown paradigm."""
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
        """The fine-tunings of a paradigm's versions; none without the section `sft`, or while steps are unknown.

        Their steps follow from the epochs once the data are prepared.
        """
        sft = self.sft
        if sft is None or paradigm not in sft.paradigms:
            return []
        steps = sft.steps
        if steps is None and sft.epochs and (record := self.prepared_record()):
            steps = -(-sft.epochs * int(record["train"]["samples"]) // sft.batch.global_batch_size)
        return [sft.run(base, steps) for base in sft.tuned(self.runs(paradigm))] if steps else []

    def run(self, paradigm: str, name: str) -> Run:
        """One run by its name, a fine-tuning among them. UserError that lists the names there are."""
        if name.startswith(SFT.prefix) and paradigm in PARADIGMS:
            return self._sft_run(paradigm, name)
        runs = {run.name: run for run in self.runs(paradigm)}
        if name not in runs:
            hint = nearest(name, runs)
            raise UserError(f"{paradigm} has no run {name!r}{hint}; it has {', '.join(runs)}")
        return runs[name]

    def carried_out(self, run: Run) -> Run:
        """The run that does the training of `run`: itself, or the one that it is the same as."""
        return self.run(*run.same_as) if run.same_as else run

    def parent_of(self, run: Run) -> Run:
        """The run that `run`, which has a parent, starts from."""
        assert run.parent is not None
        return self.carried_out(self.run(run.paradigm, run.parent.run))

    def batch_of(self, run: Run) -> Batch:
        """The batch of a run: a fine-tuning has its own."""
        return self.sft.batch if run.is_sft and self.sft is not None else self.batch

    def megatron_of(self, run: Run) -> dict[str, Any]:
        """The Megatron arguments that a pre-training run has on top of `megatron`: a branch those of its version."""
        return self.versions[run.version_index - 1].branch_megatron if run.kind == BRANCH.name else {}

    def folder(self, run: Run) -> Path:
        """OUTPUT/<paradigm>/<run>."""
        return Path(self.output) / run.paradigm / run.name

    @property
    def sft_folder(self) -> Path:
        """Where the prepared data of the fine-tunings lie."""
        return Path(self.output) / FOLDER

    def prepared_record(self) -> dict[str, Any] | None:
        """The record `prepared.json` of the prepared data, None while they are not prepared.

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
        """Megatron arguments of the fine-tunings: the plan's, but for what they cannot have, then their own."""
        assert self.sft is not None
        kept = {name: value for name, value in self.megatron.items() if name not in DROPPED}
        return kept | self.sft.megatron

    def tokens(self, steps: int) -> int:
        """The tokens of a number of steps."""
        return steps * self.batch.tokens

    def cost(self, paradigm: str) -> Cost:
        """Steps and tokens of all runs of a paradigm, and the ratio of its steps to PTFS's.

        The paper counts each paradigm alone (section 3.2), so CPT's includes its first version although that
        run is shared with PTFS. The main path counts up to this plan's own last branch point.
        """
        steps = sum(run.steps for run in self.runs(paradigm))
        if paradigm == OURS.name:
            steps -= self.main.last_step - max(self.timeline.branch_points)
        scratch = sum(self.timeline.ends)
        return Cost(paradigm, steps, self.tokens(steps), steps / scratch)

    def _sft_run(self, paradigm: str, name: str) -> Run:
        """The fine-tuning called `name`. UserError where there is none, or its data have to be prepared first."""
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

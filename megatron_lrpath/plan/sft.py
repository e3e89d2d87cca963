"""The fine-tuning of versions: what the section `sft` says, and the runs that follow from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.plan.runs import Run
from megatron_lrpath.plan.spec import Batch, Parent
from megatron_lrpath.schedule import LRPath, Schedule

if TYPE_CHECKING:
    from megatron_lrpath.plan.plan import Plan

FOLDER = "sft"  # in the plan's output: the prepared data
PREPARED = "prepared.json"
PREFIX = "sft-"  # of the runs' names
# Of the plan's Megatron arguments, what packed samples cannot have: their attention is not Transformer Engine's.
DROPPED = ("transformer_impl", "context_parallel_size")


@dataclass(frozen=True)
class Sft:
    """The section `sft`; paths are relative to the working directory, lengths in steps, samples and tokens.

    `valid` is a share of the examples, files, or None. Either `epochs` or `steps` is given. `schedule.warmup`
    is in steps. `template` names a built-in template or a file. `place` is `FILE:LINE: sft`.
    """

    data: tuple[str, ...]
    valid: float | tuple[str, ...] | None
    schedule: Schedule
    epochs: int | None
    steps: int | None
    batch: Batch
    template: str
    special_tokens: tuple[str, ...]
    too_long: str
    max_rejects: int
    versions: tuple[str, ...]
    paradigms: tuple[str, ...]
    seed: int
    megatron: dict[str, Any]
    place: str = field(default="", compare=False)

    def facts(self) -> dict[str, Any]:
        """What a fine-tuning's result depends on beside its parent and its data (JSON-able)."""
        return {
            "epochs": self.epochs,
            "steps": self.steps,
            "global_batch_size": self.batch.global_batch_size,
            "seq_length": self.batch.seq_length,
            "seed": self.seed,
        }


def sft_megatron(plan: Plan) -> dict[str, Any]:
    """The Megatron arguments of the plan's fine-tunings: the plan's, but for what they cannot have, then their own."""
    assert plan.sft is not None
    kept = {name: value for name, value in plan.megatron.items() if name not in DROPPED}
    return kept | plan.sft.megatron


def sft_folder(plan: Plan) -> Path:
    """Where the prepared data of the plan's fine-tuning lie."""
    return Path(plan.output) / FOLDER


def prepared_record(plan: Plan) -> dict[str, Any] | None:
    """What `prepared.json` says, None while the data are not prepared.

    Raises:
        UserError: the file cannot be read.
    """
    path = sft_folder(plan) / PREPARED
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        int(record["train"]["samples"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error!r}); remove it and prepare the data again: lrpath sft "
            f"{plan.path} --prepare"
        ) from None
    return dict(record)


def sft_steps(plan: Plan, sft: Sft) -> int | None:
    """The steps of every fine-tuning: as given, or enough for the epochs; None while the data are not prepared."""
    if sft.steps is not None:
        return sft.steps
    record = prepared_record(plan)
    if record is None or sft.epochs is None:
        return None
    return -(-sft.epochs * int(record["train"]["samples"]) // sft.batch.global_batch_size)


def sft_runs(plan: Plan, paradigm: str) -> list[Run]:
    """The fine-tunings of a paradigm's versions; none without the section, or while their steps are not known."""
    sft = plan.sft
    if sft is None or paradigm not in sft.paradigms or (steps := sft_steps(plan, sft)) is None:
        return []
    return [sft_run(plan, sft, base, steps) for base in fine_tuned(plan, sft, paradigm)]


def fine_tuned(plan: Plan, sft: Sft, paradigm: str) -> Iterator[Run]:
    """The runs whose ends are fine-tuned."""
    return (run for run in plan.runs(paradigm) if run.kind != "main" and run.version in sft.versions)


def sft_run(plan: Plan, sft: Sft, base: Run, steps: int) -> Run:
    """The fine-tuning of the version that `base` ends with: its weights, at step 0, with a rate of its own."""
    warmup = sft.schedule.warmup
    if warmup >= steps:
        raise UserError(
            f"{sft.place}.warmup_steps: a warm-up of {warmup} steps fills all {steps} steps of the fine-tuning; "
            "give a shorter one"
        )
    twin = base.same_as if base.same_as and base.same_as[0] in sft.paradigms else None
    return Run(
        name=PREFIX + base.version,
        kind="sft",
        paradigm=base.paradigm,
        version=base.version,
        version_index=base.version_index,
        parent=Parent(base.name, base.last_step),
        first_step=0,
        last_step=steps,
        path=LRPath(sft.schedule, "whole", 0, steps, warmup=warmup),
        slices=(),
        keep_steps=(steps,),
        same_as=(twin[0], PREFIX + base.version) if twin else None,
    )


def find_sft_run(plan: Plan, paradigm: str, name: str) -> Run:
    """The fine-tuning called `name`.

    Raises:
        UserError: the plan has none of that name, or its data have to be prepared first.
    """
    if plan.sft is None:
        raise UserError(f"{plan.path}: {name}: the plan has no section `sft`; see docs/sft.md")
    runs = {run.name: run for run in sft_runs(plan, paradigm)}
    if name in runs:
        return runs[name]
    names = [PREFIX + base.version for base in fine_tuned(plan, plan.sft, paradigm)]
    if paradigm not in plan.sft.paradigms or name not in names:
        have = ", ".join(names) if paradigm in plan.sft.paradigms else "none"
        raise UserError(f"{paradigm} has no run {name!r}; its fine-tunings are: {have}")
    raise UserError(
        f"{name}: with `epochs` its steps follow from the data, which are not prepared yet: "
        f"lrpath sft {plan.path} --prepare"
    )

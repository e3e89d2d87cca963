"""The fine-tuning of versions: the section `sft`, its prepared data and the resulting runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.paradigms import SFT
from megatron_lrpath.plan.runs import Run
from megatron_lrpath.plan.spec import Batch, Parent
from megatron_lrpath.schedule import LRPath, Schedule

FOLDER = "sft"  # the prepared data, in the plan's output
PREPARED = "prepared.json"
# Arguments of the plan that packed samples cannot have: their attention is not Transformer Engine's.
DROPPED = ("transformer_impl", "context_parallel_size")


@dataclass(frozen=True)
class Sft:
    """The section `sft`; paths are relative to the working directory, lengths in steps, samples and tokens.

    `valid` is a share of the examples, files, or None. Either `epochs` or `steps` is given.
    `schedule.warmup` is in steps. `template` names a built-in template or a file. `place` is `FILE:LINE:
    sft`.
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
        """Return what a fine-tuning's result depends on in addition to its parent and its data
        (JSON-serializable).
        """
        return {
            "epochs": self.epochs,
            "steps": self.steps,
            "global_batch_size": self.batch.global_batch_size,
            "seq_length": self.batch.seq_length,
            "seed": self.seed,
        }

    def tuned(self, runs: Iterable[Run]) -> list[Run]:
        """Return the runs of a paradigm whose ends are fine-tuned."""
        return [run for run in runs if run.makes_version and run.version in self.versions]

    def run(self, base: Run, steps: int) -> Run:
        """Return the fine-tuning of the version that `base` ends with: its weights, at step 0, with a
        separate rate.

        Raises:
            UserError: the warm-up takes all steps.
        """
        warmup = self.schedule.warmup
        if warmup >= steps:
            raise UserError(
                f"{self.place}.warmup_steps: a warm-up of {warmup} steps fills all {steps} steps of the "
                "fine-tuning; give a shorter one"
            )
        name = SFT.run_name(base.version)
        return Run(
            name=name,
            kind=SFT.name,
            paradigm=base.paradigm,
            version=base.version,
            version_index=base.version_index,
            parent=Parent(base.name, base.last_step),
            first_step=0,
            last_step=steps,
            path=LRPath(self.schedule, SFT.shape, 0, steps, warmup=warmup),
            slices=(),
            keep_steps=(steps,),
            same_as=(base.same_as[0], name) if base.same_as and base.same_as[0] in self.paradigms else None,
        )

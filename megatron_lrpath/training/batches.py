"""The samples of any step of a run, read again from the data: documents and text, without training."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lrpath import backend
from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import Plan, Run


@dataclass(frozen=True)
class Batches:
    """A run's training set as its steps read it."""

    plan: Plan
    run: Run
    dataset: Any
    tokenizer: Any

    def of_step(self, step: int) -> list[dict[str, Any]]:
        """The samples of a step (1-based), in the order of their positions: `sample`, `version`, `documents`, `text`.

        Raises:
            UserError: the run has no such step.
        """
        if not self.run.first_step < step <= self.run.last_step:
            raise UserError(
                f"--step {step}: {self.run.name} has the steps {self.run.first_step + 1} to {self.run.last_step}"
            )
        size = self.plan.batch.global_batch_size
        return [self.sample(position) for position in range((step - 1) * size, step * size)]

    def sample(self, position: int) -> dict[str, Any]:
        """The sample at a position of the run (consumed samples before it)."""
        places = self.dataset.locate(position)
        return {
            "sample": position,
            "version": self.dataset.version_of(position),
            "documents": [
                {
                    "dataset": str(place.prefix),
                    "document": place.document,
                    "offset": place.offset,
                    "tokens": place.length,
                }
                for place in places
            ],
            "text": self.tokenizer.detokenize(self.dataset[position]["tokens"].tolist()),
        }


def open_batches(path: Path, paradigm: str, name: str) -> Batches:
    """Open the data of a run of the plan `path`.

    Raises:
        UserError: there is no such run, or its data are gone or others.
    """
    backend.activate("cpu")
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    from megatron.training.arguments import parse_args

    from megatron_lrpath.training.datasets import dataset_config, training_set
    from megatron_lrpath.training.options import from_plan
    from megatron_lrpath.training.options.arguments import add_lrpath_arguments, explicit_arguments

    words = ["--plan", str(path), "--paradigm", paradigm, "--run", name]
    said = explicit_arguments(words)
    sys.argv[1:] = from_plan.command_line(words)
    args = parse_args(add_lrpath_arguments)
    from_plan.apply_defaults(args, explicit_arguments(sys.argv[1:]))
    plan, run = from_plan.load_run(said)
    config = dataset_config(args, versioned=True)
    dataset = training_set(from_plan.plan_context(plan, run, said), config)
    return Batches(plan, run, dataset, config.tokenizer)

"""Read the samples of any step of a run again from the data: documents and text, without training.

Imports Megatron: activate the device first.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.training.arguments import parse_args

from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.sft.dataset import build_packed
from megatron_lrpath.sft.encode import build_encoder
from megatron_lrpath.sft.prepared import open_prepared
from megatron_lrpath.training.datasets import dataset_config, training_set
from megatron_lrpath.training.options.arguments import arguments_provider
from megatron_lrpath.training.options.from_plan import PlannedRun, apply_defaults


@dataclass(frozen=True)
class Batches:
    """A run's training set in the order of its steps."""

    plan: Plan
    run: Run
    dataset: Any
    tokenizer: Any

    def of_step(self, step: int) -> list[dict[str, Any]]:
        """Return the samples of a step (1-based), in the order of their positions: `sample`, `version`,
        `documents`, `text`.

        `replayed` is true if the sample is an earlier version's, read again; a fine-tuning has no such key.

        Raises:
            UserError: the run has no such step.
        """
        if not self.run.first_step < step <= self.run.last_step:
            raise UserError(
                f"--step {step}: {self.run.name} has the steps {self.run.first_step + 1} to {self.run.last_step}"
            )
        sizes = self.plan.sizes_of(self.run)
        return [
            self.sample(position) for position in range(sizes.samples_at(step - 1), sizes.samples_at(step))
        ]

    def sample(self, position: int) -> dict[str, Any]:
        """Return the sample at a position of the run (the number of samples consumed before it)."""
        if self.run.is_sft:
            return self.packed(position)
        places = self.dataset.locate(position)
        return {
            "sample": position,
            "version": self.dataset.version_of(position),
            "replayed": self.dataset.is_replayed(position),
            "documents": [
                document(str(place.prefix), place.document, place.offset, place.length) for place in places
            ],
            "text": self.tokenizer.detokenize(self.dataset[position]["tokens"].tolist()),
        }

    def packed(self, position: int) -> dict[str, Any]:
        """Return a packed sample: `documents` are its examples; parts in the loss are marked by ⟦…⟧."""
        numbers, row = self.dataset.examples(position), self.dataset[position]
        parts = [row["segments"] == number for number in range(1, len(numbers) + 1)]
        return {
            "sample": position,
            "version": self.run.version,
            "documents": [
                document(self.dataset.name, int(number), 0, int(part.sum()) + 1)
                for number, part in zip(numbers, parts, strict=True)
            ],
            "text": "\n".join(self.conversation(row, part) for part in parts),
        }

    def conversation(self, row: dict[str, Any], part: Any) -> str:
        """Return one example of a packed sample as text."""
        first, labels = row["tokens"][part][:1].tolist(), row["labels"][part].tolist()
        stretches: list[tuple[bool, list[int]]] = [(False, first)]
        for token, learned in zip(labels, row["loss_mask"][part].bool().tolist(), strict=True):
            if stretches[-1][0] != learned:
                stretches.append((learned, []))
            stretches[-1][1].append(token)
        texts = [
            (learned, self.tokenizer.decode(ids, skip_special_tokens=False)) for learned, ids in stretches
        ]
        return "".join(f"⟦{text}⟧" if learned else text for learned, text in texts)


def document(dataset: str, number: int, offset: int, tokens: int) -> dict[str, Any]:
    """Return a part of a document in a sample."""
    return {"dataset": dataset, "document": number, "offset": offset, "tokens": tokens}


def open_batches(path: Path, paradigm: str, name: str) -> Batches:
    """Open the data of a run of the plan `path`.

    Raises:
        UserError: there is no such run, or its data are missing or have changed.
    """
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    planned = PlannedRun.read({"plan": path, "paradigm": paradigm, "run": name})
    sys.argv[1:] = planned.flags
    args = parse_args(arguments_provider())
    apply_defaults(args, planned.explicit)
    plan, run = planned.plan, planned.run
    if run.is_sft:
        samples = run.last_step * plan.batch_of(run).global_batch_size
        dataset = build_packed(open_prepared(plan, verify=True), samples)
        return Batches(plan, run, dataset, build_encoder(plan).tokenizer)
    config = dataset_config(args, versioned=True)
    return Batches(plan, run, training_set(planned.context(), config), config.tokenizer)

"""A fine-tuning of a plan: the Megatron arguments that follow from its section `sft`, and the run's context."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lrpath.data.index_cache import local_rank
from megatron_lrpath.errors import UserError
from megatron_lrpath.models import megatron_flags, resolve_model
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.plan.sft import sft_megatron
from megatron_lrpath.training.checkpoints.on_disk import CHECKPOINTS
from megatron_lrpath.training.context import ParentCheckpoint, RunContext
from megatron_lrpath.training.options.words import output_words, tokenizer_words


def sft_words(plan: Plan, run: Run) -> dict[str, list[str]]:
    """The Megatron arguments of a fine-tuning, as command-line words by the plan's key.

    The loss is the mean over the answer tokens of the whole batch, however they are spread over micro-batches
    and ranks.

    Raises:
        UserError: the model has learned positions for fewer tokens than a sample has.
    """
    sft = plan.sft
    assert sft is not None
    batch, schedule = sft.batch, sft.schedule
    words = {
        "model": megatron_flags(resolve_model(plan.model)),
        "megatron": megatron_flags(sft_megatron(plan)),
        "sft": [
            *("--seed", str(sft.seed), "--train-iters", str(run.last_step)),
            *("--lr", repr(schedule.max_lr), "--min-lr", repr(schedule.min_lr)),
            *("--global-batch-size", str(batch.global_batch_size)),
            *("--micro-batch-size", str(batch.micro_batch_size)),
            *("--seq-length", str(batch.seq_length), "--calculate-per-token-loss"),
        ],
        "tokenizer": tokenizer_words(plan),
        "output": output_words(plan, run),
    }
    if (positions := max_positions(plan)) is not None:
        words["sft"] += ["--max-position-embeddings", str(positions)]
    return words


def max_positions(plan: Plan) -> int | None:
    """Positions of the model: as many as in pre-training, or as a longer sample needs; None where the plan says.

    Raises:
        UserError: learned positions do not get more.
    """
    assert plan.sft is not None
    model = resolve_model(plan.model)
    given = {**model, **plan.megatron}.get("max_position_embeddings")
    known, wanted = int(given or plan.batch.seq_length), plan.sft.batch.seq_length
    if wanted > known and (
        given or model.get("position_embedding_type", "learned_absolute") == "learned_absolute"
    ):
        raise UserError(
            f"{plan.sft.place}.seq_length: {wanted} positions, and the model has {known}; give at most that many"
        )
    return None if given else max(known, wanted)


def sft_context(
    plan: Plan, run: Run, parent_folder: Path, facts: Mapping[str, Any], verify: bool | None = None
) -> RunContext:
    """The context of a fine-tuning.

    Args:
        plan, run: the plan and the run in it.
        parent_folder: the folder of the run whose last weights are fine-tuned.
        facts: what of its identity is not the plan's: tokenizer, further arguments.
        verify: whether to compare the data with their fingerprints; None: in one process of a node.

    Raises:
        UserError: the data are not prepared, or others.
    """
    from megatron_lrpath.sft.prepared import open_prepared

    assert plan.sft is not None
    assert run.parent is not None
    prepared = open_prepared(plan, verify=local_rank() == 0 if verify is None else verify)
    return RunContext(
        kind=run.kind,
        path=run.path.scaled(plan.sft.batch.global_batch_size),
        keep_steps=frozenset(run.keep_steps),
        parent=ParentCheckpoint(parent_folder / CHECKPOINTS, run.parent.step, weights_only=True),
        identity={**plan.identity(run), **facts, "slices": {}, "sft_data": prepared.identity},
        folder=plan.folder(run),
        plan=plan,
        run=run,
        prepared=prepared,
    )

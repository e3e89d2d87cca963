"""Compute perplexities of a plan's checkpoints in one process group: the mean token loss over the whole
validation set.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
from megatron.training import get_args, training
from megatron.training.checkpointing import load_checkpoint
from torch.utils.data import default_collate

from megatron_lrpath.checkpoints.reader import LISTED, model_problems
from megatron_lrpath.data.slice import open_validations
from megatron_lrpath.data.versioned import build_validation
from megatron_lrpath.errors import UserError
from megatron_lrpath.evaluate.completions import complete, prompts_of
from megatron_lrpath.plan import Plan
from megatron_lrpath.runs.checkpoints import (
    MANIFEST,
    checkpoint_folder,
    present_fingerprint,
    require_checkpoint,
)
from megatron_lrpath.runs.completions import has_completions, write_completions
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.runs.results import FIRST_SET, Target, add_evaluation, fresh_evaluation, missing_sets
from megatron_lrpath.sft.dataset import build_packed_validation
from megatron_lrpath.training import seams, setup
from megatron_lrpath.training.checkpoints import parent, start
from megatron_lrpath.training.checkpoints.ahead import ReadAhead
from megatron_lrpath.training.datasets import dataset_config
from megatron_lrpath.training.forward import ForwardStep
from megatron_lrpath.training.guards.peers import Ranks, own_store
from megatron_lrpath.training.pretrain import set_single_process_environment
from megatron_lrpath.training.session import Session
from megatron_lrpath.wording import clauses

# Number of micro-batches in a call of the pipeline schedule.
CHUNK = 64


@dataclass
class ValidationSets:
    """The plan's validation sets, and for fine-tunings the held-out answers, if there are any.

    `validation` is the first set, by which versions are compared, `fingerprint` its slice's; `more` has
    the sets of later deliveries with their fingerprints, by name. `answers_length` is the answers' length;
    `args` are Megatron's arguments with the current length.
    """

    args: Any
    validation: Any
    fingerprint: str
    more: dict[str, tuple[Any, str]] = field(default_factory=dict)
    answers: Any = None
    answers_length: int = 0

    def evaluate(self, model: list[Any], sets: Collection[str], known: dict[str, Any]) -> dict[str, Any]:
        """Return the results of an evaluation without the step: `known`, and new measurements on `sets`.

        Held-out answers are under `answers`, sets of later deliveries under `sets`.
        """
        found = self._first(model) if FIRST_SET in sets else dict(known)
        measured = {} if FIRST_SET in sets else dict(known.get("sets") or {})
        for name in self.more.keys() & set(sets):
            dataset, fingerprint = self.more[name]
            measured[name] = evaluate_model(model, dataset) | {"validation": fingerprint}
        ordered = {name: measured[name] for name in self.more if name in measured}
        return found | {"sets": ordered} if ordered else found

    def _first(self, model: list[Any]) -> dict[str, Any]:
        found = evaluate_model(model, self.validation) | {"validation": self.fingerprint}
        if self.answers is None:
            return found
        usual, self.args.seq_length = self.args.seq_length, self.answers_length
        answers = evaluate_model(model, self.answers, packed=True)
        self.args.seq_length = usual
        return found | {"answers": {name: answers[name] for name in ("loss", "perplexity", "tokens")}}


def evaluate_targets(
    plan: Plan, targets: list[Target], device: str, extra: list[str], again: bool = False
) -> None:
    """Evaluate each checkpoint on the validation sets without a result; with `again`, on all of them.

    Rank 0 writes the results, with the checkpoint's fingerprint. `device` is already activated.
    """
    session = Session(device)
    set_single_process_environment(is_run=True)
    seams.apply(session)
    argv = ["--plan", str(plan.path), "--paradigm", targets[0].run.paradigm, "--run", targets[0].run.name]
    argv += ["--tensorboard-dir", "", *extra]  # an evaluation does not write to the training's records
    args = setup.arguments(session, argv)
    model, sets = build(session, plan, args)
    for target in targets:
        if not load_weights(plan, target, args, model):
            continue
        wanted, known = [FIRST_SET, *plan.data.more_sets], None
        if target.at is not None:
            wanted = [FIRST_SET]
        elif not again and (known := fresh_evaluation(plan.folder(target.run), target.step)):
            wanted = missing_sets(plan, plan.folder(target.run), target.step)
        scores = sets.evaluate(model, wanted, known or {})
        shown = target.at is None and has_completions(plan, target.run)
        written = complete(model, prompts_of(plan, sets.validation)) if shown else []
        if int(os.environ["RANK"]) == 0:
            checkpoint = present_fingerprint(RunFolder(plan.folder(target.run)).checkpoints, target.step)
            if shown:
                write_completions(plan, target.run, checkpoint, written)
            add_evaluation(plan, target, {**scores, "step": target.step, "checkpoint": checkpoint})
            print(f"evaluated {target.name} {scores['perplexity']:.4f}", flush=True)
    setup.end(session)


def build(session: Session, plan: Plan, args: Any) -> tuple[list[Any], ValidationSets]:
    """Return the model with random weights, and its validation sets."""
    args.skip_train, args.load, args.no_load_rng = True, None, True
    args.overlap_grad_reduce = args.overlap_param_gather = False  # nothing is trained
    training.initialize_megatron(store=own_store())
    model, _, _ = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=setup.configuration(args),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    seq_length, args.seq_length = args.seq_length, plan.batch.seq_length
    config = dataset_config(args, versioned=True)
    built = [(build_validation(one, config), one.fingerprint) for one in open_validations(plan.data)]
    sets = ValidationSets(args, *built[0], dict(zip(plan.data.more_sets, built[1:], strict=True)))
    context = session.context
    if context is not None and context.prepared is not None:
        sets.answers, sets.answers_length = build_packed_validation(context.prepared), seq_length
    return model, sets


def load_weights(plan: Plan, target: Target, args: Any, model: list[Any]) -> bool:
    """Load the checkpoint's weights; return False if it is a main-path checkpoint that the training has since
    removed.

    Raises:
        UserError: the checkpoint is missing, damaged or of another model.
    """
    folder, step = RunFolder(plan.folder(target.run)).checkpoints, target.step
    if target.at is None:
        require_checkpoint(folder, step)
    elif removed(folder, step):
        return False
    if problems := damage(folder, step):
        if target.at is not None and removed(folder, step):
            return False
        raise UserError(
            f"{folder}: the checkpoint of step {step} is damaged: {clauses(problems, LISTED)}. Restore it from "
            "a backup, or train the run again."
        )
    parent.check_model(args, folder, step, weights_only=target.run.is_sft)
    args.load, args.ckpt_step = str(folder), step
    args.no_load_optim, args.no_load_rng, args.exit_on_missing_checkpoint = True, True, True
    load_checkpoint(model, None, None)
    return True


def removed(folder: Path, step: int) -> bool:
    """Return whether a checkpoint has been removed, as seen by rank 0."""
    found = [not checkpoint_folder(folder, step).exists()]
    torch.distributed.broadcast_object_list(found, src=0)
    return found[0]


def damage(folder: Path, step: int) -> list[str]:
    """Return the problems of the parts of a checkpoint that are read; every rank verifies a share, and all
    ranks get all problems.
    """
    ranks = Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), store=None)
    mine = start.damage(folder, step, "sizes", ranks, ReadAhead())
    if not mine and (checkpoint_folder(folder, step) / MANIFEST).exists():
        mine = model_problems(checkpoint_folder(folder, step), ranks.rank, ranks.world)
    found: list[list[str]] = [[]] * ranks.world
    torch.distributed.all_gather_object(found, mine)
    return sorted({problem for part in found for problem in part})


def micro_batches(dataset: Any, samples: Sequence[int], size: int) -> Iterator[dict[str, Any]]:
    """Yield this data-parallel rank's share of `samples` in batches of `size`.

    Every rank gets the same number of batches; padding of the last ones is masked out.
    """
    rank, world = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    stride = size * world
    for first in range(0, len(samples), stride):
        mine = range(first + rank * size, first + (rank + 1) * size)
        yield default_collate([dataset[samples[i] if i < len(samples) else None] for i in mine])


@torch.no_grad()
def mean_loss(
    model: list[Any], dataset: Any, samples: Sequence[int], forward_step: ForwardStep
) -> tuple[float, int]:
    """Return the mean cross-entropy (nats per token) and the number of tokens over `samples`; equal on all
    ranks.

    Args:
        model: Megatron's list of model chunks.
        dataset: the validation set.
        samples: their positions in it.
        forward_step: the forward step for the batches of this set.
    """
    args = get_args()
    size = args.micro_batch_size
    batches = micro_batches(dataset, samples, size)
    left = math.ceil(len(samples) / (size * mpu.get_data_parallel_world_size()))
    total = torch.zeros(2, dtype=torch.float64)
    forward = get_forward_backward_func()
    while left > 0:
        count = min(CHUNK, left)
        left -= count
        reports = forward(
            forward_step_func=forward_step,
            data_iterator=[batches] * len(model) if len(model) > 1 else batches,
            model=model,
            num_microbatches=count,
            seq_length=args.seq_length,
            micro_batch_size=size,
            forward_only=True,
        )
        for report in reports:
            total += report["lm loss"].double().cpu()
    return reduced(total)


def reduced(total: torch.Tensor) -> tuple[float, int]:
    """Reduce each rank's (loss sum, tokens) to (mean, tokens) on all ranks: only the last stage has them."""
    summed = total.cuda()
    if mpu.is_pipeline_last_stage():
        torch.distributed.all_reduce(summed, group=mpu.get_data_parallel_group(with_context_parallel=True))
    torch.distributed.broadcast(
        summed, mpu.get_pipeline_model_parallel_last_rank(), group=mpu.get_pipeline_model_parallel_group()
    )
    loss, tokens = summed.tolist()
    return loss / max(tokens, 1.0), int(tokens)


def evaluate_model(model: list[Any], dataset: Any, packed: bool = False) -> dict[str, Any]:
    """Return loss (nats per token), perplexity and tokens of the whole validation set and of each domain.

    The whole is exp of the mean over all tokens, not the mean of the domains' perplexities. With `packed`
    the set consists of packed samples.
    """
    for chunk in model:
        chunk.eval()
    # The checks of a training step (rerun on NaN) do not apply to an evaluation.
    get_rerun_state_machine().set_mode(RerunMode.DISABLED)
    by_domain: dict[str, list[int]] = {domain: [] for domain in dataset.domains}
    for sample in range(len(dataset)):
        by_domain[dataset.domain_of(sample)].append(sample)
    domains: dict[str, dict[str, Any]] = {}
    for domain, samples in by_domain.items():
        loss, tokens = mean_loss(model, dataset, samples, ForwardStep(packed=packed))
        domains[domain] = {"loss": loss, "perplexity": math.exp(loss), "tokens": tokens}
    tokens = sum(entry["tokens"] for entry in domains.values())
    loss = sum(entry["loss"] * entry["tokens"] for entry in domains.values()) / max(tokens, 1)
    return {"loss": loss, "perplexity": math.exp(loss), "tokens": tokens, "domains": domains}

"""The Megatron arguments that a plan sets for a run; contradicting ones are refused."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lrpath.data.index_cache import local_rank
from megatron_lrpath.data.slice import Slice, open_slices
from megatron_lrpath.data.slice_check import open_mix
from megatron_lrpath.errors import UserError
from megatron_lrpath.models import megatron_flags, resolve_model
from megatron_lrpath.plan import SET_BY_PLAN, Plan, Run, is_neutral, load_plan
from megatron_lrpath.plan.sft import sft_megatron
from megatron_lrpath.runs.checkpoints import SAVE_INTERVAL
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.training.context import ParentCheckpoint, RunContext
from megatron_lrpath.training.options.arguments import explicit_arguments
from megatron_lrpath.training.options.from_arguments import OWN, flag, results_arguments


def tokenizer_words(plan: Plan) -> list[str]:
    """Megatron's arguments of the plan's tokenizer, the same for every run."""
    tokenizer = plan.tokenizer
    words = ["--tokenizer-type", tokenizer.type]
    if tokenizer.model is not None:
        words += ["--tokenizer-model", str(tokenizer.model)]
    if tokenizer.vocab_size is not None:
        words += ["--vocab-size", str(tokenizer.vocab_size)]
    return words


def output_words(plan: Plan, run: Run) -> list[str]:
    """Where Megatron writes: checkpoints and TensorBoard's files in the run's folder."""
    folder = RunFolder(plan.folder(run))
    return ["--save", str(folder.checkpoints), "--tensorboard-dir", str(folder.tensorboard)]


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
        parent=ParentCheckpoint(RunFolder(parent_folder).checkpoints, run.parent.step, weights_only=True),
        identity={**plan.identity(run), **facts, "slices": {}, "sft_data": prepared.identity},
        folder=plan.folder(run),
        plan=plan,
        run=run,
        prepared=prepared,
    )


# What a run under a plan has unless the plan or the command line says otherwise.
PLAN_DEFAULTS: dict[str, Any] = {
    "log_interval": 1,
    "eval_iters": 0,
    "eval_interval": 1_000_000_000,
    "dataloader_type": "single",
    # A branch may run at another layout than its parent: one format of the optimizer's state for all.
    "use_distributed_optimizer": True,
    "dist_ckpt_optim_fully_reshardable": True,
}

# Refused beside what SET_BY_PLAN names: each would change steps, samples, weights or rates unseen.
REFUSED = {
    "no_load_optim": "a branch keeps its parent's optimizer state",
    "no_load_rng": "a branch keeps its parent's random state",
    "no_save_optim": "a branch and a resumed run need the optimizer state",
    "no_save_rng": "a resumed run needs the random state",
    "iterations_to_skip": "a skipped step would shift every later batch of the plan",
    "weight_decay_incr_style": "it depends on the length of a run, which an appended version changes",
    "start_weight_decay": "the weight decay is constant under a plan: give --weight-decay",
    "end_weight_decay": "the weight decay is constant under a plan: give --weight-decay",
    "ckpt_format": "branches, resharding and the checks of a checkpoint need torch_dist",
}


def plan_words(plan: Plan, run: Run) -> dict[str, list[str]]:
    """The Megatron arguments that a plan sets for a run, as command-line words by the plan's key."""
    if run.kind == "sft":
        return sft_words(plan, run)
    batch = plan.batch
    words = {
        "model": megatron_flags(resolve_model(plan.model)),
        "megatron": megatron_flags(plan.megatron),
        "seed": ["--seed", str(plan.seed)],
        "schedule": ["--lr", repr(plan.schedule.max_lr), "--min-lr", repr(plan.schedule.min_lr)],
        "versions": ["--train-iters", str(run.last_step)],
        "batch": [
            *("--global-batch-size", str(batch.global_batch_size)),
            *("--micro-batch-size", str(batch.micro_batch_size)),
            *("--seq-length", str(batch.seq_length)),
        ],
        "tokenizer": tokenizer_words(plan),
        "output": output_words(plan, run),
    }
    if "max_position_embeddings" not in explicit_arguments(words["model"] + words["megatron"]):
        words["batch"] += ["--max-position-embeddings", str(batch.seq_length)]
    return words


def load_run(said: Mapping[str, Any]) -> tuple[Plan, Run]:
    """The plan and the run that the command line names.

    Raises:
        UserError: --plan without --paradigm or --run, or names that the plan does not have.
    """
    plan = load_plan(said["plan"])
    missing = [f"--{name}" for name in ("paradigm", "run") if name not in said]
    if missing:
        raise UserError(
            f"--plan {said['plan']}: {' and '.join(missing)} must be given too; `lrpath plan` lists the runs."
        )
    return plan, plan.carried_out(said["paradigm"], said["run"])


def command_line(words: list[str]) -> list[str]:
    """`words` preceded by what the plan sets; unchanged without --plan.

    The command line may override what leaves the result alone (layout, logging, saving), nothing else.

    Raises:
        UserError: an argument contradicts the plan, or would change what the plan alone decides.
    """
    said = explicit_arguments(words)
    if "plan" not in said:
        return words
    plan, run = load_run(said)
    ahead: list[str] = []
    planned: dict[str, Any] = {}
    for key, part in plan_words(plan, run).items():
        values = explicit_arguments(part)
        if key in ("model", "megatron"):
            refuse(values, plan, where=f"{plan.path}: {key}: ")
        refuse_contradictions(said, values, f"{plan.path}, whose `{key}`")
        planned |= values
        ahead += part
    refuse({name: value for name, value in said.items() if name not in planned}, plan, where="")
    return ahead + words


def refuse_contradictions(said: Mapping[str, Any], planned: Mapping[str, Any], where: str) -> None:
    """Stop at an argument of the command line that the plan sets otherwise."""
    for name, value in planned.items():
        if name in said and said[name] != value and not is_neutral(name):
            raise UserError(
                f"{flag(name)} {said[name]} contradicts {where} makes it {value}. "
                "Change the plan (and its `output`), or leave the argument out."
            )


def refuse(given: Mapping[str, Any], plan: Plan, where: str) -> None:
    """Stop at an argument that a plan leaves no room for."""
    for name in given:
        if name in OWN:
            continue
        if name in SET_BY_PLAN:
            raise UserError(
                f"{where}{flag(name)} follows from the plan: set `{SET_BY_PLAN[name]}` in {plan.path} "
                "instead."
            )
        reason = "the plan says which path a run is" if name.startswith("lr_path") else REFUSED.get(name)
        if reason:
            raise UserError(f"{where}{flag(name)} cannot be given with a plan ({plan.path}): {reason}.")


def apply_defaults(args: Any, said: Mapping[str, Any]) -> None:
    """Set a planned run's defaults, where neither the plan nor the command line says otherwise."""
    for name, value in PLAN_DEFAULTS.items():
        if name not in said:
            setattr(args, name, value)
    if "make_vocab_size_divisible_by" not in said:
        # Megatron pads to a multiple of this times the tensor-parallel size; padding is part of the softmax.
        args.make_vocab_size_divisible_by = max(1, 128 // args.tensor_model_parallel_size)
    if not args.save_interval:
        args.save_interval = SAVE_INTERVAL
        if not args.save_retain_interval:
            args.save_retain_interval = SAVE_INTERVAL * max(1, args.train_iters)  # longer than the run


def plan_context(plan: Plan, run: Run, said: Mapping[str, Any]) -> RunContext:
    """The context of a run of a plan; `said` are the explicit command-line arguments."""
    if run.kind == "sft":
        facts = trainer_facts(plan, run, said)
        return sft_context(plan, run, plan.folder(plan.parent_of(run)), facts)
    parent = None
    if run.parent is not None:
        parent = ParentCheckpoint(RunFolder(plan.folder(plan.parent_of(run))).checkpoints, run.parent.step)
    slices = open_slices(plan.data, versions_read(plan, run), verify=local_rank() == 0)
    mix = open_mix(plan.data, run.mix, verify=local_rank() == 0) if run.mix else []
    return RunContext(
        kind=run.kind,
        path=run.path.scaled(plan.batch.global_batch_size),
        keep_steps=frozenset(run.keep_steps),
        parent=parent,
        identity=full_identity(plan, run, slices, mix, said),
        folder=plan.folder(run),
        plan=plan,
        run=run,
        slices=tuple(slices),
        mix=tuple(mix),
    )


def versions_read(plan: Plan, run: Run) -> tuple[str, ...]:
    """The versions from the first to the run's own: a position counts from the first sample of all."""
    return tuple(version.name for version in plan.versions[: run.version_index])


def full_identity(
    plan: Plan, run: Run, slices: list[Slice], mix: list[Slice], said: Mapping[str, Any]
) -> dict[str, Any]:
    """The plan's identity of the run and what only the trainer knows: data, tokenizer, further arguments."""
    mixed = {"mix_slices": {one.name: one.fingerprint for one in mix}} if mix else {}
    return (
        plan.identity(run)
        | mixed
        | {
            "slices": {one.name: one.fingerprint for one in slices},
            **trainer_facts(plan, run, said),
        }
    )


def trainer_facts(plan: Plan, run: Run, said: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer's file and the explicit arguments beside the plan's."""
    planned = set().union(*(explicit_arguments(part) for part in plan_words(plan, run).values()))
    model = plan.tokenizer.model
    return {
        "tokenizer_model": file_digest(Path(model)) if model else None,
        "arguments": {name: value for name, value in results_arguments(said).items() if name not in planned},
    }


def file_digest(path: Path) -> str | None:
    """SHA-256 of a file, None where it is a folder or a name that a tokenizer library resolves."""
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""Set a run's Megatron arguments from its plan, and refuse contradicting ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron_lrpath.data.identity import training_identity
from megatron_lrpath.data.index_cache import local_rank
from megatron_lrpath.data.record import require_tokenizer, verify_content
from megatron_lrpath.data.slice import check_mixes, held_out, open_mix, open_slices, require_versions
from megatron_lrpath.errors import UserError
from megatron_lrpath.models import megatron_flags, resolve_model
from megatron_lrpath.plan import Plan, Run, load_plan, run_identity
from megatron_lrpath.plan.arguments import PLAN, SET, find, flag, is_neutral
from megatron_lrpath.plan.optimizers import OF_MEGATRON
from megatron_lrpath.plan.spec import SAVE_INTERVAL, Batch
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.sft.prepared import open_prepared
from megatron_lrpath.training.context import ParentCheckpoint, RunContext
from megatron_lrpath.training.options.arguments import (
    ArgumentsProvider,
    explicit_arguments,
    raise_all,
    unclassified,
    word,
)
from megatron_lrpath.training.options.from_arguments import results_arguments


def tokenizer_flags(plan: Plan) -> list[str]:
    """Return Megatron's arguments of the plan's tokenizer, the same for every run."""
    tokenizer = plan.tokenizer
    flags = ["--tokenizer-type", tokenizer.type]
    if tokenizer.model is not None:
        flags += ["--tokenizer-model", str(tokenizer.model)]
    if tokenizer.vocab_size is not None:
        flags += ["--vocab-size", str(tokenizer.vocab_size)]
    return flags


def output_flags(plan: Plan, run: Run) -> list[str]:
    """Return Megatron's output folders: checkpoints and TensorBoard's files in the run's folder."""
    folder = RunFolder(plan.folder(run))
    return ["--save", str(folder.checkpoints), "--tensorboard-dir", str(folder.tensorboard)]


def batch_flags(batch: Batch) -> list[str]:
    """Return the sizes of a batch and of its samples."""
    sizes = {"global-batch-size": batch.global_batch_size, "micro-batch-size": batch.micro_batch_size}
    sizes["seq-length"] = batch.seq_length
    return [word for name, size in sizes.items() for word in (f"--{name}", str(size))]


def sft_flags(plan: Plan, run: Run) -> dict[str, list[str]]:
    """Return the Megatron arguments of a fine-tuning, by the plan's key.

    The loss is the mean over the answer tokens of the whole batch, regardless of their distribution over
    micro-batches and ranks.
    """
    sft = plan.sft
    assert sft is not None
    flags = {
        "model": megatron_flags(resolve_model(plan.model)),
        "megatron": megatron_flags(plan.sft_megatron),
        "sft": [
            *("--seed", str(sft.seed), "--train-iters", str(run.last_step)),
            *("--lr", repr(sft.schedule.max_lr), "--min-lr", repr(sft.schedule.min_lr)),
            *(*batch_flags(sft.batch), "--calculate-per-token-loss"),
        ],
        "tokenizer": tokenizer_flags(plan),
        "output": output_flags(plan, run),
    }
    if (positions := max_positions(plan)) is not None:
        flags["sft"] += ["--max-position-embeddings", str(positions)]
    return flags


def max_positions(plan: Plan) -> int | None:
    """Return the positions of the model: as in pre-training, or as a longer sample needs; None if the plan
    sets them.
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


# The defaults of a run under a plan, which the plan and the command line can override.
PLAN_DEFAULTS: dict[str, Any] = {
    "log_interval": 1,
    "eval_iters": 0,
    "eval_interval": 1_000_000_000,
    "dataloader_type": "single",
    # A branch can run at another layout than its parent: all use one format of the optimizer state.
    "use_distributed_optimizer": True,
    "dist_ckpt_optim_fully_reshardable": True,
}


def plan_flags(plan: Plan, run: Run) -> dict[str, list[str]]:
    """Return the Megatron arguments that a plan sets for a run, by the plan's key."""
    if run.is_sft:
        return sft_flags(plan, run)
    own = plan.megatron_of(run)
    flags = {
        "model": megatron_flags(resolve_model(plan.model)),
        "megatron": megatron_flags({name: value for name, value in plan.megatron.items() if name not in own}),
        "branch_megatron": megatron_flags(own),
        "seed": ["--seed", str(plan.seed)],
        "schedule": ["--lr", repr(plan.schedule.max_lr), "--min-lr", repr(plan.schedule.min_lr)],
        "versions": ["--train-iters", str(run.last_step)],
        "batch": batch_flags(plan.batch),
        "tokenizer": tokenizer_flags(plan),
        "output": output_flags(plan, run),
    }
    if "max_position_embeddings" not in explicit_arguments(flags["model"] + flags["megatron"]):
        flags["batch"] += ["--max-position-embeddings", str(plan.batch.seq_length)]
    return flags


@dataclass(frozen=True)
class PlannedRun:
    """A run of a plan that a command line names, and the resulting Megatron arguments.

    Attributes:
        plan, run: the plan and the run in it.
        given: the explicit arguments of the command line, by destination.
        planned: the arguments that the plan sets, by destination.
        flags: the same in the form that precedes the command line.
    """

    plan: Plan
    run: Run
    given: Mapping[str, Any]
    planned: Mapping[str, Any]
    flags: list[str]

    @classmethod
    def read(
        cls,
        given: Mapping[str, Any],
        own: ArgumentsProvider | None = None,
        others: Sequence[str] = (),
        later: Callable[..., Sequence[str]] | None = None,
    ) -> PlannedRun:
        """Return the run that the explicit arguments `given` name, --plan among them.

        The command line can override arguments that do not change the result (layout, logging, saves),
        nothing else. `own` adds the arguments of a user's script; `others` are problems for the same
        message, like the problems that `later` returns (see `raise_all`); it gets the flags of the plan if the
        run is known.

        Raises:
            UserError: an argument contradicts the plan, or would change what only the plan determines;
                --paradigm or --run is missing; the plan has no such run.
        """
        plan = load_plan(given["plan"])
        missing = [f"--{name}" for name in ("paradigm", "run") if name not in given]
        if missing and any(problem.startswith(f"argument {name}") for problem in others for name in missing):
            raise_all(others, later)
        if missing:
            lacks = f"--plan {given['plan']}: {' and '.join(missing)} must be given too; `lrpath plan` lists the runs."
            raise_all([*others, lacks, *refused_in_any_run(given, plan)], later)
        try:
            run = plan.carried_out(plan.run(given["paradigm"], given["run"]))
        except UserError as error:
            raise_all([*others, str(error), *refused_in_any_run(given, plan)], later)
            raise
        flags = plan_flags(plan, run)
        planned = {name: value for part in flags.values() for name, value in explicit_arguments(part).items()}
        words = [word for part in flags.values() for word in part]
        planned_run = cls(plan, run, given, planned, words)
        raise_all([*others, *planned_run.problems(own)], later and partial(later, words))
        return planned_run

    def problems(self, own: ArgumentsProvider | None = None) -> list[str]:
        """Return the problems of the command line's arguments, a line each."""
        found: list[str] = []
        for key, part in plan_flags(self.plan, self.run).items():
            found += contradictions(self.given, explicit_arguments(part), f"{self.plan.path}, whose `{key}`")
        beside = {name: value for name, value in self.given.items() if name not in self.planned}
        return found + refused(beside, self.plan) + unclassified(self.given, own)

    @property
    def explicit(self) -> dict[str, Any]:
        """Return the arguments that the plan or the command line sets, including defaults that the plan disables."""
        chosen = {} if self.run.is_sft else self.plan.megatron
        off = {name: False for name in PLAN_DEFAULTS if chosen.get(name) is False}
        return {**off, **self.planned, **self.given}

    def context(self, verify: bool | None = None) -> RunContext:
        """Return the run's context.

        Args:
            verify: whether to compare the data with their fingerprints; None: in one process of a node.

        Raises:
            UserError: the data are missing, changed, not prepared, or made with another tokenizer.
        """
        plan, run = self.plan, self.run
        verify = local_rank() == 0 if verify is None else verify
        parent = None
        if run.parent is not None:
            folder = RunFolder(plan.folder(plan.parent_of(run)))
            parent = ParentCheckpoint(folder.checkpoints, run.parent.step, weights_only=run.is_sft)
        context = RunContext(
            kind=run.kind,
            path=run.path,
            sizes=plan.sizes_of(run),
            keep_steps=frozenset(run.keep_steps),
            parent=parent,
            identity=run_identity(plan, run),
            folder=plan.folder(run),
            plan=plan,
            run=run,
        )
        if run.is_sft:
            prepared = open_prepared(plan, verify=verify)
            identity = training_identity(plan, run, [], chats=prepared.identity, arguments=self.beside)
            return replace(context, identity=identity, prepared=prepared)
        if verify:
            require_tokenizer(plan)
        # A position counts from the first sample, so the versions before the run's own are opened, too.
        names = tuple(version.name for version in plan.versions[: run.version_index])
        slices = open_slices(plan.data, names, verify=verify)
        require_versions(plan, slices)
        check_mixes(plan, [run])
        mix = open_mix(plan.data, run.mix, verify=verify) if run.mix else []
        if verify:
            verify_content([*slices, *mix, *held_out(plan.data)])
        identity = training_identity(plan, run, slices, mix, arguments=self.beside)
        return replace(context, identity=identity, slices=tuple(slices), mix=tuple(mix))

    @property
    def beside(self) -> dict[str, Any]:
        """Return the arguments of the command line that a result depends on, in addition to the plan's."""
        found = results_arguments(self.given)
        return {name: value for name, value in found.items() if name not in self.planned}


def with_arguments(plan: Plan, run: Run, extra: Sequence[str]) -> PlannedRun:
    """Return a run of a plan as started with these Megatron arguments; only their form is checked.

    Raises:
        UserError: Megatron has no such argument, or rejects its value.
    """
    flags = [word for part in plan_flags(plan, run).values() for word in part]
    return PlannedRun(plan, run, explicit_arguments(list(extra)), explicit_arguments(flags), flags)


def contradictions(given: Mapping[str, Any], planned: Mapping[str, Any], where: str) -> list[str]:
    """Return the arguments of the command line that contradict the plan."""
    return [
        f"{flag(name)} {given[name]} contradicts {where} makes it {value}. "
        "Change the plan (and its `output`), or leave the argument out."
        for name, value in planned.items()
        if name in given and given[name] != value and not is_neutral(name)
    ]


def refused_in_any_run(given: Mapping[str, Any], plan: Plan) -> list[str]:
    """Return the arguments that the plan does not allow for any run."""
    others = {name: given[name] for name in given if (row := find(name)) is not None and row.plan != SET}
    return refused(others, plan)


def refused(given: Mapping[str, Any], plan: Plan) -> list[str]:
    """Return the arguments of the command line that a plan does not allow."""
    problems = []
    for name, value in given.items():
        argument = find(name)
        if argument is None:
            continue
        if argument.plan == SET:
            said = f"follows from the plan: set `{argument.key}` in {plan.path} instead."
            problems.append(f"{flag(name)} {said}")
        elif argument.refuses(PLAN, value):
            said = f"cannot be given with a plan ({plan.path}): {argument.why(PLAN)}."
            problems.append(f"{word(name, value)} {said}")
    return problems


def apply_defaults(args: Any, given: Mapping[str, Any]) -> None:
    """Set a planned run's defaults, unless the plan or the command line sets them."""
    for name, value in PLAN_DEFAULTS.items():
        if name not in given and (name != "use_distributed_optimizer" or args.optimizer in OF_MEGATRON):
            setattr(args, name, value)
    if "make_vocab_size_divisible_by" not in given:
        # Megatron pads to a multiple of this times the tensor-parallel size; padding is part of the softmax.
        args.make_vocab_size_divisible_by = max(1, 128 // args.tensor_model_parallel_size)
    if not args.save_interval:
        args.save_interval = SAVE_INTERVAL
        if not args.save_retain_interval:
            args.save_retain_interval = SAVE_INTERVAL * max(1, args.train_iters)  # longer than the run

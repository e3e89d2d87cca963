"""Set up Megatron's loop from the command line: arguments, context, lineage, and the parts of the session."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args, parse_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.global_vars import set_global_variables
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_lrpath.console import say, warn
from megatron_lrpath.data.index_cache import local_rank
from megatron_lrpath.data.record import blend_problems, refuse
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import sweep_unfinished
from megatron_lrpath.paradigms import MAIN, SFT
from megatron_lrpath.plan import run_identity
from megatron_lrpath.plan.companions import WITH_OR_WITHOUT, without_effect
from megatron_lrpath.plan.optimizers import optimizer_problems
from megatron_lrpath.runs import checkpoints, failure, lineage
from megatron_lrpath.runs.breaks import LAYOUT
from megatron_lrpath.runs.checkpoints import latest_step, present_fingerprint, require_checkpoint
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.runs.history import losses_before
from megatron_lrpath.tokenizers.prints import TokenizerSpec
from megatron_lrpath.training.checkpoints import parent as parents
from megatron_lrpath.training.checkpoints.commit import Commits, Saves
from megatron_lrpath.training.checkpoints.dist_checkpointing import queue_between_processes
from megatron_lrpath.training.checkpoints.start import Start, agree_on_start
from megatron_lrpath.training.context import RunContext
from megatron_lrpath.training.first_weights import StageOrder, drawn_at
from megatron_lrpath.training.guards import orphans
from megatron_lrpath.training.guards.guard import Guard, SpikeDetector
from megatron_lrpath.training.guards.peers import PeerWatch, Ranks, own_store
from megatron_lrpath.training.guards.runlock import hold
from megatron_lrpath.training.guards.standstill import Standstill, fit_collectives
from megatron_lrpath.training.layers import local_layers, take_rope_factor
from megatron_lrpath.training.machine import device_name
from megatron_lrpath.training.options.arguments import (
    ArgumentsProvider,
    arguments_provider,
    default_problems,
    raise_all,
    read_arguments,
)
from megatron_lrpath.training.options.from_arguments import (
    argument_context,
    differences_from_checkpoint,
    refuse_companions,
    refuse_with_path,
)
from megatron_lrpath.training.options.from_machine import set_machine_flags, take_over_saving
from megatron_lrpath.training.options.from_plan import PlannedRun, apply_defaults
from megatron_lrpath.training.options.refusals import found_later, one_refusal, validate
from megatron_lrpath.training.scheduler import (
    follow_batch_sizes,
    require_whole_micro_batches,
    set_last_batch_size,
)
from megatron_lrpath.training.session import Session
from megatron_lrpath.training.steps import StepRecorder, continue_wandb_run, forget_curves, set_wandb_defaults
from megatron_lrpath.wording import listing


def arguments(session: Session, argv: list[str], defaults: Mapping[str, Any] | None = None) -> Any:
    """Return Megatron's validated arguments; `session.context` becomes the run (None for plain Megatron).

    `defaults` are a script's own, for arguments that neither the plan nor the command line sets.

    Raises:
        UserError: arguments contradict the plan or each other.
    """
    own = session.own_arguments
    given, wrong = read_arguments(argv, own)
    if "plan" not in given and "lr_path" not in given:
        return plain_arguments(session, given, argv, dict(defaults or {}), wrong)
    wrong += default_problems(defaults or {}, given)
    later = partial(found_later, given, wrong, session, defaults or {})
    planned = PlannedRun.read(given, own, wrong, later) if "plan" in given else None
    if planned is None:
        refuse_with_path(given, own, wrong, later)
    sys.argv[1:] = [*planned.flags, *argv] if planned else argv
    args = parse_args(arguments_provider(session.own_arguments))
    if planned is None:
        session.context = argument_context(args, given, session.own_arguments)
        if getattr(args, "wandb_project", ""):
            continue_wandb_run(Path(args.save))
    else:
        apply_defaults(args, planned.explicit)
        set_wandb_defaults(args, planned.plan, planned.run)
        session.context = planned.context()
    explicit = planned.explicit if planned else given
    if session.is_packed and args.context_parallel_size != 1:
        raise UserError(
            "--context-parallel-size: packed samples are not split over ranks; leave it out for sft runs"
        )
    set_machine_flags(args, explicit, session)
    fit_collectives(args, explicit)
    take_over_saving(args)
    if session.context is not None:
        set_last_batch_size(args, session.context.sizes)
    validate(args, defaults or {}, optimizer_problems(vars(args), with_path=True))
    if session.context is not None:
        refuse_endless_ramp(args, session.context)
        check_lineage(session.context)
        if session.builds_model:
            refuse_ignored(session.context, explicit)
    if session.context is not None and session.context.plan is None and local_rank() == 0:
        refuse(blend_problems(blend_prefixes(args), TokenizerSpec.of_arguments(args)))
    set_global_variables(args)
    if session.context is not None:
        follow_batch_sizes(args, session.context.sizes, "eval_global_batch_size" in explicit)
    return args


def plain_arguments(
    session: Session,
    given: Mapping[str, Any],
    argv: list[str],
    defaults: dict[str, Any],
    wrong: Sequence[str] = (),
) -> Any:
    """Return the validated arguments of plain Megatron, with those that follow from the device.

    Raises:
        UserError: options related to --plan or --lr-path, arguments that Megatron refuses, or the problems `wrong`.
    """
    if any(problem.startswith("argument --lr-path:") for problem in wrong):
        raise_all(wrong)  # without the path it is unknown which other arguments are wrong
    refuse_companions(given, wrong)
    sys.argv[1:] = argv
    provider = arguments_provider(session.own_arguments)
    if "yaml_cfg" in given:  # the file has all arguments, also those of the device
        return yaml_arguments(given["yaml_cfg"], provider, defaults)
    args = parse_args(provider)
    if args.use_checkpoint_args or defaults.get("use_checkpoint_args"):
        if not (args.load or args.pretrained_checkpoint):
            raise UserError("--use-checkpoint-args takes them from --load or --pretrained-checkpoint.")
        load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
        load_args_from_checkpoint(args)
    set_machine_flags(args, given, session)
    validate(args, defaults, optimizer_problems(vars(args), with_path=False))
    set_global_variables(args)
    return args


def yaml_arguments(file: str, provider: ArgumentsProvider, defaults: dict[str, Any]) -> Any:
    """Read Megatron's experimental --yaml-cfg, which sets every argument from the file.

    Raises:
        UserError: the file cannot be read, or lacks an argument that Megatron reads.
    """
    try:
        return parse_and_validate_args(provider, args_defaults=defaults)
    except (AssertionError, ValueError) as error:
        raise UserError(one_refusal(error)) from None
    except (OSError, AttributeError) as error:
        raise UserError(
            f"--yaml-cfg {file}: {error}. Megatron takes all arguments from this file (the option is "
            "experimental); complete the file, or give the arguments on the command line."
        ) from None


def blend_prefixes(args: Any) -> list[str]:
    """Return the indexed datasets in --data-path and related arguments."""
    blend, per_split = get_blend_and_blend_per_split(args)
    return [prefix for part in [blend, *(per_split or ())] if part is not None for prefix in part[0]]


def check_lineage(context: RunContext) -> None:
    """Refuse, before anything is written, to continue another run or to start from another parent."""
    if context.folder is None:
        return check_argument_lineage(context)
    if lineage.is_bound(context.folder):  # a start without a checkpoint binds nothing
        lineage.check_same_run(context.folder, context.identity)
    if context.parent is None:
        return
    assert context.plan is not None
    assert context.run is not None
    if latest_step(RunFolder(context.folder).checkpoints) is None:
        require_checkpoint(context.parent.folder, context.parent.step)
    parent = context.plan.parent_of(context.run)
    own = {name: context.identity[name] for name in ("slices", "tokenizer_model", "arguments")}
    if context.kind == SFT.name:  # it has its own arguments
        recorded = lineage.read_lineage(context.plan.folder(parent)) or {"identity": {}}
        own["arguments"] = recorded["identity"].get("arguments", {})
    identity = run_identity(context.plan, parent) | own
    lineage.check_parent(context.folder, context.plan.folder(parent), context.parent.step, identity)


def refuse_ignored(context: RunContext, given: Mapping[str, Any]) -> None:
    """Refuse arguments that Megatron would ignore, of the model and of the optimizer.

    A run that is bound to them, or whose parent or plan is, continues with a warning: it was trained without
    their effect.

    Raises:
        UserError: there are any; lists all of them, a line each.
    """
    found = without_effect(given)
    if not found:
        return
    bound = context.parent is not None or lineage.is_bound(context.records)
    if context.plan is not None:
        bound = bound or lineage.is_plan_bound(context.plan)
    if not bound:
        lines = "\n".join(f"- {line}; {WITH_OR_WITHOUT}" for line in found)
        raise UserError(
            f"Megatron would ignore these arguments:\n{lines}\nCalling again does not help before that."
        )
    if local_rank() == 0:
        for line in found:
            warn(f"{line}; Megatron ignores it")


def check_argument_lineage(context: RunContext) -> None:
    """Refuse to continue another run by --lr-path; a run without a checkpoint of its own starts again."""
    own, parent = context.save, context.parent
    assert own is not None
    if parent is not None and own.resolve() == parent.folder.resolve():
        raise UserError(
            f"--save {own} is the parent's own checkpoint folder: a run never writes into its parent."
        )
    if not checkpoints.has_begun(own):
        return
    lineage.check_same_run(own, context.identity, lineage.ANOTHER_SAVE)
    if parent is not None:
        lineage.check_same_parent(own, parent.folder, parent.step)


def refuse_endless_ramp(args: Any, context: RunContext) -> None:
    """Refuse to begin a main path, which has no end, with a weight decay that changes over its length.

    A main path that has begun continues; the identity contains the length.
    """
    begun = context.save is None or checkpoints.has_begun(context.save)
    if context.kind == MAIN.name and not begun and args.weight_decay_incr_style != "constant":
        raise UserError(
            f"--weight-decay-incr-style {args.weight_decay_incr_style}: the weight decay would move over the "
            "length of the main path, which every extension changes. Give --weight-decay alone."
        )


def check_unrecorded(session: Session, args: Any, common: dict[str, Any]) -> None:
    """Compare a run by --lr-path with its checkpoint, which an older version or plain Megatron saved."""
    context = session.context
    assert context is not None
    found = differences_from_checkpoint(common, args, context.path, context.identity["arguments"])
    lineage.refuse_differences(context.records, found, lineage.ANOTHER_SAVE)
    if args.rank == 0:
        say(
            f"{context.records}: its checkpoints have no record of the run next to them (an older version or plain "
            "Megatron wrote them); this start leaves one."
        )


def begin(session: Session, args: Any) -> None:
    """Choose the checkpoint to start from, create the run's parts and record the start.

    Raises:
        UserError: the run cannot start from there, or another process trains it.
    """
    context = session.context
    assert context is not None
    if args.async_save:  # its process is forked before CUDA, NCCL and threads are started
        queue_between_processes()
    own = Path(args.save)
    ranks = Ranks.from_environment(own)
    session.peers = session.exits.peers = PeerWatch(ranks)
    session.standstill = Standstill(session.peers, args.rank_timeout)
    session.standstill.start()
    session.peers.start()

    def take_lock() -> None:
        session.lock = hold(own, partial(session.exits.lost_lock, own))

    start = agree_on_start(own, context.parent, ranks, session.ahead, take_lock, args.checkpoint_check)
    if context.folder is not None:  # from here on this process owns the run
        failure.use_folder(context.folder)
    if context.plan is not None and context.plan.adopted is not None:
        parents.require_adopted(context.plan, own, start.step)
    require_whole_micro_batches(args, context.sizes, start.step)
    start.apply(args)
    if start.folder is not None:
        common = parents.check_model(args, Path(start.folder), start.loaded, start.weights_of is not None)
        if context.folder is None and start.existing and lineage.read_lineage(own) is None:
            check_unrecorded(session, args, common)
        parents.carry(args, common["args"])
        args.pretrained_checkpoint = None  # Megatron does not see the tracker and would use it
    elif args.pretrained_checkpoint:
        if context.plan is not None:
            parents.require_adopted_weights(context.plan)
        parents.carry(args, parents.check_pretrained(args))
    else:
        if args.pipeline_model_parallel_size > 1:
            session.first_weights = StageOrder(args.virtual_pipeline_model_parallel_size or 1)
        session.draws_all_experts = args.expert_model_parallel_size > 1 and args.use_cpu_initialization
    if context.prepared is not None:  # stored in every checkpoint: exports contain the template
        args.lrpath_chat = context.prepared.chat
    retain_interval = args.save_retain_interval
    protect(session, args, start, ranks)
    if args.rank == 0:
        record_start(context, args, start, retain_interval)
    session.first_step, session.store = start.step, ranks.store or own_store()


def record_start(context: RunContext, args: Any, start: Start, retain_interval: int | None) -> None:
    """Write the lineage on rank 0."""
    for file in RunFolder(context.records).written_by_training:  # unfinished files of a killed process
        sweep_unfinished(file)
    if not start.existing:
        lineage.forget(context.records)
    plan = str(context.plan.path.resolve()) if context.plan else None
    drawn = drawn_at(args) if start.folder is None and not args.pretrained_checkpoint else None
    if (
        drawn
        and context.plan
        and context.run
        and (others := lineage.drawn_otherwise(context.plan, context.run, drawn))
    ):
        say(
            f"{context.records}: on GPUs the first weights depend on the layout, and these differ from those of "
            f"{listing(others)}. Train all of them at the same sizes to compare them from the same weights."
        )
    record = (
        context.identity,
        parent_record(context),
        start.step,
        args.world_size,
        retain_interval,
        plan,
        drawn,
        machine_record(args),
    )
    if found := lineage.write_lineage(context.records, *record):
        say(
            f"{context.records}: a break at step {start.step:,}: continues with {listing(found)}; equal bits are "
            "promised between breaks only"
        )


def machine_record(args: Any) -> dict[str, Any]:
    """Return what affects rounding: the device, the layout, and on a GPU the kernels in use."""
    record: dict[str, Any] = {"device": device_name(args)}
    record["layout"] = {name: getattr(args, name, None) for name in LAYOUT}
    if args.gpu_kernels:
        fused = ["cross_entropy_loss_fusion"] if args.cross_entropy_loss_fusion else []
        record["kernels"] = " ".join([*args.gpu_kernels, *fused])
    return record


def protect(session: Session, args: Any, start: Start, ranks: Ranks) -> None:
    """Disable Megatron's own saves, retention and numeric checks, which the session replaces."""
    context = session.context
    assert context is not None
    retain_interval, args.save_retain_interval = args.save_retain_interval, None
    earlier = lineage.retain_intervals(context.records)
    points = branch_points(context)
    saves = Saves(Path(args.save), context.keep_steps, points, retain_interval, start.existing, earlier)
    set_forkserver_preload([orphans.__name__])
    if session.device == "cpu":
        # The persistent worker would write tensors while the training changes them (it shares their memory);
        # a forked writer has the memory as it was.
        args.use_persistent_ckpt_worker = False
    check, args.check_for_nan_in_loss_and_grad = args.check_for_nan_in_loss_and_grad, False
    session.guard = Guard(
        session.signals,
        saves,
        check=check,
        detector=spike_detector(args, context, start, ranks),
        skip=args.loss_spike_action == "skip",
        max_skips=args.loss_spike_max_skips,
        first_step=start.step,
        first_samples=context.sizes.samples_at(start.step),
    )
    forget_curves(context, args, start.step + 1 if start.existing else start.step)
    session.saves, session.recorder = saves, StepRecorder(context, session.guard, args)
    session.commits = Commits(saves, session.recorder.sync_history, session.recorder.record_skips)


def branch_points(context: RunContext) -> frozenset[int]:
    """Return the steps that other runs start from: all kept steps, but on a plan's main path the version
    ends.
    """
    plan, run = context.plan, context.run
    if plan is None or run is None or run.makes_version:
        return context.keep_steps
    parents = [other.parent for other in plan.runs(run.paradigm) if other.parent is not None]
    return frozenset(parent.step for parent in parents if parent.run == run.name)


def spike_detector(args: Any, context: RunContext, start: Start, ranks: Ranks) -> SpikeDetector | None:
    """Return the spike detector of the arguments, initialized with the losses before this start."""
    if args.loss_spike_action == "off":
        return None
    if args.loss_spike_action == "skip" and context.folder is None:
        raise UserError(
            "--loss-spike-action skip needs --plan: a skipped batch is recorded in the run's folder."
        )
    window = args.loss_spike_window
    earlier = losses_before(context.folder, start.step, window) if context.folder and not ranks.rank else []
    return SpikeDetector(args.loss_spike_threshold, window, ranks.share(earlier))


def parent_record(context: RunContext) -> dict[str, Any] | None:
    """Return the lineage's entry about a run's parent."""
    if context.parent is None or lineage.read_lineage(context.records) is not None:
        return None  # recorded at the first start; the parent's checkpoint may have been removed since
    fingerprint = present_fingerprint(context.parent.folder, context.parent.step)
    if fingerprint is None:
        return None  # of a run that an older release began
    return {
        "run": parent_name(context),
        "step": context.parent.step,
        "checkpoints": str(context.parent.folder),
        "fingerprint": fingerprint,
    }


def parent_name(context: RunContext) -> str:
    """Return the name of the parent's run in the plan, or else of its checkpoint folder."""
    assert context.parent is not None
    if context.run is not None and context.run.parent is not None:
        return context.run.parent.run
    return context.parent.folder.resolve().name


def configuration(args: Any) -> Any:
    """Return Megatron's configuration container with the model; without Transformer Engine the layers are
    this project's.

    Raises:
        UserError: the arguments do not describe a model that Megatron builds.
    """
    try:
        model = gpt_config_from_args(args)
    except (AssertionError, ValueError) as error:
        raise UserError(one_refusal(error)) from error
    take_rope_factor(model, args)
    if args.transformer_impl == "local" and args.spec is None:
        model.transformer_layer_spec = local_layers
    return pretrain_cfg_container_from_args(args, model)


def end(session: Session) -> None:
    """Leave the process group and release the run's lock, so that no rank prints a warning at exit."""
    if session.peers is not None:
        session.peers.leave()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    elif session.peers is not None:
        with suppress(RuntimeError):
            session.peers.see_others_off()
    if session.lock is not None:
        session.lock.close()

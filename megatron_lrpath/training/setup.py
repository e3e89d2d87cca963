"""Everything between the command line and Megatron's loop: arguments, context, lineage, configuration."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_lrpath.errors import UserError
from megatron_lrpath.files import sweep_unfinished
from megatron_lrpath.runs import failure, lineage
from megatron_lrpath.runs.checkpoints import checkpoint_fingerprint, latest_step
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.training import environment, watching
from megatron_lrpath.training import forward as packed
from megatron_lrpath.training.checkpoints import parent as branch
from megatron_lrpath.training.checkpoints import parent as pretrained
from megatron_lrpath.training.checkpoints.start import agree_on_start, release_lock
from megatron_lrpath.training.context import RunContext, set_context
from megatron_lrpath.training.guards import peers, safeguards
from megatron_lrpath.training.guards.peers import Ranks, own_store
from megatron_lrpath.training.options import from_arguments, from_plan
from megatron_lrpath.training.options.arguments import add_all_own_arguments, explicit_arguments


def arguments(
    words: list[str], device: str, defaults: Mapping[str, Any] | None = None
) -> tuple[Any, RunContext | None]:
    """Megatron's validated arguments and the run's context (None for plain Megatron).

    `defaults` are those of a script of its own, for what neither the plan nor the command line says.

    Raises:
        UserError: the words contradict the plan or each other.
    """
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.global_vars import set_global_variables

    said = explicit_arguments(words)
    sys.argv[1:] = from_plan.command_line(words)
    args = parse_args(add_all_own_arguments)
    context = make_context(args, said)
    set_context(context)
    packed.set_packed(context is not None and context.kind == "sft")
    set_environment_flags(args, explicit_arguments(sys.argv[1:]), device)
    if context is not None:
        safeguards.before_validation(args)
    if packed.is_packed():
        packed.refuse_unsupported(args)
    validate(args, functools.partial(validate_args, defaults=dict(defaults or {})))
    if context is not None and context.folder is not None:
        check_lineage(context)
    set_global_variables(args)
    return args, context


def validate(args: Any, validate_args: Callable[[Any], Any]) -> None:
    """Megatron's own validation, whose assertions are the user's to mend.

    Raises:
        UserError: what Megatron refuses.
    """
    try:
        validate_args(args)
    except (AssertionError, ValueError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(f"Megatron refuses these arguments: {error or where.line}") from None


def set_environment_flags(args: Any, said: dict[str, Any], device: str) -> None:
    """Set what follows from the device and the installed libraries.

    Raises:
        UserError: an argument asks for what is not installed.
    """
    for name, value in environment.flags(device, packed.is_packed()).items():
        if said.get(name, value) != value:
            raise UserError(
                f"{from_arguments.flag(name)} {said[name]}: not available here (device {device}, Transformer "
                f"Engine {'found' if environment.has_transformer_engine() else 'not installed'}); leave the "
                "argument out."
            )
        setattr(args, name, value)
    if args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1:
        # Megatron asserts it, for the overlap of communication and computation.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if device == "cpu" and "num_workers" not in said:
        args.num_workers = 0  # reading memory-mapped tokens needs no process of its own


def make_context(args: Any, said: dict[str, Any]) -> RunContext | None:
    """The run's context: from the plan, from --lr-path, or none; `said` are the user's explicit arguments."""
    if "plan" not in said:
        return from_arguments.argument_context(args, said)
    plan, run = from_plan.load_run(said)
    from_plan.apply_defaults(args, explicit_arguments(sys.argv[1:]))
    watching.set_wandb_defaults(args, plan, run)
    return from_plan.plan_context(plan, run, said)


def check_lineage(context: RunContext) -> None:
    """Refuse, before anything is written, to continue another run or to leave another parent."""
    assert context.folder is not None
    lineage.check_same_run(context.folder, context.identity)
    if context.parent is None:
        return
    assert context.plan is not None
    assert context.run is not None
    if latest_step(RunFolder(context.folder).checkpoints) is None:
        branch.require_checkpoint(context.parent)
    parent = context.plan.parent_of(context.run)
    own = {name: context.identity[name] for name in ("slices", "tokenizer_model", "arguments")}
    if context.kind == "sft":  # its arguments are its own
        recorded = lineage.read_lineage(context.plan.folder(parent)) or {"identity": {}}
        own["arguments"] = recorded["identity"].get("arguments", {})
    identity = context.plan.identity(parent) | own
    lineage.check_parent(context.folder, context.plan.folder(parent), context.parent.step, identity)


def begin(args: Any, context: RunContext, device: str) -> tuple[int, dist.Store | None]:
    """Choose the checkpoint to start from and record the start.

    Returns:
        The step the run starts at, and the store in which its ranks have met.
    """
    own = Path(args.save)
    branch.refuse_own_parent(own, context.parent)
    ranks = Ranks.from_environment()
    peers.begin_watch(ranks)
    start = agree_on_start(own, context.parent, ranks, args.checkpoint_check)
    if context.folder is not None:  # from here on the run is this process's own
        failure.use_folder(context.folder)
    start.apply(args)
    if start.folder is not None:
        branch.check_model(args, Path(start.folder), start.loaded, start.weights_of is not None)
        branch.declare_rates(args, Path(start.folder), start.loaded)
        args.pretrained_checkpoint = None  # Megatron, not seeing the tracker, would take it
    elif args.pretrained_checkpoint:
        pretrained.check_pretrained(args)
    if context.prepared is not None:  # stored in every checkpoint: an export knows how to talk to the model
        args.lrpath_chat = context.prepared.chat
    retain_interval = args.save_retain_interval
    safeguards.install(args, context, start, ranks, device)
    if context.folder is not None and args.rank == 0:
        for file in RunFolder(context.folder).written_by_training:
            sweep_unfinished(file)
        plan = str(context.plan.path.resolve()) if context.plan else None
        parent = parent_record(context)
        facts = (start.step, args.world_size, retain_interval)
        lineage.write_lineage(context.folder, context.identity, parent, *facts, plan)
    return start.step, ranks.store or own_store()


def parent_record(context: RunContext) -> dict[str, Any] | None:
    """What the lineage says of a run's parent."""
    if context.parent is None or context.run is None or context.run.parent is None:
        return None
    if context.folder is not None and lineage.read_lineage(context.folder) is not None:
        return None  # recorded at the first start; the parent's checkpoint may be gone by now
    return {
        "run": context.run.parent.run,
        "step": context.parent.step,
        "checkpoints": str(context.parent.folder),
        "fingerprint": checkpoint_fingerprint(context.parent.folder, context.parent.step),
    }


def configuration(args: Any) -> Any:
    """Megatron's configuration container with the model; layers without Transformer Engine are ours."""
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

    model = gpt_config_from_args(args)
    if args.transformer_impl == "local" and args.spec is None:
        from megatron_lrpath.training.layers import local_layers

        model.transformer_layer_spec = local_layers
    return pretrain_cfg_container_from_args(args, model)


def end() -> None:
    """Leave the process group and the run's lock, so that no rank complains at exit."""
    watch = peers.current_watch()
    if watch is not None:
        watch.leave()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    elif watch is not None:
        with suppress(RuntimeError):
            watch.see_others_off()
    release_lock()

"""Megatron arguments that follow from the machine: kernels, the device of a rank, overlap of communication."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from megatron_lrpath.console import say
from megatron_lrpath.errors import UserError
from megatron_lrpath.plan.arguments import flag
from megatron_lrpath.plan.needs import ENGINE, PLAIN, refuse, unmet
from megatron_lrpath.training import machine
from megatron_lrpath.training.gpu import measures
from megatron_lrpath.training.session import Session

CROSS_ENTROPY_FUSION = "cross_entropy_loss_fusion"


def set_machine_flags(args: Any, explicit: Mapping[str, Any], session: Session) -> None:
    """Set the arguments that follow from the device and the installed libraries.

    Args:
        args: Megatron's arguments, parsed and not validated.
        explicit: those that the plan or the command line sets.
        session: its device and context.

    Raises:
        UserError: arguments require something that is missing; lists all of them in one message.
    """
    have = machine.available(session.device, session.is_packed)
    if session.context is None:
        have |= {PLAIN}
    flags = machine.flags(session.device, session.is_packed)
    if args.reset_attention_mask and not session.builds_model:
        flags.pop(machine.MASK)  # a script's own model can read it
    other = [
        f"{flag(name)} {explicit[name]} cannot be had here"
        for name, value in flags.items()
        if explicit.get(name, value) != value
    ]
    engine = (
        "not used for packed samples" if session.is_packed else "found" if ENGINE in have else "not usable"
    )
    refuse(
        [*unmet(vars(args), have), *other],
        f"requirements of these arguments are not met (device: {session.device}; Transformer Engine: {engine})",
    )
    for name, value in flags.items():
        setattr(args, name, value)
    if session.device == "cuda":
        args.local_rank = machine.device_number(args.local_rank)
        off = turned_off(session)
        overlap_communication(args, off)
        session.kernels = choose_kernels(args, off, is_run=session.context is not None)
    elif "num_workers" not in explicit:
        args.num_workers = 0  # reading memory-mapped tokens needs no separate process
    if args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1:
        # Megatron requires it for the overlap of communication and computation.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def take_over_saving(args: Any) -> None:
    """Choose the way in which checkpoints are written and signals handled, before Megatron's validation.

    Megatron turns --async-save off without its persistent worker; see `protect` for the CPU.
    """
    args.exit_signal_handler = False  # this project's handler is used
    if args.async_save:
        args.use_persistent_ckpt_worker = True
        if not machine.importable("nvidia_resiliency_ext"):
            args.async_strategy = "mcore"


def overlap_communication(args: Any, off: frozenset[str] = frozenset()) -> None:
    """Overlap the reduction of gradients and the gathering of weights with the computation, if there are any.

    Only this function decides that, for every launcher. It requires several data-parallel ranks and the
    distributed optimizer with Adam. `off` are the arguments that the plan sets to false.
    """
    model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    if args.world_size <= model or not args.use_distributed_optimizer or args.optimizer != "adam":
        return
    if "overlap_grad_reduce" in off:
        return
    args.overlap_grad_reduce = True
    # Megatron refuses the second one with the option that writes the weights of single steps.
    if "overlap_param_gather" not in off and getattr(args, "save_params_interval", None) is None:
        args.overlap_param_gather = True


def choose_kernels(args: Any, off: frozenset[str], is_run: bool) -> frozenset[str]:
    """Return the kernels of --gpu-kernels that this training uses; rank 0 prints them.

    If liger's cross-entropy cannot be used, a run in bf16 uses Megatron's fused one, unless the plan sets
    cross_entropy_loss_fusion to false (`off`). Plain Megatron (not `is_run`) uses only the requested kernels.

    Raises:
        UserError: a requested kernel cannot be used.
    """
    wanted = args.gpu_kernels
    if wanted is None and not is_run:
        return frozenset()
    kernels, why = measures.choose(wanted, measures.Setting(args, machine.fused_optimizer()))
    if wanted is not None:
        refuse_kernels(why)
    elif measures.CROSS_ENTROPY in why and is_fusion_possible(args) and CROSS_ENTROPY_FUSION not in off:
        args.cross_entropy_loss_fusion = True
    if os.environ.get("RANK", "0") == "0":
        say(measures.summary(kernels, why, args.cross_entropy_loss_fusion))
    args.gpu_kernels = sorted(kernels) or [measures.NONE]  # for the lineage
    return kernels


def is_fusion_possible(args: Any) -> bool:
    """Return whether Megatron's fused cross-entropy can be used: in bf16, and not in deterministic mode."""
    return bool(args.bf16) and not args.deterministic_mode


def refuse_kernels(why: Mapping[str, str]) -> None:
    """Refuse the requested kernels that cannot be used.

    Raises:
        UserError: there are any; lists all of them, a line each.
    """
    if why:
        lines = [f"- --gpu-kernels {name}: {text}" for name, text in why.items()]
        raise UserError(
            "these kernels cannot be used:\n"
            + "\n".join(lines)
            + "\nLeave them out, or leave --gpu-kernels out to "
            "use all that can be used (docs/gpus.md)."
        )


def turned_off(session: Session) -> frozenset[str]:
    """Return the measures of this module that the plan sets to false; a command line cannot set that."""
    context = session.context
    if context is None or context.plan is None:
        return frozenset()
    plan = context.plan
    given = {**plan.model.overrides, **(plan.sft_megatron if session.is_packed else plan.megatron)}
    names = ("overlap_grad_reduce", "overlap_param_gather", CROSS_ENTROPY_FUSION)
    return frozenset(name for name in names if given.get(name, given.get(name.replace("_", "-"))) is False)

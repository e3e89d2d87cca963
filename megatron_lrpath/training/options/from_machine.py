"""The Megatron arguments that follow from the machine: kernels, the device of a rank, overlap of communication."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from megatron_lrpath.plan.arguments import flag
from megatron_lrpath.plan.needs import ENGINE, PLAIN, refuse, unmet
from megatron_lrpath.training import environment
from megatron_lrpath.training.session import Session


def set_machine_flags(args: Any, explicit: Mapping[str, Any], session: Session) -> None:
    """Set what follows from the device and the installed libraries.

    Args:
        args: Megatron's arguments, parsed and not validated.
        explicit: those that the plan or the command line sets.
        session: its device and context.

    Raises:
        UserError: arguments ask for what is not there, all of them in one message.
    """
    have = environment.available(session.device, session.is_packed)
    if session.context is None:
        have |= {PLAIN}
    flags = environment.flags(session.device, session.is_packed)
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
        args.local_rank = environment.device_number(args.local_rank)
        overlap_communication(args, turned_off(session))
    elif "num_workers" not in explicit:
        args.num_workers = 0  # reading memory-mapped tokens needs no process of its own
    if args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1:
        # Megatron asserts it, for the overlap of communication and computation.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def take_over_saving(args: Any) -> None:
    """Choose how checkpoints are written and signals answered, before Megatron validates its arguments.

    Megatron turns --async-save off without its persistent worker; see `protect` for the CPU.
    """
    args.exit_signal_handler = False  # ours answers
    if args.async_save:
        args.use_persistent_ckpt_worker = True
        if not environment.importable("nvidia_resiliency_ext"):
            args.async_strategy = "mcore"


def overlap_communication(args: Any, off: frozenset[str] = frozenset()) -> None:
    """Overlap the gradients' reduction and the weights' gathering with the computation, where there are any.

    This is decided here alone, for every launcher. It needs more than one data-parallel rank and the
    distributed optimizer of Adam. `off` are the arguments that the plan sets to false.
    """
    model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    if args.world_size <= model or not args.use_distributed_optimizer or args.optimizer != "adam":
        return
    if "overlap_grad_reduce" in off:
        return
    args.overlap_grad_reduce = True
    # Megatron refuses the second with what writes the weights of single steps.
    if "overlap_param_gather" not in off and getattr(args, "save_params_interval", None) is None:
        args.overlap_param_gather = True


def turned_off(session: Session) -> frozenset[str]:
    """The overlaps that the plan sets to false; a command line has no word for that."""
    context = session.context
    if context is None or context.plan is None:
        return frozenset()
    plan = context.plan
    given = {**plan.model.overrides, **(plan.sft_megatron if session.is_packed else plan.megatron)}
    names = ("overlap_grad_reduce", "overlap_param_gather")
    return frozenset(name for name in names if given.get(name, given.get(name.replace("_", "-"))) is False)

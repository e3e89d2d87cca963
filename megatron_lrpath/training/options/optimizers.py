"""Optimizers besides Adam, and what Megatron cannot do with them."""

from __future__ import annotations

from typing import Any

from megatron_lrpath.plan.optimizers import OF_MEGATRON, missing_package

MUON, DIST_MUON, SOAP = "muon", "dist_muon", "soap"


def of_the_package(args: Any) -> bool:
    """Whether the optimizer of these arguments comes from the package."""
    return args.optimizer not in OF_MEGATRON


def optimizer_problems(args: Any, with_path: bool) -> list[str]:
    """What Megatron cannot do with the optimizer, a line each.

    Args:
        args: Megatron's arguments, before it validates them.
        with_path: whether this is a run with a path (not plain Megatron), which goes on from its checkpoints.
    """
    if not of_the_package(args):
        return []
    chosen = f"--optimizer {args.optimizer}"
    problems = [missing] if (missing := missing_package(args.optimizer)) else []
    if args.fp16:
        problems.append(f"{chosen}: Megatron has it for --bf16 and for 32 bits, not for --fp16.")
    if is_by_layers(args) and not args.bf16:
        spread = "" if args.optimizer == DIST_MUON else " with --use-distributed-optimizer"
        problems.append(
            f"{chosen}{spread}: Megatron 0.19 distributes it over the ranks in bf16 alone; give --bf16, or "
            f"{without_spreading(args)}."
        )
    if with_path and splits_matrices(args):
        problems.append(
            f"{chosen} at --tensor-model-parallel-size {args.tensor_model_parallel_size}: each rank would take its "
            f"part of a matrix for a matrix of its own, so that another layout trains another model; {whole(args)}."
        )
    return problems


def is_by_layers(args: Any) -> bool:
    """Whether each rank keeps the state of some of the matrices: Megatron's layer-wise optimizer."""
    return bool(args.optimizer == DIST_MUON or args.use_distributed_optimizer)


def without_spreading(args: Any) -> str:
    """How to train with the same update, every rank keeping all of the state."""
    return f"--optimizer {MUON}" if args.optimizer == DIST_MUON else "leave --use-distributed-optimizer out"


def splits_matrices(args: Any) -> bool:
    """Whether the update of a matrix depends on how tensor parallelism splits it."""
    if args.tensor_model_parallel_size == 1:
        return False
    return args.optimizer == SOAP or (
        args.optimizer in (MUON, DIST_MUON) and args.muon_tp_mode == "blockwise"
    )


def whole(args: Any) -> str:
    """How the update of a matrix stays the same at every layout."""
    if args.optimizer == SOAP:
        return "use pipeline parallelism instead"
    return "give --muon-tp-mode duplicated or distributed"

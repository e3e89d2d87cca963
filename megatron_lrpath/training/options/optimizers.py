"""Optimizers other than Adam, and their restrictions in Megatron."""

from __future__ import annotations

from typing import Any

from megatron_lrpath.plan.optimizers import OF_MEGATRON, missing_package
from megatron_lrpath.training.options.arguments import raise_all

MUON = "muon"


def of_the_package(args: Any) -> bool:
    """Return whether the optimizer of these arguments comes from the package."""
    return args.optimizer not in OF_MEGATRON


def check_optimizer(args: Any, with_path: bool) -> None:
    """Refuse settings that would end the training when the optimizer is built, or when its state is loaded.

    Raises:
        UserError: all of them, a line each, see `optimizer_problems`.
    """
    raise_all(optimizer_problems(args, with_path))


def optimizer_problems(args: Any, with_path: bool) -> list[str]:
    """Return the settings of the optimizer that Megatron does not support, a line each.

    Args:
        args: Megatron's arguments, before it validates them.
        with_path: whether this is a run with a path (not plain Megatron), which continues from its checkpoints.
    """
    if not of_the_package(args):
        return []
    chosen = f"--optimizer {args.optimizer}"
    problems = [missing] if (missing := missing_package(args.optimizer)) else []
    if args.fp16:
        problems.append(f"{chosen}: Megatron has it for --bf16 and for 32 bits, not for --fp16.")
    if with_path and args.use_distributed_optimizer:
        problems.append(
            f"{chosen} with --use-distributed-optimizer: Megatron 0.19 cannot be trusted to load what it saves of an "
            "optimizer that is distributed by layers; leave --use-distributed-optimizer out."
        )
    if with_path and args.optimizer == MUON and splits_matrices(args):
        problems.append(
            f"{chosen} at --tensor-model-parallel-size {args.tensor_model_parallel_size}: each rank would "
            "orthogonalize its part of a matrix alone, so that another layout trains another model; give "
            "--muon-tp-mode duplicated or distributed."
        )
    return problems


def splits_matrices(args: Any) -> bool:
    """Return whether Muon treats the shards of a matrix on the tensor-parallel ranks as separate matrices."""
    return args.tensor_model_parallel_size > 1 and args.muon_tp_mode == "blockwise"

"""Optimizers that are not Megatron's own: the package that provides them, and their restrictions in Megatron."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

PACKAGE, EXTRA = "emerging-optimizers", "optimizers"
OLDEST = (0, 2)  # the oldest version for Megatron 0.19
ADAM, SGD = "adam", "sgd"
OF_MEGATRON = frozenset({ADAM, SGD})
MUON, DIST_MUON, SOAP = "muon", "dist_muon", "soap"


def optimizer_problems(given: Mapping[str, Any], with_path: bool = True, is_here: bool = True) -> list[str]:
    """Return what Megatron cannot do with the optimizer, a line each.

    Args:
        given: Megatron's arguments by destination before its validation; arguments that are not given can be
            missing.
        with_path: whether this is a run with a path (not plain Megatron), which resumes from its checkpoints.
        is_here: whether it is trained on this machine, which then needs the package.
    """
    name = given.get("optimizer", ADAM)
    if name in OF_MEGATRON:
        return []
    chosen = f"--optimizer {name}"
    problems = [missing] if is_here and (missing := missing_package(name)) else []
    if given.get("fp16"):
        problems.append(f"{chosen}: Megatron has it for --bf16 and for 32 bits, not for --fp16.")
    elif not given.get("bf16") and (name == DIST_MUON or given.get("use_distributed_optimizer")):
        spread = "" if name == DIST_MUON else " with --use-distributed-optimizer"
        instead = f"--optimizer {MUON}" if name == DIST_MUON else "leave --use-distributed-optimizer out"
        problems.append(
            f"{chosen}{spread}: Megatron 0.19 distributes it over the ranks in bf16 alone; give --bf16, or {instead}."
        )
    ways = {SOAP: "use pipeline parallelism instead"}
    if given.get("muon_tp_mode", "blockwise") == "blockwise":  # Megatron's default
        ways |= dict.fromkeys((MUON, DIST_MUON), "give --muon-tp-mode duplicated or distributed")
    split = int(given.get("tensor_model_parallel_size") or 1)
    if with_path and split > 1 and name in ways:
        problems.append(
            f"{chosen} at --tensor-model-parallel-size {split}: each rank would take its part of a matrix for a matrix "
            f"of its own, so that another layout trains another model; {ways[name]}."
        )
    return problems


def missing_package(optimizer: str) -> str | None:
    """Return the missing package of an optimizer and how to install it; None if a suitable version is
    installed.
    """
    if optimizer in OF_MEGATRON or is_installed():
        return None
    return (
        f"--optimizer {optimizer} needs the package {PACKAGE}: pip install 'megatron-lrpath[{EXTRA}]' (in a checkout: "
        f"pip install -e '.[{EXTRA}]')."
    )


def is_installed() -> bool:
    """Return whether the package is installed, in a version that Megatron supports."""
    try:
        return tuple(int(part) for part in metadata.version(PACKAGE).split(".")[:2]) >= OLDEST
    except (metadata.PackageNotFoundError, ValueError):
        return False

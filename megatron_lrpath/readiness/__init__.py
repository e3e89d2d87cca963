"""The checks of a plan before a process starts, for `plan`, `doctor`, `run`, `sft` and `submit`.

The check of an allocation by the ranks of a Slurm job is in `launch.preflight`.
"""

from megatron_lrpath.readiness.check import (
    ANYWHERE,
    CLUSTER,
    HERE,
    Request,
    check_plan,
    fetch_archived,
    refuse,
    require_ready,
    tell,
)
from megatron_lrpath.readiness.finding import FAILED, INFO, OK, WARNING, Finding, worst

__all__ = [
    "ANYWHERE",
    "CLUSTER",
    "FAILED",
    "HERE",
    "INFO",
    "OK",
    "WARNING",
    "Finding",
    "Request",
    "check_plan",
    "fetch_archived",
    "refuse",
    "require_ready",
    "tell",
    "worst",
]

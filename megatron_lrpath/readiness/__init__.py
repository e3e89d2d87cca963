"""What can be known before a process starts: one check of a plan for `plan`, `doctor`, `run`, `sft` and `submit`.

Not the check of an allocation, which the ranks of a Slurm job carry out together (`launch.preflight`).
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

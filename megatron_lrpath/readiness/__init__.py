"""What can be known before a process starts: one check of a plan for `plan`, `doctor`, `run` and `submit`.

Not the check of an allocation, which the ranks of a Slurm job carry out together (`launch.preflight`).
"""

from megatron_lrpath.readiness.check import Request, check_plan, require_ready
from megatron_lrpath.readiness.finding import FAILED, INFO, OK, WARNING, Finding, worst

__all__ = [
    "FAILED",
    "INFO",
    "OK",
    "WARNING",
    "Finding",
    "Request",
    "check_plan",
    "require_ready",
    "worst",
]

"""What this machine and a plan have and lack: the checks of `lrpath doctor`."""

from megatron_lrpath.doctor.machine import Finding, machine_checks, worst
from megatron_lrpath.doctor.plans import plan_checks

__all__ = ["Finding", "machine_checks", "plan_checks", "worst"]

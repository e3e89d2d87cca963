"""The checks of `lrpath doctor`: what this machine and a plan have and what is missing."""

from megatron_lrpath.doctor.machine import machine_checks
from megatron_lrpath.doctor.plans import plan_checks

__all__ = ["machine_checks", "plan_checks"]

"""Plan files: versions, runs, learning-rate paths and costs, without torch."""

from megatron_lrpath.paradigms import PARADIGMS
from megatron_lrpath.plan.file.load import load_plan
from megatron_lrpath.plan.file.schema import json_schema
from megatron_lrpath.plan.identity import differences, run_identity
from megatron_lrpath.plan.plan import Plan
from megatron_lrpath.plan.runs import Run

__all__ = [
    "PARADIGMS",
    "Plan",
    "Run",
    "differences",
    "json_schema",
    "load_plan",
    "run_identity",
]

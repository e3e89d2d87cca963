"""Plan files: versions, runs, learning-rate paths and costs, without torch."""

from megatron_lrpath.paradigms import PARADIGMS
from megatron_lrpath.plan.file.keys import json_schema
from megatron_lrpath.plan.file.load import load_plan
from megatron_lrpath.plan.identity import differences, run_identity
from megatron_lrpath.plan.neutral import NEUTRAL, SET_BY_PLAN, is_neutral
from megatron_lrpath.plan.plan import Plan
from megatron_lrpath.plan.runs import Run
from megatron_lrpath.plan.spec import Batch, Data, Parent, Tokenizer, Version

__all__ = [
    "NEUTRAL",
    "PARADIGMS",
    "SET_BY_PLAN",
    "Batch",
    "Data",
    "Parent",
    "Plan",
    "Run",
    "Tokenizer",
    "Version",
    "differences",
    "is_neutral",
    "json_schema",
    "load_plan",
    "run_identity",
]

"""The layout that determines the first weights is part of the identity of a run that draws them on GPUs."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_lrpath.plan import Plan, run_identity
from megatron_lrpath.runs import lineage
from megatron_lrpath.training.first_weights import drawn_at
from tests.support.plan_text import plan_with

SIZES = ("tensor_model_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Return a plan of all paradigms."""
    return plan_with(tmp_path)


def arguments(tensor: int, on_cpu: bool = False) -> Namespace:
    """Return Megatron's arguments of a layout; on GPUs it draws weights there unless `on_cpu` is set."""
    return Namespace(use_cpu_initialization=on_cpu, **dict(zip(SIZES, (tensor, 1, tensor), strict=True)))


def start(plan: Plan, paradigm: str, name: str, drawn: dict[str, Any] | None) -> dict[str, Any]:
    """Record a start of a run; return its identity afterwards."""
    run = plan.run(paradigm, name)
    lineage.write_lineage(plan.folder(run), run_identity(plan, run), None, 0, 1, None, None, drawn)
    found: dict[str, Any] = lineage.read_lineage(plan.folder(run)) or {}
    return found["identity"]


def test_on_gpus_the_layout_of_the_first_start_stays_in_the_identity(plan: Plan) -> None:
    identity = start(plan, "ours", "main", drawn_at(arguments(4)))
    assert identity["first_weights"] == dict(zip(SIZES, (4, 1, 4), strict=True))
    resumed = start(plan, "ours", "main", None)
    assert resumed == identity
    now = run_identity(plan, plan.run("ours", "main"))
    assert lineage.differences(resumed, now) == []  # begun: it resumes at any layout
    folder = plan.folder(plan.run("ours", "main"))
    lineage.forget(folder)
    assert start(plan, "ours", "main", drawn_at(arguments(2)))["first_weights"][SIZES[0]] == 2


def test_on_the_cpu_the_identity_is_what_it_was(plan: Plan) -> None:
    for drawn in (drawn_at(arguments(2, on_cpu=True)), None):
        identity = start(plan, "ours", "main", drawn)
        assert identity.keys() == run_identity(plan, plan.run("ours", "main")).keys()


def test_runs_from_other_first_weights_are_named(plan: Plan) -> None:
    start(plan, "ours", "main", drawn_at(arguments(4)))
    start(plan, "ours", "branch-v1", None)
    scratch = plan.run("ptfs", "scratch-v1")
    assert lineage.drawn_otherwise(plan, scratch, drawn_at(arguments(4))) == []
    assert lineage.drawn_otherwise(plan, scratch, drawn_at(arguments(2, on_cpu=True))) == []
    assert lineage.drawn_otherwise(plan, plan.run("ours", "main"), drawn_at(arguments(2))) == []
    (named,) = lineage.drawn_otherwise(plan, scratch, drawn_at(arguments(2)))
    assert named.startswith("ours/main (tensor_model_parallel_size 4")

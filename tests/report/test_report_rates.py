"""The report's check of the learning rates detects every rate that differs from the plan, and no other."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lrpath.plan import load_plan
from megatron_lrpath.report.collect import collect
from megatron_lrpath.report.rates import check_rates, summarize
from megatron_lrpath.schedule import STYLES
from tests.support.report_tree import write_plan, write_tree


@pytest.fixture
def plan(tmp_path):
    made = write_plan(tmp_path, versions=2)
    write_tree(made, evaluate=False)
    return made


def change(plan, paradigm, name, edit):
    """Rewrite a run's history line by line."""
    path = plan.folder(plan.run(paradigm, name)) / "history.jsonl"
    rows = [edit(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def verdict(plan):
    return summarize(check_rates(collect(plan)))


def test_the_number_of_rates_that_match_the_plan_is_shown(plan):
    found = verdict(plan)
    assert found.level == "good"
    steps = sum(run.steps for p in ("ptfs", "cpt", "ours") for run in plan.runs(p) if not run.same_as)
    assert f"{steps:,} recorded steps of 6 runs" in found.headline
    assert "0 absolute, 0 relative" in found.details[0]


def test_one_other_rate_is_found_with_run_step_and_size(plan):
    change(plan, "ours", "branch-v2", lambda row: row | {"lr": 1e-3} if row["step"] == 110 else row)
    found = verdict(plan)
    planned = plan.run("ours", "branch-v2").path.lr_at(109)
    assert found.level == "bad"
    assert "1 of 6 runs" in found.headline
    assert f"{1e-3 - planned:.3g} absolute" in found.details[0]
    assert found.details[1].startswith("ours/branch-v2: at step 110 the rate was 0.001")
    assert f"relative {(1e-3 - planned) / planned:.3g}" in found.details[1]


def test_a_rate_one_step_late_is_found(plan):
    run = plan.run("ptfs", "scratch-v1")
    change(plan, "ptfs", "scratch-v1", lambda row: row | {"lr": run.path.lr_at(row["step"])})
    assert verdict(plan).level == "bad"


def test_rounding_is_no_deviation_but_is_stated(plan):
    change(plan, "ours", "main", lambda row: row | {"lr": row["lr"] * (1 + 2**-52)})
    found = verdict(plan)
    assert found.level == "good"
    assert "but for rounding" in found.headline
    assert "0 absolute" not in found.details[0]


def test_a_rate_where_zero_is_planned_is_an_infinite_relative_deviation(plan):
    change(plan, "ours", "main", lambda row: row | {"lr": 1e-4} if row["step"] == 1 else row)
    found = verdict(plan)
    assert found.level == "bad"
    assert "infinite (planned 0)" in found.details[0]


def test_steps_outside_of_the_run_are_found(plan):
    change(plan, "ours", "branch-v1", lambda row: row | {"step": row["step"] - 3})
    found = verdict(plan)
    assert found.level == "bad"
    assert "3 recorded steps outside of the run" in found.details[1]


def test_steps_without_a_rate_are_not_compared(plan):
    change(plan, "ours", "main", lambda row: row | {"lr": None})
    found = verdict(plan)
    assert found.level == "good"
    assert f"{plan.run('ours', 'main').steps:,}" not in found.headline


def test_nothing_recorded_is_no_success(tmp_path):
    plan = write_plan(tmp_path)
    (tmp_path / "runs").mkdir()
    assert verdict(plan).level == "none"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("variant", ["reset-max", "rewarm-max", "keep-min"])
def test_every_schedule_and_variant_is_compared_with_its_own_path(tmp_path, style, variant):
    plan = write_plan(tmp_path, versions=2, steps=30, warmup=5, style=style)
    plan.path.write_text(plan.path.read_text().replace("reset-max", variant))
    plan = load_plan(plan.path)
    write_tree(plan, evaluate=False)
    assert verdict(plan).level == "good"


@settings(deadline=None, max_examples=30)
@given(step=st.integers(1, 60), factor=st.sampled_from([1 - 1e-6, 1 + 1e-6, 0.5, 2.0]))
def test_any_single_step_with_another_rate_is_found(tmp_path_factory, step, factor):
    folder = tmp_path_factory.mktemp("plan")
    plan = write_plan(folder, versions=1)
    write_tree(plan, evaluate=False)
    wrong = {step: factor}
    change(plan, "ptfs", "scratch-v1", lambda row: row | {"lr": row["lr"] * wrong.get(row["step"], 1)})
    expected = "good" if step == 1 else "bad"  # the first step's rate is 0, as is any multiple of it
    assert verdict(plan).level == expected

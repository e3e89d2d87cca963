"""alpha above 1: a branch that begins before its version's data, its effect on the plan, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lrpath.cli import main
from megatron_lrpath.errors import PlanError
from megatron_lrpath.plan import differences, run_identity
from tests.support.plan_text import plan_with, versions

V1, V2, V3 = versions(3)


def test_a_long_branch_begins_before_its_data(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, versions=[V1, V2 | {"alpha": 1.5}, V3 | {"alpha": 2.3}])
    spans = {run.name: (run.first_step, run.last_step, run.slices) for run in plan.runs("ours")}
    assert spans == {
        "main": (0, 70, ("v1",)),
        "branch-v1": (40, 100, ("v1",)),
        "branch-v2": (50, 200, ("v1", "v2")),
        "branch-v3": (70, 300, ("v1", "v2", "v3")),
    }
    assert plan.main.keep_steps == (40, 50, 70)
    assert plan.cost("ours").steps == 70 + 60 + 150 + 230


def test_an_alpha_of_one_reads_its_own_data_alone(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, versions=[V1, V2 | {"alpha": 1}])
    assert plan.run("ours", "branch-v2").slices == ("v2",)
    assert plan.main.slices == ("v1",)


def test_the_cost_counts_the_main_path_to_its_furthest_branch_point(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, versions=[V1, V2, V3 | {"alpha": 2.0}])
    assert plan.timeline.branch_points == [40, 140, 100]
    assert plan.cost("ours").steps == 140 + 60 + 60 + 200


def test_a_long_branch_that_is_appended_changes_nothing_before_it(tmp_path: Path) -> None:
    before = plan_with(tmp_path, versions=[V1, V2])
    after = plan_with(tmp_path, versions=[V1, V2, V3 | {"alpha": 1.6}])
    assert after.run("ours", "branch-v3").first_step == before.main.last_step  # kept in any case
    for run in before.runs("ours"):
        same = after.run("ours", run.name)
        assert differences(run_identity(before, run), run_identity(after, same)) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"versions": [V1 | {"alpha": 1.1}, V2]}, "first version's alpha may be at most 1"),
        ({"alpha": 1.1}, "alpha: .*1.1"),
        ({"versions": [V1, V2 | {"alpha": 1.9}]}, "step 10, inside its warm-up"),
        ({"versions": [V1, V2 | {"alpha": 6}]}, "last 600 steps, more than the 200 up to its end"),
        (
            {"versions": [V1, V2 | {"max_lr": 5e-4, "alpha": 1.2}]},
            "at step 80, before it has the rate 0.0005 of v2 .at step 120.; give a smaller alpha",
        ),
        (
            {"versions": [V1, V2 | {"max_lr": 5e-4, "rate_steps": 30}, V3 | {"alpha": 1.8}]},
            "branch-v3 would leave the main path at step 120, before it has the rate 0.0005 of v2 .at step 130.",
        ),
    ],
)
def test_impossible_rates_of_versions_are_refused(tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        plan_with(tmp_path, **changes)


def test_the_plan_command_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_with(tmp_path, versions=[V1, V2 | {"alpha": 1.5}])
    assert main(["plan", str(plan.path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "branch-v2 main 51 200 150" in said

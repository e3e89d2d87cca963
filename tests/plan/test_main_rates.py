"""Own rates for versions, and a falling main path: their effect on each paradigm, and identities."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_lrpath.cli import main
from megatron_lrpath.errors import PlanError
from megatron_lrpath.paradigms import CPT_VARIANTS
from megatron_lrpath.plan import PARADIGMS, Plan, differences, run_identity
from megatron_lrpath.plan.identity import reached
from tests.support.plan_text import plan_with

V1 = {"name": "v1", "steps": 100}
V2 = {"name": "v2", "steps": 100, "max_lr": 5e-4, "rate_steps": 30}
V3 = {"name": "v3", "steps": 100}
V4 = {"name": "v4", "steps": 100, "max_lr": 2e-3}
FALLING = {"main": {"power": 0.5, "from": 50}}


def identities(plan: Plan) -> dict[str, dict[str, Any]]:
    runs = [run for paradigm in PARADIGMS for run in plan.runs(paradigm)]
    return {run.key: json.loads(json.dumps(run_identity(plan, run))) for run in runs}


def begins(plan: Plan, paradigm: str) -> list[float]:
    """Return the highest rate of each run's own steps."""
    return [
        max(run.path.lr_at(step) for step in range(run.first_step, run.last_step))
        for run in plan.runs(paradigm)
        if run.makes_version
    ]


def test_every_paradigm_takes_a_versions_rate(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, versions=[V1, V2, V3, V4])
    path = plan.main.path
    assert [path.lr_at(step) for step in (100, 115, 130, 300, 310, 320)] == [
        1e-3,
        7.5e-4,
        5e-4,
        5e-4,
        1.25e-3,
        2e-3,
    ]
    for paradigm in PARADIGMS:
        assert begins(plan, paradigm) == [1e-3, 5e-4, 5e-4, 2e-3], paradigm
        assert {run.path.lr_at(run.path.end) for run in plan.runs(paradigm) if run.makes_version} == {1e-4}


def test_a_falling_main_path_concerns_its_branches_alone(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, versions=[V1, V3], schedule=FALLING)
    points = plan.timeline.branch_points
    assert begins(plan, "ours") == [plan.main.path.lr_at(point) for point in points]
    assert begins(plan, "ours")[1] == 1e-3 * (50 / 140) ** 0.5
    assert begins(plan, "ptfs") == begins(plan, "cpt") == [1e-3, 1e-3]


@pytest.mark.parametrize("schedule", [{}, FALLING])
@pytest.mark.parametrize("variant", CPT_VARIANTS)
def test_appended_versions_change_nothing_before_them(tmp_path: Path, schedule: dict, variant: str) -> None:
    shorter, longer = ([V1, V2], [V1, V2, V4]) if not schedule else ([V1], [V1, V3])
    before = identities(plan_with(tmp_path, versions=shorter, schedule=schedule, cpt_variant=variant))
    after = identities(plan_with(tmp_path, versions=longer, schedule=schedule, cpt_variant=variant))
    for name, identity in before.items():
        assert differences(identity, after[name]) == [], name
        assert name == "ours/main" or identity == after[name]


@pytest.mark.parametrize(
    ("changed", "run", "said"),
    [
        ([V1, V2 | {"max_lr": 6e-4}, V3], "ours/main", "v2 with 100 steps at 0.0005, reached in 30, is v2"),
        ([V1, V2 | {"rate_steps": 20}, V3], "ours/branch-v3", "at 0.0005, reached in 20"),
        ([V1, V2 | {"max_lr": 6e-4}, V3], "ptfs/scratch-v3", "scratch-v3.peak: was 0.0005, is 0.0006"),
        ([V1, V2 | {"max_lr": 6e-4}, V3], "cpt/continual-v3", "continual-v2.peak: was 0.0005, is 0.0006"),
        ([V1, V3 | {"name": "v2"}, V3], "ours/main", "is v2 with 100 steps"),
    ],
)
def test_a_changed_rate_is_reported(tmp_path: Path, changed: list, run: str, said: str) -> None:
    before = identities(plan_with(tmp_path, versions=[V1, V2, V3]))
    after = identities(plan_with(tmp_path, versions=changed))
    assert any(said in line for line in differences(before[run], after[run]))
    assert differences(before["ours/branch-v1"], after["ours/branch-v1"]) == []
    assert differences(before["ptfs/scratch-v1"], after["ptfs/scratch-v1"]) == []


def test_a_changed_fall_is_reported(tmp_path: Path) -> None:
    before = identities(plan_with(tmp_path, schedule=FALLING))
    after = identities(plan_with(tmp_path, schedule={"main": {"power": 0.6, "from": 50}}))
    for name in ("ours/main", "ours/branch-v1"):
        assert "learning rate of main.power: was 0.5, is 0.6" in differences(before[name], after[name])
    assert {name for name in before if before[name] != after[name]} == {
        "ours/main",
        "ours/branch-v1",
        "ours/branch-v2",
    }


def test_what_binds_a_main_path_is_the_rates_that_it_has_come_to(tmp_path: Path) -> None:
    stored = identities(plan_with(tmp_path, versions=[V1, V2, V3]))["ours/main"]
    other = identities(plan_with(tmp_path, versions=[V1, V2 | {"max_lr": 6e-4}, V3]))["ours/main"]
    longer = identities(plan_with(tmp_path, versions=[V1, V2 | {"steps": 120}, V3]))["ours/main"]
    assert differences(reached(stored, other, 100), other) == []
    assert differences(reached(stored, other, 101), other) != []
    assert differences(reached(stored, longer, 101), longer) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"versions": [V1 | {"max_lr": 1e-3}, V3]},
            r"versions\[0\].max_lr: the first version's rate is schedule.max_lr",
        ),
        ({"versions": [V1, V3 | {"rate_steps": 5}]}, r"versions\[1\].rate_steps: v3 has no max_lr"),
        ({"versions": [V1, V2 | {"max_lr": 5e-5}]}, "below min_lr"),
        ({"versions": [V1, V2], "schedule": FALLING}, "falls by schedule.main"),
        ({"versions": [V1, V2 | {"rate_steps": 41}]}, "rate_steps of at most 40"),
        (
            {"versions": [V1, V2 | {"alpha": 1.0}]},
            "leave the main path at step 100, before it has the rate 0.0005",
        ),
        (
            {"schedule": {"main": {"power": 0.5, "from": 10}}},
            r"schedule.main.from: step 10 lies inside the warm-up",
        ),
        ({"schedule": {"main": {"power": 0.5}}}, "the key 'from' is missing"),
        ({"schedule": {"main": {"power": 0, "from": 50}}}, "above 0"),
    ],
)
def test_unsuitable_main_rates_are_refused(tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        plan_with(tmp_path, **changes)


def test_plan_and_lr_print_the_changed_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_with(tmp_path, versions=[V1, V2, V4 | {"name": "v3"}])
    assert main(["plan", str(plan.path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "main path at 0.0005 from v2 on (over 30 steps), 0.002 from v3 on (over 20 steps)" in said
    assert "0.0005 → 0.0001" in said
    assert main(["lr", str(plan.path), "--run", "main"]) == 0
    text = capsys.readouterr().out
    rates = dict(re.findall(r"(\d+)\W+(\d\.\d+e-\d+)", text))
    assert (rates["101"], rates["131"], rates["221"]) == ("1.000000e-03", "5.000000e-04", "2.000000e-03")
    assert main(["advise", str(plan.path)]) == 2
    assert "does not hold across maximum rates" in capsys.readouterr().err

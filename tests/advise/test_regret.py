"""Regret: the branches that the predictions choose, compared with the best measured ones at the same cost."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_lrpath.advise.regret import Tried, lowest, plan_regret, regret
from megatron_lrpath.cli import main
from megatron_lrpath.plan import Plan
from tests.support.advise_fixtures import small_plan, write_losses


def test_nothing_that_fits_is_lower(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    columns = [
        [
            Tried(f"{n}", int(rng.integers(1, 50)), float(rng.uniform(2, 3)), float(rng.uniform(2, 3)))
            for n in range(5)
        ]
        for _ in range(3)
    ]
    for limit in (10, 40, 80, 150):
        fitting = [taken for taken in itertools.product(*columns) if sum(one.steps for one in taken) <= limit]
        found = lowest(columns, limit, lambda one: one.measured)
        if not fitting:
            assert found is None
            continue
        assert found == min(fitting, key=lambda taken: sum(one.measured for one in taken))
        pair = regret(columns, limit)
        assert pair is not None
        assert pair[0] == min(fitting, key=lambda taken: sum(one.predicted for one in taken))
        assert pair[1] == found


def tried(plan: Plan) -> dict[int, list[Tried]]:
    """Return two branches of version 2, where the predictions prefer the worse one, and one of version 3."""
    short, long = Tried("short", 100, 2.50, 2.40), Tried("long", 300, 2.45, 2.42)
    return {1: [short, long], 2: [Tried("only", 200, 2.3, 2.3)]}


@pytest.mark.parametrize(("cost", "value"), [(1.0, np.expm1(0.01)), (0.57, 0.0)])
def test_the_regret_of_a_plan(tmp_path: Path, cost: float, value: float) -> None:
    """The cost of v1 and the last version is 1600 + 240 + 0 of 4000 steps; v2 adds 100 or 300, v3 200."""
    found = plan_regret(small_plan(tmp_path), tried(small_plan(tmp_path)), cost)
    assert found is not None
    assert found.value == pytest.approx(value)
    assert [one.name for one in found.best] == ["short", "only"]


def test_there_is_none_without_a_choice_or_at_a_cost_that_nothing_meets(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    assert plan_regret(plan, {}, 1.0) is None
    assert plan_regret(plan, {1: tried(plan)[1][:1]}, 1.0) is None
    assert plan_regret(plan, {0: tried(plan)[1]}, 1.0) is None  # the first version is not compared
    assert plan_regret(plan, tried(plan), 0.5) is None


def test_advice_on_held_out_branches_reports_its_regret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, other = small_plan(tmp_path), small_plan(tmp_path, alpha=0.3, name="other")
    for one in (plan, other):
        write_losses(one)
    argv = ["advise", str(plan.path), "--with", str(other.path), "--budget", "0.58"]
    assert main([*argv, "--fit-on", "v1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["regret"]
    assert found["relative_cost"] == 0.58
    assert found["chosen"] == ["branch-v2", "branch-v3", "branch-v4"]
    assert 0 <= found["regret"] < 0.003
    assert main([*argv, "--fit-on", "v1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Regret: of the measured branches, for at most 0.580 of PTFS, they take branch-v2" in said
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["regret"] is None

"""An alpha for each version: no other choice of the same budget is better; trained versions keep theirs."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_lrpath.advise.advice import upto_version
from megatron_lrpath.advise.apply import apply_alphas
from megatron_lrpath.advise.by_version import Allocation, Option, allocate, cheapest_sums, trained_versions
from megatron_lrpath.advise.model import Model, build_model
from megatron_lrpath.advise.predict import ALPHAS
from megatron_lrpath.advise.read import read_curves, scale_of
from megatron_lrpath.cli import main
from megatron_lrpath.errors import UserError
from megatron_lrpath.paradigms import BRANCH
from megatron_lrpath.plan import Plan, load_plan
from tests.support.advise_fixtures import small_plan, true_losses, write_losses
from tests.support.columns import check_80_columns, require_80_columns


@pytest.fixture(scope="module")
def model(trained: Plan) -> Model:
    return build_model(read_curves(trained), scale_of(trained), 10)


def chosen(
    plan: Plan, model: Model, budget: float | None = None, within: float | None = None, **limits: float
) -> Allocation:
    found = allocate(plan, model, ALPHAS, within, budget, limits)
    assert found is not None
    return found


def true_mean(folder: Path, alphas: dict[str, float]) -> float:
    """Return the mean final loss of versions 2 to 4 by the law itself, each version with its own alpha."""
    losses = []
    plan = small_plan(folder)
    for name, alpha in [*alphas.items()][1:]:
        own = replace(plan, versions=tuple(replace(one, alpha=alpha) for one in plan.versions))
        run = next(run for run in own.runs("ours") if run.kind == BRANCH.name and run.version == name)
        losses.append(true_losses(own, run)[-1])
    return float(np.mean(losses))


@pytest.mark.parametrize("budget", [0.45, 0.5, 0.55])
def test_a_budget_is_kept_and_buys_more_than_one_alpha(
    trained: Plan, model: Model, tmp_path: Path, budget: float
) -> None:
    found = chosen(trained, model, budget)
    assert found.cost <= budget + 1e-9
    branches = [round(alpha * 400) for alpha in found.alphas.values()]
    assert found.cost == pytest.approx((1600 + sum(branches[:-1])) / 4000)
    assert found.due_next == branches[-1]
    # One alpha for all at the same cost: (1600 + 3·400·alpha) / 4000.
    one = int((budget * 4000 - 1600) / 1200 / 0.05) * 0.05
    alike = true_mean(tmp_path, {f"v{number}": round(one, 2) for number in (1, 2, 3, 4)})
    assert true_mean(tmp_path, found.alphas) < alike


def test_no_other_choice_is_better(trained: Plan) -> None:
    """The choice is compared with all combinations of a few random options, of unrelated lengths."""
    rng = np.random.default_rng(7)
    plan = trained
    columns = [
        [
            Option(0.1 * n, int(rng.integers(1, 400)), np.array([float(rng.uniform(2, 3))]))
            for n in range(1, 6)
        ]
        for _ in plan.versions
    ]
    sums = cheapest_sums(plan, columns)
    part = max(1, sum(plan.timeline.ends) // 2000)
    for picks in itertools.product(range(5), repeat=4):
        options = [column[pick] for column, pick in zip(columns, picks, strict=True)]
        steps = sum(one.steps for one in options[:-1])
        loss = sum(one.loss for one in options[1:])
        assert any(known[0] <= steps + 4 * part and known[1] <= loss + 1e-12 for known in sums)


def test_the_last_versions_branch_is_free_and_longest(trained: Plan, model: Model) -> None:
    alphas = list(chosen(trained, model, 0.5).alphas.values())
    assert alphas[-1] == max(alphas)


def test_within_takes_the_least_cost(trained: Plan, model: Model) -> None:
    near, best = chosen(trained, model, within=0.01), chosen(trained, model, within=0.0)
    assert near.cost < best.cost
    assert np.expm1(near.loss - best.loss) <= 0.01 + 1e-12


def test_a_limit_keeps_a_version_from_paying_for_the_others(trained: Plan, model: Model) -> None:
    free = chosen(trained, model, 0.5)
    kept = chosen(trained, model, 0.5, v2=0.0003)
    assert kept.alphas["v2"] > free.alphas["v2"]
    assert kept.cost <= 0.5 + 1e-9
    assert (
        chosen(trained, model, 0.5, v1=0.5).alphas["v1"] < chosen(trained, model, 0.5, v1=0.0001).alphas["v1"]
    )


def test_targets_that_no_alphas_meet(trained: Plan, model: Model) -> None:
    assert allocate(trained, model, ALPHAS, None, 0.2, {}) is None
    with pytest.raises(UserError, match="no version 'v9'"):
        allocate(trained, model, ALPHAS, None, 0.5, {"v9": 0.1})


def has_trained(plan: Plan, name: str) -> None:
    """Write the result of a version's branch."""
    (plan.folder(plan.run("ours", f"branch-{name}")) / "result.json").write_text("{}")


def test_trained_versions_keep_their_alpha(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    write_losses(plan)
    fitted = build_model(read_curves(plan), scale_of(plan), 5)
    for name in ("v1", "v2"):
        has_trained(plan, name)
    assert trained_versions(plan) == ("v1", "v2")
    found = chosen(plan, fitted, 0.55)
    assert (found.alphas["v1"], found.alphas["v2"]) == (0.6, 0.6)
    assert found.kept == ("v1", "v2")
    assert found.applies
    assert set(found.changes) <= {"v3", "v4"}
    for name in ("v3", "v4"):
        has_trained(plan, name)
    fresh = chosen(plan, fitted, 0.55)
    assert not fresh.applies
    assert fresh.kept == ()
    assert fresh.alphas["v2"] != 0.6


def test_a_version_keeps_the_alpha_that_its_plan_gives_it_alone(trained: Plan, model: Model) -> None:
    own = replace(trained, versions=(replace(trained.versions[0], alpha=0.37), *trained.versions[1:]))
    assert chosen(own, model, 0.5, v1=1e-9).alphas["v1"] in {0.37, *ALPHAS}


def test_the_command_names_the_alphas(
    trained: Plan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = load_plan(trained.path)
    assert main(["advise", str(plan.path), "--json", "--budget", "0.5", "--max-loss", "v1=2%"]) == 0
    found = json.loads(capsys.readouterr().out)["chosen"]
    assert set(found["alphas"]) == {"v1", "v2", "v3", "v4"}
    assert found["relative_cost"] <= 0.5
    assert all(low <= middle <= high for low, middle, high in found["losses"].values())
    require_80_columns(monkeypatch)
    assert main(["advise", str(plan.path), "--budget", "0.5"]) == 0
    said = check_80_columns(capsys.readouterr().out, plan.path.parent)
    assert "An alpha for each version" in said
    assert "once a further version is appended" in " ".join(said.split())
    assert said.splitlines()[-1].startswith("next: ")


def test_where_limits_forbid_alphas_by_version_one_alpha_for_all_is_given(
    trained: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    """The budget leaves v2 no alpha within its limit; one alpha for all has no limit."""
    assert main(["advise", str(trained.path), "--budget", "0.45", "--max-loss", "v2=0.001%"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "No alphas by version give the lowest loss at a cost of at most 0.45 within their limits" in text
    assert "One alpha for all versions: alpha=" in text


def applicable(folder: Path) -> tuple[Plan, str]:
    """Return a plan whose v1 and v2 are trained and that no process trains now, and the text of its file."""
    plan = small_plan(folder)
    write_losses(plan)
    for run in plan.runs("ours"):
        os.utime(plan.folder(run) / "history.jsonl", (1, 1))  # a recent file counts as a running training
    for name in ("v1", "v2"):
        has_trained(plan, name)
    for name in ("v3", "v4"):
        (plan.folder(plan.run("ours", f"branch-{name}")) / "history.jsonl").unlink()
    text = "# ours\n" + plan.path.read_text().replace("output:", "# where\noutput:")
    plan.path.write_text(text)
    return plan, text


def test_apply_puts_the_advice_into_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, text = applicable(tmp_path)
    argv = ["advise", str(plan.path), "--budget", "0.55", "--json"]
    assert main([*argv, "--apply"]) == 0
    found = json.loads(capsys.readouterr().out)["chosen"]
    made = load_plan(plan.path)
    assert found["changes"]
    assert [one.alpha or made.alpha for one in made.versions] == list(found["alphas"].values())
    assert [one.alpha for one in made.versions[:2]] == [None, None]
    kept = [line for line in plan.path.read_text().splitlines() if "alpha: " not in line or "0.6" in line]
    assert kept == text.splitlines()
    assert made.cost("ours").relative == pytest.approx(found["relative_cost"])
    written = plan.path.read_text()
    assert main([*argv, "--apply"]) == 0
    assert "these alphas already" in capsys.readouterr().err
    assert plan.path.read_text() == written


@pytest.mark.parametrize("case", ["trained", "training", "fit-on", "no target"])
def test_apply_changes_nothing_where_it_may_not(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, text = applicable(tmp_path)
    argv = ["advise", str(plan.path), "--apply", "--budget", "0.1" if case == "no target" else "0.55"]
    if case == "trained":
        for name in ("v3", "v4"):
            has_trained(plan, name)
    if case == "training":
        os.utime(plan.folder(plan.main) / "history.jsonl")
    if case == "fit-on":
        argv += ["--fit-on", "v1"]
    assert main(argv) == (1 if case == "no target" else 2)
    said = capsys.readouterr()
    assert {
        "trained": "all versions are trained",
        "training": "ours/main is being trained",
        "fit-on": "--fit-on",
    }.get(case, "") in said.err
    assert plan.path.read_text() == text


def test_apply_leaves_a_plan_that_changed_meanwhile(tmp_path: Path) -> None:
    plan, text = applicable(tmp_path)
    changed = text.replace("alpha: 0.6", "alpha: 0.7")
    plan.path.write_text(changed)
    with pytest.raises(UserError, match="have changed since"):
        apply_alphas(plan, {"v3": 0.4})
    plan.path.write_text(text)
    with pytest.raises(UserError, match="have changed since"):
        apply_alphas(plan, {"v2": 0.4})
    assert plan.path.read_text() == text


def test_long_branches_are_offered_as_far_as_the_main_path_has_come(trained: Plan, model: Model) -> None:
    """The first version has none, and no branch leaves the main path before that of the previous version."""
    longest = allocate(trained, model, ALPHAS, None, None, {}, allow_long=True)
    assert longest is not None
    steps = [round(alpha * 400) for alpha in longest.alphas.values()]
    points = [400 * number - own for number, own in enumerate(steps, start=1)]
    assert longest.alphas["v1"] <= 1
    assert longest.alphas["v4"] > 1
    assert points == sorted(points)
    assert longest.cost == pytest.approx((points[-1] + sum(steps)) / 4000)
    without = chosen(trained, model, longest.cost)
    assert max(without.alphas.values()) <= 1
    assert longest.loss < without.loss


def test_no_other_choice_of_long_branches_is_better(trained: Plan) -> None:
    rng = np.random.default_rng(5)
    alphas = (0.3, 0.9, 1.4, 2.0)
    columns = [
        [Option(alpha, round(400 * alpha), np.array([float(rng.uniform(2, 3))])) for alpha in alphas[:count]]
        for count in (2, 3, 4, 4)
    ]
    allowed = []
    for options in itertools.product(*columns):
        points = [400 * number - one.steps for number, one in enumerate(options, start=1)]
        if all(
            one.alpha <= 1 or point >= before
            for one, point, before in zip(options[1:], points[1:], points, strict=False)
        ):
            allowed.append((sum(one.steps for one in options[:-1]), sum(one.loss for one in options[1:])))
    sums = cheapest_sums(trained, columns)
    for steps, loss in allowed:
        assert any(one[0] <= steps and one[1] <= loss + 1e-12 for one in sums)
    assert all(
        any(one[0] == steps and one[1] == pytest.approx(loss) for steps, loss in allowed) for one in sums
    )


def test_the_command_offers_and_applies_long_branches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, _ = applicable(tmp_path)
    argv = ["advise", str(plan.path), "--within", "0.01%", "--json"]
    assert main([*argv, "--allow-long", "--apply"]) == 0
    found = json.loads(capsys.readouterr().out)["chosen"]
    assert max(found["alphas"].values()) > 1
    changed = load_plan(plan.path)
    assert {one.name: one.alpha or changed.alpha for one in changed.versions} == found["alphas"]
    assert changed.cost("ours").relative == pytest.approx(found["relative_cost"])
    assert main(argv) == 0


def test_a_long_branch_of_a_later_version_is_not_seen_before_it(tmp_path: Path) -> None:
    """The branch begins in the first version's steps, but did not exist when that version ended."""
    plan = small_plan(tmp_path)
    content = yaml.safe_load(plan.path.read_text())
    content["versions"][1]["alpha"] = 1.5
    plan.path.write_text(yaml.safe_dump(content))
    plan = load_plan(plan.path)
    write_losses(plan)
    seen = upto_version(plan, read_curves(plan), "v1")
    assert [curve.name for curve in seen] == ["main", "branch-v1"]

"""The runs that follow from a plan: the paper's costs, the start of each run, its data and its rate."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lrpath.errors import PlanError, UserError
from megatron_lrpath.plan import PARADIGMS, differences, run_identity
from megatron_lrpath.plan.runs import Timeline
from megatron_lrpath.plan.spec import Parent, Version
from megatron_lrpath.schedule import LRPath, Schedule
from tests.support.plan_text import plan_with, versions

PAPER = {"style": "cosine", "max_lr": 3e-4, "min_lr": 3e-5, "warmup_steps": 2000}


@pytest.fixture
def paper(tmp_path: Path):
    return plan_with(tmp_path, schedule=PAPER, versions=versions(4, 10_000), alpha=0.6)


@pytest.mark.parametrize(
    ("count", "costs"),
    [
        (4, {"ptfs": 100_000, "cpt": 40_000, "ours": 58_000}),
        (10, {"ptfs": 550_000, "cpt": 100_000, "ours": 154_000}),
    ],
)
def test_costs_are_the_papers(tmp_path: Path, count: int, costs: dict[str, int]) -> None:
    plan = plan_with(tmp_path, schedule=PAPER, versions=versions(count, 10_000), alpha=0.6)
    assert {paradigm: plan.cost(paradigm).steps for paradigm in PARADIGMS} == costs
    assert plan.cost("ours").relative == costs["ours"] / costs["ptfs"]
    assert plan.cost("ptfs").relative == 1.0
    assert plan.cost("ours").tokens == costs["ours"] * 32 * 256


@pytest.mark.parametrize(("alpha", "relative"), [(0.2, 0.46), (0.4, 0.52), (0.6, 0.58), (0.8, 0.64)])
def test_costs_follow_the_papers_formula_for_alpha(tmp_path: Path, alpha: float, relative: float) -> None:
    plan = plan_with(tmp_path, schedule=PAPER, versions=versions(4, 10_000), alpha=alpha)
    assert plan.cost("ours").relative == pytest.approx(relative, abs=1e-12)


def test_the_main_path_ends_where_the_last_branch_leaves(paper) -> None:
    main = paper.run("ours", "main")
    assert (main.parent, main.first_step, main.last_step, main.steps) == (None, 0, 34_000, 34_000)
    assert main.path == LRPath(paper.schedule, "plateau", 0, 34_000, warmup=2000)
    assert main.slices == ("v1", "v2", "v3", "v4")
    assert (main.version, main.version_index) == ("v4", 4)


def test_the_main_path_keeps_branch_points_and_version_ends(paper) -> None:
    assert paper.run("ours", "main").keep_steps == (4000, 10_000, 14_000, 20_000, 24_000, 30_000, 34_000)


def test_a_branch_leaves_the_main_path_and_ends_with_its_version(paper) -> None:
    branch = paper.run("ours", "branch-v2")
    assert (branch.kind, branch.version, branch.version_index) == ("branch", "v2", 2)
    assert branch.parent == Parent("main", 14_000)
    assert (branch.first_step, branch.last_step, branch.steps) == (14_000, 20_000, 6000)
    assert branch.path == LRPath(paper.schedule, "branch", 14_000, 20_000)
    assert branch.slices == ("v2",)


def test_scratch_runs_read_all_versions_so_far(paper) -> None:
    run = paper.run("ptfs", "scratch-v3")
    assert (run.parent, run.first_step, run.last_step) == (None, 0, 30_000)
    assert run.path == LRPath(paper.schedule, "whole", 0, 30_000, warmup=2000)
    assert run.slices == ("v1", "v2", "v3")


def test_continual_runs_form_a_chain(paper) -> None:
    first, *others = paper.runs("cpt")
    assert (first.parent, first.path) == (None, paper.run("ptfs", "scratch-v1").path)
    assert first.same_as == ("ptfs", "scratch-v1")
    for before, run in zip([first, *others], others, strict=False):
        assert run.parent == Parent(before.name, before.last_step)
        assert before.keep_steps == (before.last_step,)
        assert run.slices == (run.version,)
        assert run.same_as is None


@pytest.mark.parametrize(
    ("variant", "shape", "warmup", "rates"),
    [
        ("reset-max", "whole", 0, [3e-4, 3e-4 - 2.7e-4 / 2]),
        ("rewarm-max", "whole", 2000, [0.0, 3e-4 - 2.7e-4 / 2 * (1 - math.cos(math.pi * 3 / 8))]),
        ("keep-min", "floor", 0, [3e-5, 3e-5]),
    ],
)
def test_cpt_variants(tmp_path: Path, variant: str, shape: str, warmup: int, rates: list[float]) -> None:
    plan = plan_with(tmp_path, schedule=PAPER, versions=versions(4, 10_000), cpt_variant=variant)
    path = plan.run("cpt", "continual-v2").path
    assert (path.shape, path.start, path.end, path.warmup) == (shape, 10_000, 20_000, warmup)
    assert [path.lr_at(10_000), path.lr_at(15_000)] == pytest.approx(rates, rel=1e-12)
    assert plan.run("cpt", "continual-v1").path.shape == "whole"


def test_the_peaks_of_an_autoregressive_cpt_follow_one_schedule_over_all_rounds(tmp_path: Path) -> None:
    schedule = {"style": "cosine", "max_lr": 3e-4, "min_lr": 3e-5, "warmup_steps": 0}
    plan = plan_with(tmp_path, schedule=schedule, versions=versions(4, 10_000), cpt_variant="autoregressive")
    peaks = [run.path.begins_at for run in plan.runs("cpt")]
    exact = [3e-5 + 2.7e-4 * 0.5 * (1 + math.cos(math.pi * done / (done + 1))) for done in range(4)]
    assert peaks == pytest.approx(exact, rel=1e-12)
    assert peaks == sorted(peaks, reverse=True)
    for run in plan.runs("cpt"):
        assert run.path.lr_at(run.last_step) == 3e-5  # each round is a complete decay
    warm = plan_with(tmp_path, schedule=PAPER, versions=versions(3, 10_000), cpt_variant="autoregressive")
    second = warm.run("cpt", "continual-v2").path
    assert (second.warmup, second.lr_at(10_000)) == (2000, 0.0)
    assert second.lr_at(12_000) == warm.run("ptfs", "scratch-v2").path.lr_at(10_000)
    cooler = [{"name": "v1", "steps": 10_000}, {"name": "v2", "steps": 10_000, "max_lr": 1e-4}]
    plan = plan_with(tmp_path, schedule=schedule, versions=cooler, cpt_variant="autoregressive")
    assert plan.run("cpt", "continual-v2").path.begins_at == pytest.approx(6.5e-5, rel=1e-12)


def test_versions_differ_in_length_and_alpha(tmp_path: Path) -> None:
    plan = plan_with(
        tmp_path,
        versions=[
            {"name": "v1", "steps": 100, "alpha": 0.25},
            {"name": "v2", "steps": 35, "alpha": 0.5},
            {"name": "v3", "steps": 45, "alpha": 1.0},
        ],
    )
    points = [(run.first_step, run.last_step) for run in plan.runs("ours") if run.kind == "branch"]
    assert points == [(75, 100), (117, 135), (135, 180)]  # round(17.5) = 18
    main = plan.run("ours", "main")
    assert main.last_step == 135
    assert main.slices == ("v1", "v2")  # it never reads the last version


def test_cycles_reach_the_runs_they_are_meant_for(tmp_path: Path) -> None:
    plan = plan_with(
        tmp_path,
        versions=[
            {"name": "v1", "steps": 100, "cycle_steps": 300},
            {"name": "v2", "steps": 100, "cycle_steps": {"continual": 150, "branch": "inf"}},
        ],
    )
    cycles = {run.name: run.path.cycle for paradigm in PARADIGMS for run in plan.runs(paradigm)}
    assert cycles == {
        "main": None,
        "branch-v1": 300,
        "branch-v2": math.inf,
        "scratch-v1": 300,
        "scratch-v2": None,
        "continual-v1": 300,
        "continual-v2": 150,
    }


def test_runs_are_in_the_output_by_paradigm(paper) -> None:
    assert paper.folder(paper.run("ours", "branch-v2")) == Path("runs/quickstart/ours/branch-v2")


def test_an_unknown_run_or_paradigm_names_those_there_are(paper) -> None:
    with pytest.raises(UserError, match=r"'branch-v9'.*main, branch-v1, branch-v2"):
        paper.run("ours", "branch-v9")
    with pytest.raises(UserError, match="ours, ptfs, cpt"):
        paper.runs("hours")


lengths = st.lists(st.tuples(st.integers(1, 400), st.floats(0.01, 1.0)), min_size=1, max_size=8)


def timeline(parts: list[tuple[int, float]], variant: str = "reset-max") -> Timeline:
    """Return versions of these steps and alphas, the first long enough for its warm-up and a branch point."""
    first, *others = parts
    made = [Version("v1", first[0] + 60, 0.5)]
    made += [Version(f"v{i}", steps + 100, alpha) for i, (steps, alpha) in enumerate(others, start=2)]
    return Timeline(Schedule("cosine", 1.0, 0.1, 20), 0.6, variant, made)


@given(lengths, st.sampled_from(["reset-max", "rewarm-max", "keep-min"]))
def test_every_parent_comes_first_and_keeps_what_its_children_need(
    parts: list[tuple[int, float]], variant: str
) -> None:
    line = timeline(parts, variant)
    for paradigm in PARADIGMS:
        seen = {}
        for run in line.runs(paradigm):
            assert run.steps > 0
            assert (run.path.start, run.path.end) == (run.first_step, run.last_step)
            if run.parent:
                assert run.parent.step == run.first_step
                assert run.parent.step in seen[run.parent.run].keep_steps
            else:
                assert run.first_step == 0
            seen[run.name] = run


@given(lengths, st.integers(1, 400), st.floats(0.01, 1.0))
def test_appending_a_version_changes_no_earlier_run(
    parts: list[tuple[int, float]], steps: int, alpha: float
) -> None:
    before, after = timeline(parts), timeline([*parts, (steps, alpha)])
    for paradigm in PARADIGMS:
        later = {run.name: run for run in after.runs(paradigm)}
        for run in before.runs(paradigm):
            if run.kind != "main":
                assert later[run.name] == run
                continue
            longer = later["main"]
            assert set(run.keep_steps) <= set(longer.keep_steps)
            assert longer.last_step >= run.last_step
            assert all(longer.path.lr_at(s) == run.path.lr_at(s) for s in range(run.last_step))


def test_the_main_path_serves_branches_of_other_plans_and_costs_no_more(tmp_path: Path) -> None:
    alone = plan_with(tmp_path, alpha=0.6)
    shared = plan_with(tmp_path, alpha=0.6, also_branch_at=[90, 160])
    main = shared.run("ours", "main")
    assert main.keep_steps == (40, 90, 100, 140, 160)
    assert main.last_step == 160
    assert shared.cost("ours") == alone.cost("ours")
    for name in ("main", "branch-v1", "branch-v2"):
        before, after = (run_identity(plan, plan.run("ours", name)) for plan in (alone, shared))
        assert differences(before, after) == []
    with pytest.raises(PlanError, match="step 201 lies beyond the last version's end, step 200"):
        plan_with(tmp_path, also_branch_at=[201])

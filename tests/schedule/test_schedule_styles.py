"""A style is one row: one call adds it, and neither its branch nor one of its knobs can be forgotten."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from megatron_lrpath import cli
from megatron_lrpath.advise.predict import own_decay
from megatron_lrpath.errors import PlanError
from megatron_lrpath.plan import PARADIGMS, json_schema, load_plan, run_identity
from megatron_lrpath.schedule import STYLES, LRPath, Schedule
from megatron_lrpath.schedule.curves import exact_decimal
from megatron_lrpath.schedule.styles import KNOBS, Style, held_rate, register, smooth, with_branch_shape
from megatron_lrpath.training.options.arguments import add_lrpath_arguments
from tests.support.plan_text import plan_with
from tests.support.training_fixtures import history, launch, make_plan, run_words

COMMON = {"style", "max_lr", "min_lr", "warmup"}
OTHER_VALUES: dict[str, Any] = {
    "knee_explore": 0.3,
    "multi_step_fractions": (0.4, 0.6),
    "wsd_decay_fraction": 0.3,
    "wsd_decay_shape": "cosine",
}


def square(u: float) -> float:
    """Return 1 − u²."""
    return 1 - u * u


QUADRATIC = Style(
    "quadratic",
    whole=lambda schedule, at: held_rate(
        schedule, at.t, at.length, exact_decimal(schedule.knee_explore), square
    ),
    branch_shape=lambda schedule: smooth("quadratic", square),
    whole_knobs=("knee_explore",),
    title="Quadratic",
)


@pytest.fixture
def quadratic() -> Iterator[Style]:
    """Register the style for one test."""
    register(QUADRATIC)
    yield QUADRATIC
    del STYLES[QUADRATIC.name]


def train_with_quadratic(argv: list[str]) -> None:
    """Train in a process in which the style is registered."""
    from megatron_lrpath.training.pretrain import main

    register(QUADRATIC)
    main(argv)


def curve(schedule: Schedule, shape: str) -> list[float]:
    """Return all rates of a curve of 40 positions."""
    path = LRPath(schedule, shape, 0, 40, warmup=4 if shape == "whole" else 0)
    return [path.lr_at(position) for position in range(41)]


def test_a_style_added_in_one_call_has_its_whole_curve_and_its_branch(quadratic: Style) -> None:
    schedule = Schedule(quadratic.name, 1.0, 0.0, knee_explore=0.2)
    whole = LRPath(schedule, "whole", 0, 100)
    assert [whole.lr_at(step) for step in (0, 20, 60, 100)] == [1.0, 1.0, 0.75, 0.0]
    branch = LRPath(schedule, "branch", 50, 150)
    assert [branch.lr_at(step) for step in (50, 100, 150)] == [1.0, 0.75, 0.0]
    assert branch.scaled(32).lr_at(100 * 32) == branch.lr_at(100)
    assert LRPath(schedule, "branch", 50, 150, cycle=math.inf).lr_at(150) == 1.0


def test_plan_files_take_an_added_style(quadratic: Style, tmp_path: Path) -> None:
    plan = plan_with(tmp_path, schedule={"style": quadratic.name, "knee_explore": 0.25})
    assert plan.schedule.style == quadratic.name
    assert plan.run("ours", "branch-v1").path.lr_at(70) == pytest.approx(1e-4 + 0.9e-3 * 0.75, rel=1e-12)
    assert quadratic.name in json_schema()["properties"]["schedule"]["properties"]["style"]["enum"]


def test_no_plan_takes_a_style_that_is_not_registered(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="none of cosine, knee"):
        plan_with(tmp_path, schedule={"style": QUADRATIC.name})


def test_arguments_take_an_added_style_and_every_knob(quadratic: Style) -> None:
    argv = ["--lr-path-style", quadratic.name, "--lr-path-knee-explore", "0.25"]
    args = add_lrpath_arguments(argparse.ArgumentParser()).parse_args(argv)
    assert (args.lr_path_style, args.lr_path_knee_explore) == (quadratic.name, 0.25)
    defaults = {name: getattr(args, f"lr_path_{name}") for name in KNOBS if name != "knee_explore"}
    assert Schedule("knee", 1.0, 0.0, knee_explore=0.5, **defaults) == Schedule("knee", 1.0, 0.0)


def test_the_identity_has_an_added_style_and_its_knobs(quadratic: Style, tmp_path: Path) -> None:
    plan = plan_with(tmp_path, schedule={"style": quadratic.name, "knee_explore": 0.25})
    scratch = run_identity(plan, plan.run("ptfs", "scratch-v1"))["path"][-1]
    assert (scratch["style"], scratch["knee_explore"]) == (quadratic.name, 0.25)
    branch = run_identity(plan, plan.run("ours", "branch-v1"))["path"][-1]
    assert branch["style"] == quadratic.name
    assert KNOBS.keys() & branch.keys() == set()


def test_lrpath_lr_prints_the_rates_of_an_added_style(
    quadratic: Style, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_with(tmp_path, schedule={"style": quadratic.name, "min_lr": 0.0})
    assert cli.main(["lr", str(plan.path), "--paradigm", "ours", "--run", "branch-v1", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert dict(zip(answer["steps"], answer["lr"], strict=True))[71] == pytest.approx(0.75e-3, rel=1e-12)


def test_advise_and_merge_support_the_branch_of_an_added_style(quadratic: Style, tmp_path: Path) -> None:
    plan = plan_with(tmp_path, schedule={"style": quadratic.name})
    decay = own_decay(plan)
    assert (decay.shape, decay.schedule(plan).style) == (quadratic.name, quadratic.name)
    assert with_branch_shape(Schedule("wsd", 1.0, 0.0), quadratic.name).style == quadratic.name


def test_a_run_trains_at_the_rates_of_an_added_style(quadratic: Style, tmp_path: Path) -> None:
    schedule = {"style": quadratic.name, "max_lr": 0.01, "min_lr": 0.001, "warmup_steps": 1}
    path = make_plan(tmp_path, (4, 4), schedule=schedule)
    plan = load_plan(path)
    entry = "tests.schedule.test_schedule_styles:train_with_quadratic"
    for name in ("main", "branch-v2"):
        launch(entry, run_words(path, "ours", name)).ok()
        run = plan.run("ours", name)
        planned = [run.path.lr_at(step) for step in range(run.first_step, run.last_step)]
        assert [line["lr"] for line in history(plan.folder(run)) if "lr" in line] == planned


def test_a_row_without_a_branch_shape_is_an_error() -> None:
    required = {item.name for item in dataclasses.fields(Style) if item.default is dataclasses.MISSING}
    assert "branch_shape" in required
    with pytest.raises(TypeError, match="branch_shape"):
        Style("quadratic", whole=lambda schedule, at: 1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="branch_shape"):
        Style("quadratic", whole=lambda schedule, at: 1.0, branch_shape=None)  # type: ignore[arg-type]


def test_a_row_with_an_unknown_knob_is_an_error() -> None:
    with pytest.raises(TypeError, match="no knob of Schedule"):
        dataclasses.replace(QUADRATIC, whole_knobs=("curvature",))


def test_two_rows_of_one_name_are_an_error() -> None:
    with pytest.raises(ValueError, match="already"):
        register(STYLES["cosine"])


@pytest.mark.parametrize("style", STYLES)
def test_every_branch_shape_can_be_asked_for_by_its_name(style: str) -> None:
    schedule = Schedule(style, 1.0, 0.1)
    shape = STYLES[style].branch_shape(schedule).name
    for other in STYLES:
        found = with_branch_shape(Schedule(other, 1.0, 0.1), shape)
        assert curve(found, "branch") == curve(schedule, "branch")


def test_every_field_of_a_schedule_is_common_or_read_by_a_style() -> None:
    read = {knob for row in STYLES.values() for knob in (*row.whole_knobs, *row.branch_knobs)}
    assert {item.name for item in dataclasses.fields(Schedule)} == COMMON | read
    assert set(KNOBS) == read == set(OTHER_VALUES)


@pytest.mark.parametrize("knob", OTHER_VALUES)
@pytest.mark.parametrize("style", STYLES)
def test_a_knob_changes_the_curves_and_identities_of_the_styles_that_read_it_alone(
    style: str, knob: str, tmp_path: Path
) -> None:
    row = STYLES[style]
    before = Schedule(style, 1.0, 0.1, warmup=4)
    after = dataclasses.replace(before, **{knob: OTHER_VALUES[knob]})
    changed = {shape: curve(before, shape) != curve(after, shape) for shape in ("whole", "branch")}
    assert changed == {"whole": knob in row.whole_knobs, "branch": knob in row.branch_knobs}
    value = list(after.multi_step_fractions) if knob == "multi_step_fractions" else OTHER_VALUES[knob]
    first, second = (plan_with(tmp_path, schedule={"style": style} | more) for more in ({}, {knob: value}))
    for run in (run for paradigm in PARADIGMS for run in first.runs(paradigm)):
        same = run_identity(first, run) == run_identity(second, second.run(run.paradigm, run.name))
        # A branch continues from the main path, which reads no knob; the others have whole curves only.
        assert same != changed.get(run.path.shape, False), run.name


@pytest.mark.parametrize("field", ["max_lr", "min_lr", "warmup_steps", "style"])
def test_a_common_field_changes_every_identity_that_depends_on_it(field: str, tmp_path: Path) -> None:
    other = {"max_lr": 2e-3, "min_lr": 2e-4, "warmup_steps": 10, "style": "wsd"}[field]
    first, second = plan_with(tmp_path), plan_with(tmp_path, schedule={field: other})
    for run in (run for paradigm in PARADIGMS for run in first.runs(paradigm)):
        same = run_identity(first, run) == run_identity(second, second.run(run.paradigm, run.name))
        assert same == (run.name == "main" and field in ("min_lr", "style"))


def test_every_position_of_an_added_style_is_exact(quadratic: Style) -> None:
    path = LRPath(Schedule(quadratic.name, 3e-4, 3e-5, knee_explore=0.1), "whole", 0, 1000)
    for step in range(1001):
        assert path.scaled(7).lr_at(step * 7) == path.lr_at(step)
    assert path.lr_at(100) == 3e-4
    assert path.lr_at(float(Fraction(201, 2))) < 3e-4

"""Experiments: a file becomes plans, shared runs are trained once, and the table has the paper's form."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_lrpath.cli import main
from megatron_lrpath.errors import PlanError
from megatron_lrpath.experiment.load import (
    Experiment,
    change,
    is_experiment,
    load_experiment,
    load_together,
    variations,
)
from megatron_lrpath.experiment.run import (
    PointTask,
    carry_out_experiment,
    experiment_tasks,
    shared_tasks,
    write_plans,
)
from megatron_lrpath.experiment.table import make_table, write_table
from megatron_lrpath.launch.local import Options
from megatron_lrpath.plan import load_plan
from megatron_lrpath.runs.tasks import Task
from tests.support import ROOT
from tests.support.launch_fixtures import TRAINER
from tests.support.plan_text import SOUND

PAPER = ROOT / "examples" / "paper"
FILES = sorted(path for path in PAPER.rglob("*.yaml") if is_experiment(path))


def experiment(folder: Path, **keys: Any) -> Experiment:
    """Return an experiment on the valid plan with these keys."""
    (folder / "base.yaml").write_text(SOUND)
    path = folder / "experiment.yaml"
    given = {"name": "try", "plan": "base.yaml", "output": str(folder / "out")} | keys
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return load_experiment(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_experiments_of_the_paper_are_sound(path: Path) -> None:
    assert load_experiment(path).points


def test_there_is_an_experiment_for_every_table_and_figure_at_both_scales() -> None:
    wanted = {f"table-{n}" for n in (2, 5, 6, 7, 8, 10)} | {"tables-1-3", "figure-4", "figure-5"}
    for folder in (PAPER, PAPER / "small"):
        assert wanted <= {path.stem for path in FILES if path.parent == folder}


def test_all_alphas_and_schedules_come_off_one_main_path() -> None:
    tasks = experiment_tasks(load_experiment(PAPER / "table-2.yaml"))
    mains = [task for task in tasks if task.run.kind == "main"]
    assert len(mains) == 1
    assert len(mains[0].aliases) == 11
    assert {task.parent for task in tasks if task.run.kind == "branch"} == {mains[0].key}
    points = {task.parent_step for task in tasks if task.run.kind == "branch"}
    assert points <= set(mains[0].run.keep_steps)
    assert mains[0].run.last_step == max(points)


def test_the_first_version_of_all_variants_of_cpt_is_one_training() -> None:
    tasks = experiment_tasks(load_experiment(PAPER / "table-10.yaml"))
    first = [task for task in tasks if task.run.version == "v1"]
    assert len(first) == 3  # one for each schedule
    assert len(tasks) == 3 + 3 * 3 * 3


def test_files_given_together_share_their_main_path_and_equal_branches() -> None:
    tables, alphas = load_together([PAPER / "small" / f"{name}.yaml" for name in ("tables-1-3", "table-2")])
    tasks = shared_tasks([tables, alphas])
    assert len({task.key for task in tasks}) == len(tasks)
    seeds = len({point.plan.seed for point in tables.points})
    mains = [task for task in tasks if task.run.kind == "main"]
    assert len(mains) == seeds
    assert {task.point.split("/")[0] for task in mains} == {tables.name}
    branches = [task for task in tasks if task.run.kind == "branch"]
    assert {task.parent for task in branches} == {task.key for task in mains}
    assert {task.parent_step for task in branches} <= set(mains[0].run.keep_steps)
    of_alphas = [task for task in branches if task.point.startswith(alphas.name)]
    assert of_alphas
    assert not any("alpha0.6" in task.point for task in of_alphas)  # trained for the other table already


def test_a_plans_own_further_branch_points_are_kept_with_those_of_the_others(tmp_path: Path) -> None:
    made = experiment(tmp_path, set={"also_branch_at": [199]}, vary={"alpha": [0.3, 0.5]}, paradigms=["ours"])
    alone = {step for point in made.points for step in point.plan.run("ours", "main").keep_steps}
    for point in made.points:
        assert set(point.plan.run("ours", "main").keep_steps) == alone
        assert 199 in alone


def test_figure_5_trains_only_the_second_stages() -> None:
    tasks = experiment_tasks(load_experiment(PAPER / "figure-5.yaml"))
    assert sorted(task.run.name for task in tasks) == ["branch-v2"] * 5 + ["main"]


def test_other_data_are_another_training() -> None:
    tasks = experiment_tasks(load_experiment(PAPER / "table-7.yaml"))
    assert len([task for task in tasks if task.run.kind == "main"]) == 3


def test_other_slices_of_the_same_steps_are_another_training(tmp_path: Path) -> None:
    made = experiment(tmp_path, vary={"data.slices": ["data/a", "data/b"]}, paradigms=["ours"])
    assert len([task for task in experiment_tasks(made) if task.run.kind == "main"]) == 2


def test_every_combination_has_a_name_of_its_own() -> None:
    made = variations([{"name": "big", "model": "x"}], {"alpha": [0.2, 0.4], "schedule.style": ["knee"]})
    assert made[0] == ("big_alpha0.2_knee", {"model": "x", "alpha": 0.2, "schedule.style": "knee"})
    assert [name for name, _ in made] == ["big_alpha0.2_knee", "big_alpha0.4_knee"]


def test_keys_reach_into_lists_and_none_takes_away() -> None:
    plan: dict[str, Any] = {"schedule": {"min_lr": 1}, "versions": [{"steps": 1}, {"steps": 1}]}
    change(plan, "versions.steps", 5)
    change(plan, "versions[1].cycle_steps.branch", "inf")
    change(plan, "schedule.min_lr", None)
    assert plan == {
        "schedule": {}, "versions": [{"steps": 5}, {"steps": 5, "cycle_steps": {"branch": "inf"}}]
    }  # fmt: skip
    with pytest.raises(ValueError, match="only 2 entries"):
        change(plan, "versions[2].steps", 1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"vary": {"alpha": [2]}}, "the variation alpha2: .*alpha: must be .* at most 1"),
        ({"vary": {"alpha": 0.5}}, "experiment.yaml:5: vary.alpha: must be a list of values"),
        ({"vary": {"schedule.stile": ["knee"]}}, "unknown key .did you mean 'style'"),
        ({"vary": {"versions[7].steps": [1]}}, "has only 2 entries"),
        ({"points": [{"alpha": 0.5}, {"alpha": 0.5}]}, "two variations are called 'alpha0.5'"),
        ({"paradigms": ["our"]}, "'our' is none of ours"),
        ({"paper": {"nothing": {"ours": [1]}}}, "no such variation"),
        ({"paper": {"plan": {"ours": [1, 2]}}}, "give 1 numbers"),
        ({"paper": {"plan": {"ours": ["low"]}}}, "paper.plan.ours: must be a list of numbers"),
        ({"seeds": 3}, "experiment.yaml:[0-9]+: seeds: must be a list, not"),
        (
            {"set": {"output": "elsewhere"}},
            "set.output: the experiment's `output` gives every variation its output",
        ),
        (
            {"vary": {"seed": [1, 2]}, "seeds": [3, 4]},
            "vary.seed: the experiment's `seeds` gives every variation",
        ),
        ({"seeds": []}, "seeds: give at least one seed"),
        ({"seeds": [1, "two"]}, r"seeds\[1\]: must be a whole number"),
        ({"set": 5}, "experiment.yaml:[0-9]+: set: must be a mapping"),
        ({"set": None}, "set: must be a mapping"),
        ({"plan": "other.yaml"}, "no such plan file"),
        ({"wary": {}}, "unknown key .did you mean 'vary'"),
        ({"vary": {"alpha": [0.3, 0.4, 0.5]}, "seeds": list(range(1, 200))}, "more than the 500"),
    ],
)
def test_errors_in_an_experiment_are_reported(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        experiment(tmp_path, **keys)


def test_the_written_plans_are_the_plans(tmp_path: Path) -> None:
    made = experiment(tmp_path, vary={"alpha": [0.3, 0.6], "versions[0].cycle_steps.scratch": [100, "inf"]})
    write_plans(made)
    for point in made.points:
        assert load_plan(point.plan.path) == point.plan


def fake_command(tasks: Sequence[PointTask]) -> Callable[[Task], Sequence[str]]:
    """Return a function that returns the command of a pretended training."""
    folders = {task.key: task.folder for task in tasks}

    def command_for(task: Task) -> list[str]:
        run, keep = task.run, ",".join(map(str, task.run.keep_steps))
        numbers = [str(run.first_step), str(run.last_step), "50"]
        parent = [f"{folders[task.parent]}/checkpoints/iter_{task.parent_step:07d}"] if task.parent else []
        return [sys.executable, str(TRAINER), str(task.folder), *numbers, keep, "0", *parent]

    return command_for


def test_what_is_shared_is_trained_once_and_linked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"vary": {"schedule.style": ["cosine", "knee"], "alpha": [0.3, 0.6]}, "paradigms": ["ours"]}
    made = experiment(tmp_path, **keys)
    options = Options(jobs=2, device="cpu", evaluate=False, grace=3.0)
    command = fake_command(experiment_tasks(made))
    assert carry_out_experiment(made, options, command) == 0
    owner, *others = [point.plan.folder(point.plan.run("ours", "main")) for point in made.points]
    assert not owner.is_symlink()
    for other in others:
        assert other.is_symlink()
        assert not other.readlink().is_absolute()
        assert other.resolve() == owner.resolve()
    assert len((owner / "started").read_text().splitlines()) == 1
    for point in made.points:
        for run in point.plan.runs("ours"):
            assert (point.plan.folder(run) / "result.json").is_file()
    assert carry_out_experiment(made, options, command) == 0
    assert len((owner / "started").read_text().splitlines()) == 1
    assert "9 trainings, 0 to do" in capsys.readouterr().out


def evaluate(made: Experiment, group: str, perplexities: Sequence[float]) -> None:
    """Write results of the branch of v2, one for each seed."""
    for point, perplexity in zip(made.of(group), perplexities, strict=True):
        folder = point.plan.folder(point.plan.run("ours", "branch-v2"))
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"step": 200}))
        (folder / "eval.json").write_text(json.dumps({"step": 200, "perplexity": perplexity}))


def test_the_table_has_means_deviations_and_the_papers_numbers(tmp_path: Path) -> None:
    made = experiment(
        tmp_path,
        vary={"alpha": [0.4, 0.6]},
        seeds=[1, 2],
        paradigms=["ours"],
        paper={"alpha0.6": {"ours": [20.13]}},
    )
    evaluate(made, "alpha0.6", [20.0, 20.5])
    table = make_table(made)
    assert table.header == ["variation", "paradigm", "cost", "v2", "paper v2"]
    assert table.cells() == [
        ["alpha0.4", "Ours", "0.80", "–", "–"],
        ["alpha0.6", "Ours", "0.87", "20.25 ±0.35", "20.13"],
    ]
    assert (table.known, table.wanted) == (2, 4)
    page = write_table(table, tmp_path / "report")
    assert "| alpha0.6 | Ours | 0.87 | 20.25 ±0.35 | 20.13 |" in page.read_text()
    assert "2 of 4 perplexities" in page.read_text()
    lines = (tmp_path / "report" / "table.csv").read_text().splitlines()
    assert lines[1].startswith("alpha0.6_seed1,1,alpha0.6,ours,0.8")
    assert len(lines) == 3


def test_a_stale_evaluation_is_not_in_the_table(tmp_path: Path) -> None:
    made = experiment(tmp_path, vary={"alpha": [0.6]}, paradigms=["ours"])
    evaluate(made, "alpha0.6", [20.0])
    folder = made.points[0].plan.folder(made.points[0].plan.run("ours", "branch-v2"))
    (folder / "eval.json").write_text(json.dumps({"step": 150, "perplexity": 20.0}))
    assert make_table(made).known == 0


def test_the_commands_take_an_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = experiment(tmp_path, vary={"alpha": [0.4, 0.6]}, paradigms=["ours"])
    assert main(["experiment", str(made.path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [point["name"] for point in said["points"]] == ["alpha0.4", "alpha0.6"]
    assert said["total_steps"] < said["steps_without_sharing"]
    assert main(["report", str(made.path)]) == 0
    assert "0 of 2 perplexities have been measured" in capsys.readouterr().out
    assert (tmp_path / "out" / "report" / "table.md").is_file()
    for command in ("run", "submit"):
        assert main([command, str(made.path), "--paradigm", "cpt"]) == 2
        assert "the experiment is of ours alone; it has no cpt" in capsys.readouterr().err
    for command in ("plan", "advise", "eval"):
        assert main([command, str(made.path)]) == 2
        said = capsys.readouterr().err
        assert "experiment.yaml:2: plan: this is an experiment" in said
        assert "--write` writes its plans" in said

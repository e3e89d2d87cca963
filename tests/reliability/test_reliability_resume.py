"""A run that is stopped and resumed at any step ends with exactly the bytes of the undisturbed run."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import yaml

from megatron_lrpath.runs.checkpoints import checkpoint_folder, latest_step
from tests.support.states import states
from tests.support.training_fixtures import MODEL, history, make_plan, run_words, train

pytestmark = pytest.mark.slow

# dropout: reveals a random state that is not restored
DROPOUT = MODEL | {"attention_dropout": 0.1, "hidden_dropout": 0.1}
Run = tuple[str, str]
RUNS = (("ours", "main"), ("ours", "branch-v2"), ("ptfs", "scratch-v2"), ("cpt", "continual-v2"))
FIRST = ("ptfs", "scratch-v1")  # parent of continual-v2
LAYOUTS = {
    "single": (1, (), 2),
    "tp2-async": (2, ("--tensor-model-parallel-size", "2", "--async-save"), 1),
    "dp2-distributed-optimizer": (2, ("--use-distributed-optimizer",), 1),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a plan's data."""
    folder = tmp_path_factory.mktemp("data")
    make_plan(folder, (4, 4), model=DROPOUT)
    return folder


def plan_with_output(data: Path, output: Path) -> Path:
    """Write the plan with another output folder, next to that folder; return its path."""
    plan = output.with_suffix(".yaml")
    keys = yaml.safe_load((data / "plan.yaml").read_text()) | {"output": str(output)}
    plan.write_text(yaml.safe_dump(keys, sort_keys=False))
    return plan


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_ends_with_the_bytes_of_the_undisturbed_one(
    tmp_path: Path, data: Path, layout: str
) -> None:
    """Weights, moments, rates, random states and losses are compared, for all kinds of runs."""
    nproc, flags, interruptions = LAYOUTS[layout]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    plan = plan_with_output(data, whole)
    for run in (FIRST, *RUNS):
        train(run_words(plan, *run, *flags), nproc).ok()
    shutil.copytree(whole, broken, symlinks=True)  # the parents are those of the undisturbed runs
    plan = plan_with_output(data, broken)
    for run in RUNS:
        stops = random_stops(whole, run, interruptions)
        print(f"{layout}: {run} stops at {stops}")
        shutil.rmtree(folder_of(broken, run))
        for stop in stops:
            train([*run_words(plan, *run, *flags), "--exit-interval", str(stop)], nproc).ok()
        train(run_words(plan, *run, *flags), nproc).ok()
    ends = states(*(last_checkpoint(output, run) for output in (whole, broken) for run in RUNS))
    for run, undisturbed, resumed in zip(RUNS, ends[: len(RUNS)], ends[len(RUNS) :], strict=True):
        assert undisturbed == resumed, run
        assert steps(folder_of(broken, run)) == steps(folder_of(whole, run)), run


def random_stops(output: Path, run: Run, number: int) -> list[int]:
    """Return up to `number` steps of a run, ascending, without its last step."""
    lines = history(folder_of(output, run))
    steps_before = range(lines[0]["step"], lines[-1]["step"])
    return sorted(random.sample(steps_before, k=min(number, len(steps_before))))


def folder_of(output: Path, run: Run) -> Path:
    """Return a run's folder."""
    return output / run[0] / run[1]


def last_checkpoint(output: Path, run: Run) -> Path:
    """Return the last checkpoint of a run."""
    checkpoints = folder_of(output, run) / "checkpoints"
    last = latest_step(checkpoints)
    assert last is not None
    return checkpoint_folder(checkpoints, last)


def steps(folder: Path) -> list[tuple[float, ...]]:
    """Return step, rate, loss and gradient norm of every step in a run's history."""
    lines = history(folder)
    assert all(line["seconds"] > 0.003 for line in lines)  # also for the first step after a start
    return [tuple(line[key] for key in ("step", "lr", "loss", "grad_norm")) for line in lines]

"""Stopped and resumed at any step, a run ends with the very bytes of the undisturbed one."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import yaml

from megatron_lrpath.training.checkpoints.on_disk import checkpoint_folder, latest_step
from tests.states import states
from tests.training_fixtures import MODEL, history, make_plan, run_words, train

pytestmark = pytest.mark.slow

# dropout: a random state that is not restored shows
DROPOUT = MODEL | {"attention_dropout": 0.1, "hidden_dropout": 0.1}
RUNS = (("ours", "main"), ("ours", "branch-v2"), ("ptfs", "scratch-v2"), ("cpt", "continual-v2"))
PARENTS = (("ours", "main"), ("ptfs", "scratch-v1"))
LAYOUTS = {
    "single": (1, (), RUNS),
    "tp2": (2, ("--tensor-model-parallel-size", "2"), RUNS[:2]),
    "dp2-distributed-optimizer": (2, ("--use-distributed-optimizer",), RUNS[2:]),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plan's data."""
    folder = tmp_path_factory.mktemp("data")
    make_plan(folder, (4, 4), model=DROPOUT)
    return folder


def plan_with_output(data: Path, output: Path) -> Path:
    """The plan with another output folder, and so another plan file."""
    plan = output.with_suffix(".yaml")
    keys = yaml.safe_load((data / "plan.yaml").read_text()) | {"output": str(output)}
    plan.write_text(yaml.safe_dump(keys, sort_keys=False))
    return plan


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_ends_with_the_bytes_of_the_undisturbed_one(
    tmp_path: Path, data: Path, layout: str
) -> None:
    nproc, flags, runs = LAYOUTS[layout]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    plan = plan_with_output(data, whole)
    for paradigm, run in dict.fromkeys((*PARENTS, *runs)):
        if (paradigm, run) in runs or paradigm in {one for one, _ in runs} or paradigm == "ptfs":
            train(run_words(plan, paradigm, run, *flags), nproc).ok()
    for paradigm, run in runs:
        ends = resume_twice(plan_with_output(data, broken), whole, broken, paradigm, run, nproc, flags)
        assert ends[0] == ends[1], f"{paradigm}/{run}"
        assert steps(broken / paradigm / run) == steps(whole / paradigm / run)


def resume_twice(
    plan: Path, whole: Path, broken: Path, paradigm: str, run: str, nproc: int, flags: tuple[str, ...]
) -> list[dict[str, str]]:
    """Train with two interruptions at random steps; the last states of the undisturbed and this run."""
    undisturbed = whole / paradigm / run / "checkpoints"
    last = latest_step(undisturbed)
    assert last is not None
    place = broken / paradigm
    if not place.exists():  # the parents are the undisturbed ones
        shutil.copytree(whole / paradigm, place, symlinks=True)
    if paradigm == "cpt" and not (broken / "ptfs").exists():
        shutil.copytree(whole / "ptfs", broken / "ptfs", symlinks=True)
    shutil.rmtree(place / run)
    first = history(whole / paradigm / run)[0]["step"]
    stops = sorted(random.sample(range(first, last), k=min(2, last - first)))
    print(f"{paradigm}/{run} stops at {stops}")
    words = run_words(plan, paradigm, run, *flags)
    for stop in stops:
        train([*words, "--exit-interval", str(stop)], nproc).ok()
    train(words, nproc).ok()
    folders = (undisturbed, place / run / "checkpoints")
    return states(*(checkpoint_folder(folder, last) for folder in folders))


def steps(folder: Path) -> list[tuple[float, ...]]:
    """Step, rate, loss and gradient norm of every step in a run's history."""
    return [tuple(line[key] for key in ("step", "lr", "loss", "grad_norm")) for line in history(folder)]

"""Optimizers and precisions: main path, branch and resume at the rates and from the state that belong to each."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lrpath.runs.checkpoints import complete_steps
from megatron_lrpath.schedule import LRPath, Schedule
from tests.support.training_fixtures import make_plan, train
from tests.training.test_training_rates import OPTIMIZER, words_without_plan

RATES = ["--lr", "0.01", "--min-lr", "0.001"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Model, data and batch, without a word on how the optimizer is distributed."""
    folder = tmp_path_factory.mktemp("optimizers")
    make_plan(folder, (12,))
    words = words_without_plan(folder / "plan.yaml", folder)
    return [word for word in words if word not in OPTIMIZER] + RATES


def main(folder: Path, *others: str) -> list[str]:
    """A main path of 6 steps that keeps step 3."""
    return [
        "--lr-path",
        "main",
        "--train-iters",
        "6",
        "--lr-path-keep-steps",
        "3",
        "--save",
        str(folder / "main"),
        *others,
    ]


def branch(folder: Path, *others: str, parent: int = 3) -> list[str]:
    """A branch of 4 steps."""
    start = [
        "--lr-path-parent",
        str(folder / "main"),
        "--lr-path-parent-step",
        str(parent),
        "--lr-path-decay-iters",
        "4",
    ]
    return ["--lr-path", "branch", *start, "--save", str(folder / "branch"), *others]


def rates(max_lr: float = 0.01, min_lr: float = 0.001, first: int = 3) -> list[float]:
    """Those of a branch."""
    path = LRPath(
        Schedule(style="cosine", max_lr=max_lr, min_lr=min_lr, warmup=0), "branch", first, first + 4
    )
    return [path.lr_at(step) for step in range(first, first + 4)]


@pytest.mark.parametrize("distributed", [OPTIMIZER, []], ids=["distributed", "not distributed"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_fp16_saves_before_the_first_update_and_goes_on(
    words: list[str], tmp_path: Path, distributed: list[str], ranks: int
) -> None:
    """The loss scale of 2^32 comes down by half at a step; until it fits there is no update."""
    half = [*words, *distributed, "--fp16", "--hysteresis", "1"]
    length = ["--train-iters", "16", "--lr-path", "main", "--save"]
    whole = train([*half, *length, str(tmp_path / "whole")], ranks, probe="state_at_end").ok()
    own = [*half, *length, str(tmp_path / "own")]
    train([*own, "--exit-interval", "2"], ranks).ok()
    again = train(own, ranks, probe="state_at_end").ok()
    assert complete_steps(tmp_path / "own") == [2, 16]
    assert again.probed == whole.probed
    start = [
        "--lr-path-parent",
        str(tmp_path / "own"),
        "--lr-path-parent-step",
        "2",
        "--lr-path-decay-iters",
        "14",
    ]
    train([*half, "--lr-path", "branch", *start, "--save", str(tmp_path / "branch")], ranks).ok()


DECOUPLED = ["--decoupled-lr", "0.02", "--decoupled-min-lr", "0.002"]
OTHER = ["--decoupled-lr", "0.04", "--decoupled-min-lr", "0.004"]


@pytest.mark.parametrize("distributed", [OPTIMIZER, []], ids=["distributed", "not distributed"])
@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (DECOUPLED, DECOUPLED, (0.02, 0.002)),
        (DECOUPLED, OTHER, (0.04, 0.004)),
        ([], OTHER, (0.04, 0.004)),
        (DECOUPLED, [], (0.01, 0.001)),
        (DECOUPLED, [*OTHER, "--lr", "0.02"], (0.04, 0.004)),
    ],
    ids=["same", "other", "new", "gone", "both others"],
)
def test_a_branch_has_its_own_rates_of_the_embeddings(
    words: list[str],
    tmp_path: Path,
    distributed: list[str],
    before: list[str],
    after: list[str],
    expected: tuple[float, float],
) -> None:
    train([*words, *distributed, *main(tmp_path, *before)]).ok()
    start = [*words, *distributed, *branch(tmp_path, *after)]
    first = train([*start, "--exit-interval", "5"], probe="rates").ok().probed[0]
    seen = first + train(start, probe="rates").ok().probed[0]
    others = rates(0.02, 0.001) if "--lr" in after else rates()
    assert [set(groups) for groups in seen] == [
        set(pair) for pair in zip(others, rates(*expected), strict=True)
    ]


def test_a_branch_has_its_own_betas(words: list[str], tmp_path: Path) -> None:
    """Megatron takes a checkpoint's over, whatever the command line says."""
    train([*words, *OPTIMIZER, *main(tmp_path)]).ok()
    start = [*words, *OPTIMIZER, *branch(tmp_path, "--adam-beta2", "0.9")]
    outcome = train(start, probe="betas").ok()
    assert set(outcome.probed[0]) == {(0.9, 0.9)}

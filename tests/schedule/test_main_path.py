"""A main path that moves to the rates of later versions or falls: exact, the same in steps and samples."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lrpath.schedule import LRPath, MainRate, Move, Schedule

SCHEDULE = Schedule("cosine", 1e-3, 1e-4, 20)
MOVES = MainRate((Move(100, 40, 5e-4), Move(200, 0, 2e-3), Move(300, 7, 1e-4)))
FALLING = MainRate(power=0.5, begin=100)


def plateau(main: MainRate) -> LRPath:
    return LRPath(SCHEDULE, "plateau", 0, 400, warmup=20, main=main)


def test_the_rate_moves_linearly_and_stays() -> None:
    path = plateau(MOVES)
    rates = [path.lr_at(step) for step in (10, 20, 100, 120, 140, 199, 200, 300, 307, 10_000)]
    assert rates == [5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4, 5e-4, 2e-3, 2e-3, 1e-4, 1e-4]
    assert path.lr_at(110) == 1e-3 + 0.25 * (5e-4 - 1e-3)


def test_the_rate_falls_with_a_power_of_the_step_down_to_min_lr() -> None:
    path = plateau(FALLING)
    assert [path.lr_at(step) for step in (50, 100, 400, 10**7)] == [1e-3, 1e-3, 5e-4, 1e-4]


@given(st.sampled_from([MOVES, FALLING]), st.integers(0, 1000), st.sampled_from([1, 3, 32, 1024]))
def test_steps_and_samples_agree_to_the_last_bit(main: MainRate, step: int, batch: int) -> None:
    assert plateau(main).scaled(batch).lr_at(step * batch) == plateau(main).lr_at(step)


@given(st.integers(0, 300))
def test_an_appended_move_changes_nothing_before_it(step: int) -> None:
    assert plateau(MainRate(MOVES.moves[:2])).lr_at(min(step, 300)) == plateau(MOVES).lr_at(min(step, 300))


@pytest.mark.parametrize("shape", ["branch", "whole"])
@pytest.mark.parametrize("style", ["cosine", "knee", "multi-step", "wsd", "linear", "constant"])
def test_a_decay_from_another_rate_is_that_of_another_max_lr(style: str, shape: str) -> None:
    own = LRPath(Schedule(style, 1e-3, 1e-4), shape, 60, 100, peak=4e-4)
    other = LRPath(Schedule(style, 4e-4, 1e-4), shape, 60, 100)
    assert [own.lr_at(step) for step in range(60, 101)] == [other.lr_at(step) for step in range(60, 101)]


@pytest.mark.parametrize(
    "path", [plateau(MOVES), plateau(FALLING), LRPath(SCHEDULE, "branch", 60, 100, peak=4e-4)]
)
def test_a_path_comes_back_from_json(path: LRPath) -> None:
    assert LRPath.from_dict(json.loads(json.dumps(path.to_dict()))) == path


def test_other_rates_keep_the_ratio() -> None:
    path = plateau(MOVES).with_rates(2e-3, 0.0)
    assert [path.lr_at(step) for step in (20, 140, 200)] == [2e-3, 1e-3, 4e-3]
    branch = LRPath(SCHEDULE, "branch", 60, 100, peak=4e-4).with_rates(5e-4, 3e-4)
    assert branch.lr_at(60) == 3e-4  # not below the lowest rate


@pytest.mark.parametrize(
    "make",
    [
        lambda: MainRate((Move(100, 40, 5e-4), Move(120, 0, 1e-3))),
        lambda: MainRate((Move(100, 0, 5e-4),), power=0.5, begin=10),
        lambda: MainRate(power=0.5),
        lambda: MainRate((Move(100, 0, 0.0),)),
        lambda: LRPath(SCHEDULE, "branch", 60, 100, main=MOVES),
        lambda: LRPath(SCHEDULE, "plateau", 0, 100, warmup=20, peak=5e-4),
        lambda: LRPath(SCHEDULE, "plateau", 0, 100, warmup=120, main=MOVES),
        lambda: LRPath(SCHEDULE, "branch", 60, 100, peak=5e-5),
    ],
)
def test_parts_that_do_not_fit_are_refused(make) -> None:
    with pytest.raises(ValueError, match=r".+"):
        make()

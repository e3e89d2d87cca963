"""Learning-rate paths: the paper's values, and properties of every schedule, length and unit."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lrpath.schedule import STYLES, LRPath, Schedule
from megatron_lrpath.schedule.styles import WSD_DECAY_SHAPES

PAPER = {"max_lr": 3e-4, "min_lr": 3e-5, "warmup": 2000}
DECAYING = tuple(style for style in STYLES if style not in ("constant", "inverse-square-root"))


@st.composite
def schedules(draw: st.DrawFn, styles: tuple[str, ...] = STYLES) -> Schedule:
    max_lr = draw(st.floats(1e-8, 10.0))
    share = st.floats(0.01, 0.99)
    return Schedule(
        style=draw(st.sampled_from(styles)),
        max_lr=max_lr,
        min_lr=max_lr * draw(st.sampled_from([0.0, 0.1, 1 / 3, 1.0])),
        warmup=draw(st.integers(0, 50)),
        knee_explore=draw(share),
        multi_step_fractions=tuple(sorted([draw(share), draw(share)])),
        wsd_decay_fraction=draw(share),
        wsd_decay_shape=draw(st.sampled_from(WSD_DECAY_SHAPES)),
    )


@st.composite
def paths(draw: st.DrawFn, styles: tuple[str, ...] = STYLES, shapes=("whole", "branch")) -> LRPath:
    schedule, shape = draw(schedules(styles)), draw(st.sampled_from(shapes))
    warmup = draw(st.sampled_from([0, schedule.warmup])) if shape in ("whole", "plateau") else 0
    start = draw(st.integers(0, 10**6))
    length = warmup + draw(st.integers(1, 300))
    cycle = draw(st.sampled_from([None, length, length + 7, 4 * length, math.inf]))
    return LRPath(schedule, shape, start, start + length, warmup=warmup, cycle=cycle)


every_path = paths(shapes=("whole", "branch", "plateau", "floor"))


@given(every_path, st.integers(0, 10**4), st.integers(1, 4096))
def test_scaling_to_samples_changes_no_bit(path: LRPath, offset: int, batch: int) -> None:
    step = path.start + offset % (path.end - path.start + 3)
    assert path.scaled(batch).lr_at(step * batch) == path.lr_at(step)


@given(every_path)
def test_rates_stay_between_the_minimum_and_the_maximum(path: LRPath) -> None:
    for position in range(path.start, path.end + 3):
        rate = path.lr_at(position)
        low = 0.0 if position < path.start + path.warmup else path.schedule.min_lr
        assert low <= rate <= path.schedule.max_lr


@given(every_path)
def test_a_rate_never_rises_after_the_warm_up(path: LRPath) -> None:
    rates = [path.lr_at(position) for position in range(path.start + path.warmup, path.end + 1)]
    assert rates == sorted(rates, reverse=True)


@given(paths(styles=tuple(style for style in DECAYING if style != "multi-step")))
def test_smooth_schedules_have_no_jumps(path: LRPath) -> None:
    schedule, cycle = path.schedule, path.cycle or path.end - path.start
    decay = (cycle - path.warmup) * _decaying_share(path)
    steepest = {"cosine": math.pi / 2 / decay, "exponential": 2 * math.log(2) / decay}
    slope = steepest.get(_decay_shape(path), 1 / decay if _decay_shape(path) == "linear" else decay**-0.5)
    warm = 1 / path.warmup if path.warmup else 0.0
    for position in range(path.start, path.end):
        limit = schedule.max_lr * warm if position < path.start + path.warmup else 0.0
        limit = max(limit, (schedule.max_lr - schedule.min_lr) * slope)
        assert abs(path.lr_at(position + 1) - path.lr_at(position)) <= limit * 1.0001 + 1e-15


def _decay_shape(path: LRPath) -> str:
    style = path.schedule.style
    return path.schedule.wsd_decay_shape if style == "wsd" else {"cosine": "cosine"}.get(style, "linear")


def _decaying_share(path: LRPath) -> float:
    if path.shape == "branch":
        return 1.0
    return {"knee": 1 - path.schedule.knee_explore, "wsd": path.schedule.wsd_decay_fraction}.get(
        path.schedule.style, 1.0
    )


@given(paths(shapes=("branch",)))
def test_a_branch_begins_at_the_maximum_or_multi_steps_middle(path: LRPath) -> None:
    begin = path.lr_at(path.start)
    if path.schedule.style == "multi-step" and path.cycle != math.inf:
        assert begin == path.schedule.middle_lr
    else:
        assert begin == path.schedule.max_lr


@given(paths(shapes=("branch",)))
def test_a_branch_decays_completely_in_every_style(path: LRPath) -> None:
    complete = LRPath(path.schedule, "branch", path.start, path.end)
    assert complete.lr_at(complete.end) == path.schedule.min_lr


@given(paths(styles=DECAYING, shapes=("whole",)))
def test_a_whole_schedule_decays_completely(path: LRPath) -> None:
    complete = LRPath(path.schedule, "whole", path.start, path.end, warmup=path.warmup)
    assert complete.lr_at(complete.end) == path.schedule.min_lr
    assert complete.lr_at(complete.end + 1) == path.schedule.min_lr


@given(every_path)
def test_a_warm_up_begins_at_zero_and_ends_at_the_maximum(path: LRPath) -> None:
    if path.warmup:
        assert path.lr_at(path.start) == 0.0
        assert path.lr_at(path.start + path.warmup) == path.schedule.max_lr


@given(every_path)
def test_a_path_survives_json(path: LRPath) -> None:
    assert LRPath.from_dict(json.loads(json.dumps(path.to_dict(), allow_nan=False))) == path


@given(paths(styles=("cosine", "knee", "multi-step", "wsd", "linear", "constant")))
def test_an_infinite_cycle_never_decays(path: LRPath) -> None:
    endless = LRPath(path.schedule, path.shape, path.start, path.end, warmup=path.warmup, cycle=math.inf)
    assert endless.lr_at(endless.end) == path.schedule.max_lr


@given(paths(shapes=("plateau",)), st.integers(0, 10**9))
def test_the_main_path_stays_at_the_maximum_for_ever(path: LRPath, far: int) -> None:
    assert path.lr_at(path.start + path.warmup + far) == path.schedule.max_lr


def test_figure_3_cosine() -> None:
    path = LRPath(Schedule("cosine", **PAPER), "whole", 0, 10_000, warmup=2000)
    assert path.lr_at(1000) == 1.5e-4
    assert path.lr_at(2000) == 3e-4
    assert path.lr_at(6000) == pytest.approx(1.65e-4, rel=1e-14)
    assert path.lr_at(4000) == pytest.approx(3e-5 + 2.7e-4 * (2 + math.sqrt(2)) / 4, rel=1e-14)


def test_figure_3_knee_explores_for_half_of_the_steps_after_the_warm_up() -> None:
    path = LRPath(Schedule("knee", **PAPER), "whole", 0, 10_000, warmup=2000)
    assert path.lr_at(6000) == 3e-4
    assert path.lr_at(6001) < 3e-4
    assert path.lr_at(8000) == pytest.approx(1.65e-4, rel=1e-14)


def test_figure_3_multi_step_changes_at_80_and_90_percent() -> None:
    path = LRPath(Schedule("multi-step", **PAPER), "whole", 0, 10_000, warmup=2000)
    middle = pytest.approx(math.sqrt(0.1) * 3e-4, rel=1e-14)
    assert [path.lr_at(position) for position in (2000, 8399)] == [3e-4, 3e-4]
    assert [path.lr_at(position) for position in (8400, 9199)] == [middle, middle]
    assert [path.lr_at(position) for position in (9200, 10_000)] == [3e-5, 3e-5]


@pytest.mark.parametrize("cycle", [10_000, 20_000, 30_000, 40_000, math.inf])
def test_figure_4_a_longer_first_cycle_stops_part_way_down(cycle: float) -> None:
    path = LRPath(Schedule("cosine", **PAPER), "whole", 0, 10_000, warmup=2000, cycle=cycle)
    u = 8000 / (cycle - 2000)
    assert path.lr_at(10_000) == pytest.approx(3e-5 + 1.35e-4 * (1 + math.cos(math.pi * u)), rel=1e-14)


@pytest.mark.parametrize("cycle", [10_000, 20_000, 30_000, 40_000, math.inf])
def test_figure_5_a_longer_second_cycle_does_not_complete_the_decay(cycle: float) -> None:
    path = LRPath(Schedule("cosine", **PAPER), "whole", 10_000, 20_000, cycle=cycle)
    assert path.lr_at(10_000) == 3e-4
    end = 3e-5 + 1.35e-4 * (1 + math.cos(math.pi * 10_000 / cycle))
    assert path.lr_at(20_000) == pytest.approx(end, rel=1e-14)


def test_a_multi_step_branch_is_the_decay_alone_half_and_half() -> None:
    path = LRPath(Schedule("multi-step", **PAPER), "branch", 14_000, 20_000)
    middle = pytest.approx(math.sqrt(0.1) * 3e-4, rel=1e-14)
    assert [path.lr_at(position) for position in (14_000, 16_999)] == [middle, middle]
    assert [path.lr_at(position) for position in (17_000, 19_999)] == [3e-5, 3e-5]


def test_multi_step_with_a_minimum_of_zero_keeps_its_middle() -> None:
    assert Schedule("multi-step", 1.0, 0.0).middle_lr == math.sqrt(0.1)


@pytest.mark.parametrize(
    ("style", "quarter"), [("knee", 0.775), ("linear", 0.775), ("constant", 0.775), ("wsd", 0.775)]
)
def test_branches_of_the_other_styles_are_linear(style: str, quarter: float) -> None:
    path = LRPath(Schedule(style, 1.0, 0.1), "branch", 100, 200)
    assert path.lr_at(125) == pytest.approx(quarter, rel=1e-15)


@pytest.mark.parametrize(
    ("shape", "middle"),
    [("linear", 0.5), ("cosine", 0.5), ("exponential", math.sqrt(2) - 1), ("minus-sqrt", 1 - math.sqrt(0.5))],
)
def test_wsd_decay_shapes(shape: str, middle: float) -> None:
    schedule = Schedule("wsd", 1.0, 0.0, wsd_decay_fraction=0.2, wsd_decay_shape=shape)
    whole, branch = LRPath(schedule, "whole", 0, 1000), LRPath(schedule, "branch", 0, 1000)
    assert whole.lr_at(800) == 1.0
    assert whole.lr_at(900) == pytest.approx(middle, rel=1e-14)
    assert branch.lr_at(500) == pytest.approx(middle, rel=1e-14)


def test_inverse_square_root_halves_after_four_times_the_warm_up() -> None:
    path = LRPath(Schedule("inverse-square-root", 1.0, 0.0, warmup=100), "whole", 0, 10_000, warmup=100)
    assert path.lr_at(400) == 0.5
    reset = LRPath(Schedule("inverse-square-root", 1.0, 0.0, warmup=100), "whole", 10_000, 20_000)
    assert [reset.lr_at(10_000), reset.lr_at(10_300)] == [1.0, 0.5]


def test_keep_min_is_the_minimum_all_along() -> None:
    path = LRPath(Schedule("cosine", **PAPER), "floor", 10_000, 20_000)
    assert {path.lr_at(position) for position in (10_000, 15_000, 20_000, 30_000)} == {3e-5}


def test_a_float_position_is_as_exact_as_a_whole_one() -> None:
    path = LRPath(Schedule("cosine", **PAPER), "whole", 0, 10_000, warmup=2000)
    assert path.lr_at(4321.0) == path.lr_at(4321)
    assert path.lr_at(4322) < path.lr_at(4321.5) < path.lr_at(4321)


@pytest.mark.parametrize("position", [-1, 4, 4.999, math.nan])
def test_a_position_before_the_start_is_refused(position: float) -> None:
    with pytest.raises(ValueError, match="before the curve's start"):
        LRPath(Schedule("cosine", 1.0, 0.1), "branch", 5, 10).lr_at(position)


@pytest.mark.parametrize(
    "knobs",
    [
        {"style": "cosin"},
        {"max_lr": 0.0},
        {"max_lr": math.inf},
        {"max_lr": math.nan},
        {"min_lr": -0.1},
        {"min_lr": 2.0},
        {"warmup": -1},
        {"warmup": 1.5},
        {"knee_explore": 1.0},
        {"multi_step_fractions": (0.9, 0.8)},
        {"multi_step_fractions": (0.5,)},
        {"wsd_decay_fraction": 0.0},
        {"wsd_decay_shape": "square"},
    ],
)
def test_a_knob_out_of_its_range_is_refused(knobs: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(knobs))):
        Schedule(**({"style": "cosine", "max_lr": 1.0, "min_lr": 0.1} | knobs))


@pytest.mark.parametrize(
    "parts",
    [
        {"shape": "loop"},
        {"start": -1},
        {"end": 5},
        {"warmup": 90},
        {"warmup": -1},
        {"shape": "branch", "warmup": 5},
        {"shape": "floor", "warmup": 5},
        {"cycle": 89},
        {"cycle": 100.5},
        {"cycle": math.nan},
        {"unit": 0},
    ],
)
def test_parts_of_a_path_that_do_not_fit_are_refused(parts: dict) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        LRPath(
            **({"schedule": Schedule("cosine", 1.0, 0.1), "shape": "whole", "start": 10, "end": 100} | parts)
        )

"""The law of the loss: its sum as in the paper, its derivatives, and fits that recover known parameters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_lrpath.advise.curves import Scale, join_drops, read_drops
from megatron_lrpath.advise.fit import (
    EXACT,
    NOTHING,
    OFF,
    PUBLISHED,
    SPEED,
    expected,
    fit_law,
    gather,
    law,
    loss_and_slopes,
)
from megatron_lrpath.advise.read import read_curves, scale_of
from tests.support.advise_fixtures import LEVELS, TRUTH, small_plan, write_losses

UNIT = Scale(max_lr=1.0, area=1.0, warmup=0)
RATES = np.array([1.0, 1.0, 0.8, 0.5, 0.5, 0.9, 0.2, 0.1])


def test_the_warm_up_is_no_annealing() -> None:
    rates = np.array([0.0, 0.5, 1.0, 1.0, 1.0])
    assert read_drops(rates, np.array([5]), Scale(1.0, 1.0, warmup=2)).size.size == 0


@pytest.mark.parametrize("shrink", [0.0, 0.2])
def test_the_law_is_the_sum_of_the_paper_and_a_drop_gains_less_late_in_a_path(shrink: float) -> None:
    floor, a, power, gain, speed, bend, g = 2.0, 0.5, 0.4, 0.3, 2.0, 0.6, 0.5
    steps = np.array([4, 8])
    values = np.array([*np.log([floor, a, power, gain, speed, bend]), g, shrink])
    got = loss_and_slopes(values, read_drops(RATES, steps, UNIT))[0]
    for s, loss in zip(steps, got, strict=True):
        lost = 0.0
        for k in range(1, s):
            since = RATES[k:s].sum()
            lost += (RATES[k - 1] - RATES[k]) * (1 - (speed * RATES[k] ** -g * since + 1) ** -bend)
        area = RATES[:s].sum()
        assert loss == pytest.approx(floor + a * area**-power - gain * area**-shrink * lost)


def test_several_sets_of_parameters_read_at_once_are_each_read_alone() -> None:
    rates = np.concatenate([np.ones(50), np.linspace(1, 0.1, 50)])
    read = read_drops(rates, np.array([20, 60, 100]), Scale(1, 50, 0))
    sets = TRUTH + np.random.default_rng(3).normal(0, 0.1, (5, len(TRUTH)))
    assert law(sets, read) == pytest.approx(
        np.stack([loss_and_slopes(one, read)[0] for one in sets]), rel=1e-12
    )


def test_derivatives_are_those_of_the_value() -> None:
    rates = np.concatenate([np.ones(50), np.linspace(1, 0.1, 50)])
    read = read_drops(rates, np.arange(10, 101, 10), Scale(1, 50, 0))
    slopes = loss_and_slopes(TRUTH, read)[1]
    for index in range(len(TRUTH)):
        step = np.zeros(len(TRUTH))
        step[index] = 1e-6
        numeric = (loss_and_slopes(TRUTH + step, read)[0] - loss_and_slopes(TRUTH - step, read)[0]) / 2e-6
        assert slopes[:, index] == pytest.approx(numeric, abs=1e-7)


def test_curves_read_together_are_the_curves_read_alone() -> None:
    curves = [np.concatenate([np.ones(30), np.linspace(1, 0.1, length)]) for length in (10, 40)]
    parts = [read_drops(rates, np.array([20, 40]), UNIT) for rates in curves]
    together = loss_and_slopes(TRUTH, join_drops(parts))[0]
    assert together == pytest.approx(np.concatenate([loss_and_slopes(TRUTH, part)[0] for part in parts]))
    assert len(join_drops([]).forward) == 0


def test_expectations_have_the_units_of_a_fit() -> None:
    """The same steps at twice the rate have areas twice as large, and η^(−g)·S changes with them."""
    once, twice = (expected(Scale(rate, rate * 500, 10)) for rate in (3e-4, 6e-4))
    assert twice.mean[SPEED] - once.mean[SPEED] == pytest.approx((1 - PUBLISHED["g"]) * np.log(2))
    longer = expected(Scale(3e-4, 3e-4 * 5000, 10))
    assert longer.mean[SPEED] - once.mean[SPEED] == pytest.approx(np.log(10))
    assert np.isinf(once.spread[:2]).all(), "nothing is expected of the floor and the scale of a loss"


def test_neighbouring_drops_taken_together_keep_their_sum() -> None:
    rates = np.concatenate([np.ones(500), np.linspace(1, 0.1, 3000)])
    drops = read_drops(rates, np.array([3500]), Scale(1.0, 100.0, 0))
    assert len(drops.size) <= 48
    assert drops.size.sum() == pytest.approx(0.9)


def test_a_fit_without_noise_finds_the_parameters(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    write_losses(plan, noise=0, shared=0)
    data = gather(read_curves(plan), scale_of(plan), levels=3)
    exact = replace(data, sigmas=np.full_like(data.sigmas, EXACT))  # these losses follow the law
    fit = fit_law(exact)
    assert fit.parameters == pytest.approx(TRUTH, abs=0.2)
    assert fit.level == pytest.approx(LEVELS, abs=2e-3)
    assert np.abs(fit.residuals).max() < 1e-3


def test_all_points_of_a_stretch_are_limited_by_the_error_of_the_law(tmp_path: Path) -> None:
    """This holds for any number of points at any noise; more noise lowers the precision."""
    plan = small_plan(tmp_path)
    for noise in (0.0, 0.05):
        write_losses(plan, noise=noise, shared=0)
        main, branch = (gather([curve], scale_of(plan)) for curve in read_curves(plan)[:2])
        precision = [float(np.sum(main.sigmas[main.versions == version] ** -2)) for version in range(4)]
        precision.append(float(np.sum(branch.sigmas**-2)))
        most = 1 / OFF**2
        assert all((0.75 * most < one < most) == (noise == 0) for one in precision), (noise, precision)
        assert max(precision) < most


def test_without_expectations_losses_are_found_and_parameters_need_not_be(tmp_path: Path) -> None:
    """Decays of one length determine the gain, but hardly its speed: expectations supply that."""
    plan = small_plan(tmp_path)
    write_losses(plan, noise=0, shared=0)
    fit = fit_law(gather(read_curves(plan), scale_of(plan), levels=3, expectation=NOTHING))
    assert fit.parameters[[0, -1]] == pytest.approx(TRUTH[[0, -1]], abs=0.02)
    assert abs(fit.parameters[SPEED] - TRUTH[SPEED]) > 0.2
    assert np.abs(fit.residuals).max() < 1e-3


def test_a_branch_is_read_over_the_main_path_where_batches_are_shared(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    write_losses(plan, noise=0.005, shared=0.02)
    main, *branches = read_curves(plan)
    for branch in branches[:3]:
        relative = branch.beside(main)
        assert relative.main is main
        assert relative.noise == pytest.approx(0.005 * np.sqrt(2), rel=0.2)
    assert branches[3].beside(main).main is None, "the main path ends where the last branch begins"
    write_losses(plan, noise=0.02, shared=0.0)
    main, *branches = read_curves(plan)
    assert branches[0].beside(main).main is None, "of its own noise a ratio has twice as much"


def test_long_histories_become_few_points(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, steps=3000, count=2)
    write_losses(plan)
    curves = read_curves(plan)
    assert sum(len(curve.points.logs) for curve in curves) <= 60 * 5
    assert all(np.all(np.diff(curve.points.steps) > 0) for curve in curves)

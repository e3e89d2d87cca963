"""The laws: their sums as the papers define them, their derivatives, and fits that find known parameters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_lrpath.advise.areas import Scale, read_areas, read_drops
from megatron_lrpath.advise.curves import read_curves, scale_of
from megatron_lrpath.advise.fit import fit_law, gather
from megatron_lrpath.advise.laws import Law, MultiPower, Tissue
from tests.advise_fixtures import MULTI_POWER, TISSUE, small_plan, write_losses

UNIT = Scale(max_lr=1.0, area=1.0, warmup=0)
RATES = np.array([1.0, 1.0, 0.8, 0.5, 0.5, 0.9, 0.2, 0.1])


def test_annealing_is_the_double_sum_of_the_paper() -> None:
    memory, steps = 0.9, np.arange(1, len(RATES) + 1)
    areas = read_areas(RATES, steps, UNIT, memory)
    for s in steps:
        double = sum((RATES[k - 1] - RATES[k]) * memory ** (i - k) for i in range(s) for k in range(1, i + 1))
        assert areas.annealed[s - 1] == pytest.approx(double)
        assert areas.forward[s - 1] == pytest.approx(RATES[:s].sum())


def test_the_warm_up_is_no_annealing() -> None:
    rates = np.array([0.0, 0.5, 1.0, 1.0, 1.0])
    areas = read_areas(rates, np.array([5]), Scale(1.0, 1.0, warmup=2), 0.9)
    assert areas.annealed[0] == 0
    assert read_drops(rates, np.array([5]), Scale(1.0, 1.0, warmup=2)).size.size == 0


def test_the_multi_power_law_is_the_sum_of_the_paper() -> None:
    floor, a, power, gain, speed, bend, g = 2.0, 0.5, 0.4, 0.3, 2.0, 0.6, 0.5
    steps = np.array([4, 8])
    values = np.array([np.log(floor), np.log(a), power, np.log(gain), np.log(speed), np.log(bend), g])
    got = MultiPower().value(values, MultiPower().read(RATES, steps, UNIT))[0]
    for s, loss in zip(steps, got, strict=True):
        lost = 0.0
        for k in range(1, s):
            since = RATES[k:s].sum()
            lost += (RATES[k - 1] - RATES[k]) * (1 - (speed * RATES[k] ** -g * since + 1) ** -bend)
        assert loss == pytest.approx(floor + a * RATES[:s].sum() ** -power - gain * lost)


@pytest.mark.parametrize(("law", "values"), [(Tissue(0.97), TISSUE), (MultiPower(), MULTI_POWER)])
def test_derivatives_are_those_of_the_value(law: Law, values: np.ndarray) -> None:
    read = law.read(
        np.concatenate([np.ones(50), np.linspace(1, 0.1, 50)]), np.arange(10, 101, 10), Scale(1, 50, 0)
    )
    slopes = law.value(values, read)[1]
    for index in range(len(values)):
        step = np.zeros(len(values))
        step[index] = 1e-6
        numeric = (law.value(values + step, read)[0] - law.value(values - step, read)[0]) / 2e-6
        assert slopes[:, index] == pytest.approx(numeric, abs=1e-7)


def test_neighbouring_drops_taken_together_keep_their_sum() -> None:
    rates = np.concatenate([np.ones(500), np.linspace(1, 0.1, 3000)])
    drops = read_drops(rates, np.array([3500]), Scale(1.0, 100.0, 0))
    assert len(drops.size) <= 48
    assert drops.size.sum() == pytest.approx(0.9)


def test_a_fit_without_noise_finds_the_parameters(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    write_losses(plan, Tissue(0.99), noise=0, shared=0)
    fit = fit_law(Tissue(0.99), gather(read_curves(plan), scale_of(plan), levels=3))
    assert fit.parameters == pytest.approx(TISSUE, abs=0.03)
    assert np.abs(fit.residuals).max() < 1e-3


def test_long_histories_become_few_points(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, steps=3000, count=2)
    write_losses(plan)
    curves = read_curves(plan)
    assert sum(len(curve.points.logs) for curve in curves) <= 60 * 5
    assert all(np.all(np.diff(curve.points.steps) > 0) for curve in curves)

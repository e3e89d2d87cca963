#!/usr/bin/env python3
"""Fit the law of `lrpath advise` to the curves that the multi-power law's authors published, 25M to 400M parameters.

Writes `results/published.json`: the parameters that `megatron_lrpath.advise.fit` expects, and how well one constant
curve and one decay predict the others, with what is expected taken from the other two models.

  git clone https://github.com/thu-yao-01-luo/MultiPowerLaw
  published.py --source MultiPowerLaw
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from measured import RESULTS

from megatron_lrpath.advise.curves import F64, Curve, Scale
from megatron_lrpath.advise.fit import (
    NOTHING,
    PARAMETERS,
    PUBLISHED_LR,
    SPEED,
    SPREAD,
    Expectation,
    Fit,
    fit_law,
    gather,
)
from megatron_lrpath.files import atomic_write_json

MODELS = ("25", "100", "400")
WARMUP, SHORT = 2160, 24_000
SCALE = Scale(PUBLISHED_LR, PUBLISHED_LR * SHORT, WARMUP)
FITTED = ("constant_24000", "wsdld_20000_24000")
"""Trainings that exist after a first version: a path at the full rate, and one decay from it."""
SPREADS = np.array([SPREAD.get(name, np.inf) for name in PARAMETERS])


def read(path: Path) -> Curve:
    """Return a curve from the authors' CSV (step, rate, loss); the rate is interpolated between its rows."""
    steps, rates, losses = np.genfromtxt(path, delimiter=",", skip_header=1).T
    every = np.interp(np.arange(steps[-1]), np.append(0, steps), np.append(0, rates))
    if path.stem.startswith("wsdcon"):  # its rate falls in one step, after a row
        after = steps[np.flatnonzero(np.diff(rates))[0]]
        every[int(after) :] = rates[-1]
    late = steps > WARMUP
    ends = np.arange(8000, every.size + 8000, 8000)  # so that a curve has sixty points for each 8,000 steps
    return Curve(path.stem, "main", 0, every, steps[late].astype(np.int64), losses[late], ends)


def expectation_of(fits: list[F64]) -> Expectation:
    """Return the mean of the fits, with the spreads that `lrpath advise` allows."""
    return Expectation(np.where(np.isinf(SPREADS), 0.0, np.mean(fits, axis=0)), SPREADS)


def error(curve: Curve, fit: Fit) -> float:
    """Return the law's loss over the measured one at the curve's end, minus 1."""
    steps = curve.logged[-5:]
    return float(fit.losses(curve.rates, steps, np.zeros(5, int)).mean() / curve.losses[-5:].mean() - 1)


def main() -> None:
    """Fit the law to the curves, compare and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True, help="a clone of the authors' repository")
    folder = parser.parse_args().source / "loss_curve_repo"
    curves = {
        model: {path.stem: read(path) for path in sorted((folder / f"csv_{model}").glob("*.csv"))}
        for model in MODELS
    }
    fits = {
        model: fit_law(gather(list(mine.values()), SCALE, expectation=NOTHING))
        for model, mine in curves.items()
    }
    mean = np.mean([fit.parameters for fit in fits.values()], axis=0)
    mean[SPEED] -= np.log(SCALE.steps)
    found = {
        "parameters": {f"{model}M": named(fit.parameters) for model, fit in fits.items()}
        | {"mean, S in steps": named(mean)},
        "errors": errors(curves, {model: fit.parameters for model, fit in fits.items()}),
    }
    atomic_write_json(RESULTS / "published.json", found)
    sizes = [abs(value) for row in found["errors"].values() for value in row.values()]
    print(f"held out: {np.mean(sizes):.2%} in the mean, {max(sizes):.2%} at worst")


def named(parameters: F64) -> dict[str, float]:
    """Return the parameters by name."""
    return dict(zip(PARAMETERS, parameters.tolist(), strict=True))


def errors(curves: dict[str, dict[str, Curve]], parameters: dict[str, F64]) -> dict[str, dict[str, float]]:
    """Return the error in each model for every curve not fitted, with expectations from the others."""
    found: dict[str, dict[str, float]] = {name: {} for name in curves[MODELS[0]] if name not in FITTED}
    for model, mine in curves.items():
        others = [values for name, values in parameters.items() if name != model]
        fit = fit_law(gather([mine[name] for name in FITTED], SCALE, expectation=expectation_of(others)))
        for name, row in found.items():
            row[f"{model}M"] = error(mine[name], fit)
    return found


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Hold the law of `lrpath advise` to what was trained: fitted to little, it predicts the other branches.

Reads the runs of the experiments and writes `results/advise.json`. Two fits for each seed: on version 1 alone
(the main path and one decay), and on the same decay with the whole main path, which is trained when a branch begins;
each of them once more with the main path's evaluated checkpoints (`lrpath eval PLAN --main-path`) where there are any.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accumulate import add_records, same_setting
from collect import RESULTS

from megatron_lrpath.advise.advice import HeldOut, all_curves, held_out_end, upto_version
from megatron_lrpath.advise.curves import Curve
from megatron_lrpath.advise.model import Model, build_model
from megatron_lrpath.advise.predict import DECAYS, gap_intervals
from megatron_lrpath.advise.read import scale_of
from megatron_lrpath.errors import UserError
from megatron_lrpath.experiment.load import load_together
from megatron_lrpath.files import atomic_write_json
from megatron_lrpath.plan import Plan, load_plan

PLANS = Path(__file__).parents[1] / "paper" / "small"
CORPORA = {"mixture": ("tables-1-3", "table-2", "beyond-0.58", "beyond-0.58-fine"), "novels": ("novels",)}
SEEN = ("main", "branch-v1")
EVALUATED = "; main path evaluated"
ALPHA = re.compile(r"alpha([0-9.]+)")
DECAY = re.compile("|".join((*DECAYS, "knee", "multi-step")))


def checks(plan: Plan, curves: Sequence[Curve], model: Model) -> Iterator[dict[str, Any]]:
    """Yield every evaluated branch not fitted: its prediction and its gap to the plan's own branch."""
    branches = [curve for curve in curves if curve.kind == "branch" and curve.validation]
    own = {curve.version: curve for curve in branches if "/" not in curve.name}
    for curve in branches:
        if curve.name != SEEN[1]:
            yield facts(plan, held_out_end(curve, model)) | gap(model, curve, own.get(curve.version))


def along_the_path(model: Model) -> dict[str, float]:
    """Return the main path evaluations' deviation from their law and their share of a decay's gain."""
    if not model.path or not model.evaluated:
        return {}
    jitter = float(np.sqrt(np.mean(model.path[0].residuals ** 2)))
    return {"jitter": jitter, "share": float(model.share[0])}


def facts(plan: Plan, one: HeldOut) -> dict[str, Any]:
    """Return a prediction with its alpha and decay: those in its variation's name, or else the plan's own."""
    alpha, decay = ALPHA.search(one.run), DECAY.search(one.run)
    return {
        "run": one.run,
        "version": one.run.rpartition("-")[2],
        "alpha": float(alpha[1]) if alpha else plan.alpha,
        "decay": decay[0] if decay else plan.schedule.style,
        "loss": one.measured,
        "error": one.error,
        "inside": one.inside,
    }


def gap(model: Model, curve: Curve, own: Curve | None) -> dict[str, Any]:
    """Return the error of the ratio to the plan's own branch, and whether the interval contains the ratio.

    Empty for the plan's own branch, and if one of the two is not evaluated.
    """
    if own is None or own is curve or not (curve.validation and own.validation):
        return {}
    predicted = model.ends_of(curve) / model.ends_of(own) - 1
    low, high = gap_intervals(model, predicted[None, :])
    measured = curve.validation / own.validation - 1
    return {"gap_error": float(predicted[0] - measured), "gap_inside": bool(low[0] <= measured <= high[0])}


def held_out(corpus: str, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield every fit for each seed of a corpus that has been trained."""
    base, *others = load_together([PLANS / f"{name}.yaml" for name in names])
    for point in base.of("cosine"):
        mine = [one for other in [base, *others] for one in other.points if one.plan.seed == point.plan.seed]
        trained = [load_plan(one.plan.path) for one in mine if one is not point and one.plan.path.exists()]
        curves = all_curves(point.plan, trained)
        seen = [curve for curve in curves if curve.name in SEEN]
        if len(seen) != len(SEEN):
            continue
        for name, used in fits(point.plan, seen).items():
            what = {"corpus": corpus, "seed": point.plan.seed, "fit": name}
            try:
                model = build_model(used, scale_of(point.plan))
                yield what | along_the_path(model) | {"checks": list(checks(point.plan, curves, model))}
            except UserError as error:
                print(f"{what}: {error}")


def fits(plan: Plan, seen: Sequence[Curve]) -> dict[str, list[Curve]]:
    """Return the curves that the law is fitted to, by name of the fit; `seen` begins with the main path."""
    plain = [replace(seen[0], checkpoints=None), *seen[1:]]
    found = {"version 1": upto_version(plan, plain, "v1"), "main path, decay of version 1": plain}
    if seen[0].checkpoints:
        found[f"version 1{EVALUATED}"] = upto_version(plan, seen, "v1")
        found[f"main path, decay of version 1{EVALUATED}"] = list(seen)
    return found


def main() -> None:
    """Fit the law, compare it with the measurements and write the results."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    made = [one for corpus, names in CORPORA.items() for one in held_out(corpus, names)]
    path = RESULTS / "advise.json"
    kept = same_setting(RESULTS, path.name, PLANS / "tables-1-3.yaml") and path.exists()
    old = json.loads(path.read_text(encoding="utf-8"))["fits"] if kept else []
    atomic_write_json(path, {"fits": add_records(old, made, ("corpus", "seed", "fit"))})
    print(f"{len(made)} fits, {sum(len(one['checks']) for one in made)} predictions")


if __name__ == "__main__":
    main()

"""Regret of the advice: the loss of the branches that it would choose over that of the best measured ones."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from measured import RESULTS, Measured

from megatron_lrpath.advise.predict import DECAYS
from megatron_lrpath.advise.regret import Regret, Tried, regret

MEAN_ALPHAS = (0.2, 0.4, 0.6, 0.8)
"""Budgets: limits of the mean alpha of the compared versions."""
EXPERIMENTS = ("tables-1-3", "beyond-0.58", "beyond-0.58-fine")
RUN = re.compile(rf"small-(?P<experiment>{'|'.join(EXPERIMENTS[::-1])})-(?P<variation>.+)_seed\d+/.+")
OWN = ("tables-1-3", "cosine")
ELSEWHERE = re.compile(r"cosine_min_lr0.0003(?P<alpha>_alpha.+)")
"""Variations of `beyond-0.58` that have the plan's own decay: their perplexities are in table-2."""


def regrets() -> Iterator[tuple[str, int, list[int], dict[float, Regret]]]:
    """Yield fit, seed, number of measured branches by version, and regret by mean alpha, where it exists.

    A branch of any decay that the law was fitted on, for each version that has several; the last version's branch
    counts in full, as it does once a further version is appended.
    """
    measured = {name: Measured.load(name) for name in (*EXPERIMENTS, "table-2")}
    for fit in json.loads((RESULTS / "advise.json").read_text(encoding="utf-8"))["fits"]:
        columns = [column for column in by_version(fit, measured).values() if len(column) > 1]
        found = {}
        for alpha in MEAN_ALPHAS:
            taken = regret(columns, round(100 * alpha * len(columns))) if columns else None
            if taken:
                found[alpha] = Regret(alpha, *taken)
        if found:
            yield fit["fit"], fit["seed"], [len(column) for column in columns], found


def by_version(fit: Mapping[str, Any], measured: Mapping[str, Measured]) -> dict[str, list[Tried]]:
    """Return the predicted branches of a fit with measured perplexity, by version (steps: 100 alpha)."""
    columns: dict[str, list[Tried]] = {}
    for check in fit["checks"]:
        losses = measured_losses(check, measured)
        if check["decay"] in DECAYS and fit["seed"] in losses:
            loss = losses[fit["seed"]]
            one = Tried(check["run"], round(100 * check["alpha"]), loss * (1 + check["error"]), loss)
            columns.setdefault(check["version"], []).append(one)
    return columns


def measured_losses(check: Mapping[str, Any], measured: Mapping[str, Measured]) -> dict[int, float]:
    """Return the loss of a branch in nats a token by seed, from the tables of its experiment."""
    found = RUN.fullmatch(check["run"])
    experiment, variation = (found["experiment"], found["variation"]) if found else OWN
    places = [(experiment, variation)]
    if same := ELSEWHERE.fullmatch(variation):
        places.append(("table-2", f"cosine{same['alpha']}"))
    for name, point in places:
        if values := measured[name].at(point, "ours", check["version"]):
            return {seed: math.log(value) for seed, value in values.items()}
    return {}


def in_perplexity(fits: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the fits with errors as shares of the perplexity; in `advise.json` they are shares of the loss.

    A branch whose perplexity is not in the tables gets the loss of the plan's own branch of the same version;
    if that is missing too, the branch is left out.
    """
    measured = {name: Measured.load(name) for name in (*EXPERIMENTS, "table-2")}

    def converted(check: Mapping[str, Any], seed: int) -> dict[str, Any] | None:
        level = measured["tables-1-3"].at(OWN[1], "ours", check["version"])
        loss = check.get("loss") or measured_losses(check, measured).get(seed)
        if loss is None and seed in level:
            loss = math.log(level[seed])
        errors = {name: check[name] for name in ("error", "gap_error") if name in check}
        return (
            None
            if loss is None
            else {**check, **{key: math.expm1(one * loss) for key, one in errors.items()}}
        )

    return [
        {**fit, "checks": [made for check in fit["checks"] if (made := converted(check, fit["seed"]))]}
        for fit in fits
    ]


def lines() -> list[Sequence[str]]:
    """Return the table's rows: fit, seed, number of branches of each version, regret at every budget."""
    return [
        [
            fit,
            f"seed {seed}",
            " × ".join(map(str, counts)),
            *(f"{100 * found[alpha].value:.2f}%" if alpha in found else "–" for alpha in MEAN_ALPHAS),
        ]
        for fit, seed, counts, found in regrets()
    ]

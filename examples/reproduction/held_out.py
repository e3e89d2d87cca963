#!/usr/bin/env python3
"""Hold `lrpath advise` to what was trained: fitted on version 1, it predicts every branch of the later versions.

Reads the runs of the experiments of Tables 1, 2 and of the decays, writes `results/advise-*.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from collect import RESULTS

from megatron_lrpath.advise.advice import Advice, advise
from megatron_lrpath.errors import UserError
from megatron_lrpath.experiment.load import load_together
from megatron_lrpath.files import atomic_write_json
from megatron_lrpath.plan import load_plan

PLANS = Path(__file__).parents[1] / "paper" / "small"
BASE, OTHERS = "tables-1-3", ("table-2", "beyond-0.58")


def said(advice: Advice) -> dict[str, Any]:
    """The law and every branch that it had not seen."""
    checks = [
        {"run": check.run, "version": check.run.rpartition("-")[2], "error": check.error}
        for check in advice.checks
    ]
    return {"law": advice.model.fit.law.name, "fitted": advice.to_dict()["curves"], "checks": checks}


def main() -> None:
    """Fit and compare, for every seed."""
    base, *others = load_together([PLANS / f"{name}.yaml" for name in (BASE, *OTHERS)])
    for point in base.of("cosine"):
        seed = point.plan.seed
        mine = [one for other in [base, *others] for one in other.points if one.plan.seed == seed]
        trained = [load_plan(one.plan.path) for one in mine if one is not point and one.plan.path.exists()]
        try:
            advice = advise(load_plan(point.plan.path), trained, fit_on="v1")
        except UserError as error:
            print(f"seed {seed}: {error}")
            continue
        atomic_write_json(RESULTS / f"advise-seed{seed}.json", said(advice))
        print(f"seed {seed}: {len(advice.checks)} branches")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Preview branches by merging the main path's checkpoints (`lrpath merge`), and evaluate the merges.

  merge.py examples/paper/small/beyond-0.58.yaml

Writes `results/merged.json`: for each seed, decay, alpha and version the perplexity of the main path as it is, of the
merge, and of the branch that was trained with that decay. Called again it continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accumulate import add_records, same_setting
from beyond import NAME
from collect import RESULTS
from train import CONTEXTS, EVALUATE, call

from megatron_lrpath.errors import UserError
from megatron_lrpath.experiment.load import Point, load_experiment
from megatron_lrpath.files import atomic_write_json
from megatron_lrpath.launch.warm import PRELOADED
from megatron_lrpath.merge.preview import Preview, plan_preview, write_preview
from megatron_lrpath.plan import load_plan
from megatron_lrpath.runs.results import fresh_evaluation


def evaluated(preview: Preview) -> float:
    """Return the perplexity of a preview; merge and evaluate it unless that is done."""
    folder = preview.folder / "runs" / "ours" / preview.run.name
    if fresh_evaluation(folder, preview.run.last_step) is None:
        shutil.rmtree(preview.folder, ignore_errors=True)  # the rest of an interrupted call
        path = write_preview(preview)
        argv = ["--plan", str(path), "--device", "cpu", "--runs", f"ours/{preview.run.name}"]
        process = CONTEXTS["cpu"].Process(target=call, args=(EVALUATE, argv, preview.folder / "eval.log"))
        process.start()
        process.join()
    return float((fresh_evaluation(folder, preview.run.last_step) or {})["perplexity"])


def undecayed(preview: Preview) -> Preview:
    """Return the main path's last checkpoint alone, as a merge with the weights 0 and 1."""
    steps = preview.steps[-2:]
    return Preview(preview.plan, preview.run, f"{preview.run.version}-undecayed", steps, (0.0, 1.0))


def rows(point: Point, versions: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the merges of a point, for the versions whose end the main path has passed."""
    match = NAME.fullmatch(point.group)
    for version in versions if match else ():
        try:
            preview = plan_preview(load_plan(point.plan.path), version, None, None, None)
        except UserError as error:
            print(f"{point.name} {version}: {error}")
            continue
        trained = fresh_evaluation(point.plan.folder(preview.run), preview.run.last_step)
        assert match
        yield {
            "seed": point.plan.seed,
            "decay": f"{match['shape']} to {match['end']}",
            "alpha": float(match["alpha"]),
            "version": version,
            "undecayed": evaluated(undecayed(preview)),
            "merged": evaluated(preview),
            "trained": trained["perplexity"] if trained else None,
        }


def main() -> None:
    """Merge, evaluate and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", type=Path, help="an experiment of shapes, ends and alphas")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument(
        "--decays", nargs="+", default=["minus-sqrt_min_lr0_", "linear_min_lr0_"], metavar="PREFIX"
    )
    parser.add_argument("--versions", nargs="+", default=["v2", "v3", "v4"])
    args = parser.parse_args()
    CONTEXTS["cpu"].set_forkserver_preload([PRELOADED])
    points = [point for point in load_experiment(args.experiment).points if point.plan.seed in args.seeds]
    chosen = [point for point in points if point.group.startswith(tuple(args.decays))]
    made = [row for point in chosen for row in rows(point, args.versions)]
    path = RESULTS / "merged.json"
    kept = same_setting(RESULTS, path.name, args.experiment) and path.exists()
    old = json.loads(path.read_text(encoding="utf-8")) if kept else []
    atomic_write_json(path, add_records(old, made, ("seed", "decay", "alpha", "version")))


if __name__ == "__main__":
    main()

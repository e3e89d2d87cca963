#!/usr/bin/env python3
"""Write what experiments have measured so far into `results/`, a file each, and what they were measured on.

Results of the same experiments from other calls or machines are kept.

collect.py examples/paper/small/tables-1-3.yaml examples/paper/small/table-2.yaml
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from accumulate import add_csv, same_setting

from megatron_lrpath.experiment.load import Experiment, load_experiment
from megatron_lrpath.experiment.table import make_table, table_csv
from megatron_lrpath.files import atomic_write_json
from megatron_lrpath.runs.lineage import read_lineage
from megatron_lrpath.runs.results import fresh_evaluation, version_runs

RESULTS = Path(__file__).parent / "results"
SHORT = re.compile(r"([0-9a-f]{7})[0-9a-f]{33}")
"""Hash of a commit; in a lineage, `-dirty` follows it if the code was changed."""


def cpu() -> str:
    """Return the processor as the system names it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


def circumstances(experiment: Experiment, processor: str) -> dict[str, Any]:
    """Return date, code and packages of the newest start of the experiment's runs, from their lineage."""
    folders = [
        point.plan.folder(run)
        for point in experiment.points
        for paradigm in experiment.paradigms
        for run in point.plan.runs(paradigm)
    ]
    starts = [start for folder in folders for start in (read_lineage(folder) or {}).get("starts", [])]
    newest = max(starts, key=lambda start: str(start["time"]))
    packages = {name: newest["packages"][name] for name in ("torch", "megatron-core", "megatron-lrpath")}
    return {
        "date": newest["time"][:10],
        "commit": SHORT.sub(r"\1", newest["git_commit"] or "unknown"),
        "processor": processor,
        "python": newest["packages"]["python"],
        "packages": packages,
    }


def add_machine(experiment: Experiment, name: str, processor: str, keep: bool) -> None:
    """Record the machine and versions of an experiment's measurements, in addition to kept ones."""
    path = RESULTS / "machines.json"
    machines = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    here = circumstances(experiment, processor)
    others = [one for one in machines.get(name, []) if keep and one["processor"] != processor]
    atomic_write_json(path, dict(sorted({**machines, name: [*others, here]}.items())))


def add_measured(path: Path, text: str, processor: str, keep: bool) -> None:
    """Add CSV to a file of results, with a first column for the processor."""
    header, *lines = text.splitlines()
    marked = [f"processor,{header}", *(f"{processor},{line}" for line in lines)]
    add_csv(path, "\n".join(marked) + "\n", "perplexity", keep)


def domains(experiment: Experiment) -> str:
    """Return the perplexity by domain of the validation set as CSV, a line for each model and domain."""
    lines = ["seed,variation,paradigm,version,domain,perplexity"]
    for point in experiment.points:
        for paradigm in experiment.paradigms:
            for run in version_runs(point.plan, [paradigm]):
                if run.version in experiment.show:
                    evaluation = fresh_evaluation(point.plan.folder(run), run.last_step) or {}
                    found = evaluation.get("domains", {})
                    facts = f"{point.plan.seed},{point.group},{paradigm},{run.version}"
                    lines += [f"{facts},{domain},{entry['perplexity']}" for domain, entry in found.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the results of the experiments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="+", type=Path, metavar="EXPERIMENT", help="experiment files")
    parser.add_argument(
        "--processor",
        default=cpu(),
        help="what they were trained on, as 'NVIDIA H200' (default: this machine's CPU)",
    )
    args = parser.parse_args()
    for path in args.experiments:
        experiment = load_experiment(path)
        table = make_table(experiment)
        if table.known:
            keep = same_setting(RESULTS, path.stem, path)
            add_measured(RESULTS / "domains" / f"{path.stem}.csv", domains(experiment), args.processor, keep)
            add_measured(RESULTS / f"{path.stem}.csv", table_csv(table), args.processor, keep)
            add_machine(experiment, path.stem, args.processor, keep)
            print(f"{path.stem}: {table.known} of {table.wanted} perplexities")


if __name__ == "__main__":
    main()

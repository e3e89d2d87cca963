#!/usr/bin/env python3
"""Write what experiments have measured so far into `results/`, a file each, and what they were measured on.

What lies there of the same experiments from other calls or machines stays.

collect.py examples/paper/small/tables-1-3.yaml examples/paper/small/table-2.yaml
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accumulate import add_csv, same_setting

from megatron_lrpath.evaluate.targets import EVALUATION, needs_evaluation, read_json, version_runs
from megatron_lrpath.experiment.load import load_experiment
from megatron_lrpath.experiment.spec import Experiment
from megatron_lrpath.experiment.table import make_table, table_csv
from megatron_lrpath.files import atomic_write_json

RESULTS = Path(__file__).parent / "results"


def cpu() -> str:
    """The processor as the system names it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


def circumstances() -> dict[str, Any]:
    """When and on what results were collected."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    packages = {name: version(name) for name in ("torch", "megatron-core", "megatron-lrpath")}
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "cpu": cpu(),
        "python": platform.python_version(),
        "packages": packages,
    }


def add_machine(name: str, keep: bool) -> None:
    """Note on what the results of an experiment were measured, beside what those that are kept were measured on."""
    path = RESULTS / "machines.json"
    machines = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    here = circumstances()
    others = [one for one in machines.get(name, []) if keep and one["cpu"] != here["cpu"]]
    atomic_write_json(path, dict(sorted({**machines, name: [*others, here]}.items())))


def add_measured_here(path: Path, text: str, keep: bool) -> None:
    """Add CSV to a file of results, with a first column for the processor."""
    header, *lines = text.splitlines()
    marked = [f"cpu,{header}", *(f"{cpu()},{line}" for line in lines)]
    add_csv(path, "\n".join(marked) + "\n", "perplexity", keep)


def domains(experiment: Experiment) -> str:
    """Perplexity by domain of the validation set as CSV, a line for each model and domain."""
    lines = ["seed,variation,paradigm,version,domain,perplexity"]
    for point in experiment.points:
        for paradigm in experiment.paradigms:
            for run in version_runs(point.plan, [paradigm]):
                if run.version in experiment.show and not needs_evaluation(point.plan, run):
                    found = (read_json(point.plan.folder(run) / EVALUATION) or {}).get("domains", {})
                    facts = f"{point.plan.seed},{point.group},{paradigm},{run.version}"
                    lines += [f"{facts},{domain},{entry['perplexity']}" for domain, entry in found.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Collect."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="+", type=Path, metavar="EXPERIMENT", help="experiment files")
    for path in parser.parse_args().experiments:
        experiment = load_experiment(path)
        table = make_table(experiment)
        if table.known:
            keep = same_setting(RESULTS, path.stem, path)
            add_measured_here(RESULTS / "domains" / f"{path.stem}.csv", domains(experiment), keep)
            add_measured_here(RESULTS / f"{path.stem}.csv", table_csv(table), keep)
            add_machine(path.stem, keep)
            print(f"{path.stem}: {table.known} of {table.wanted} perplexities")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Show where the training losses of an experiment's trainings ended, to choose a rate by: means of the last 50 steps.

train.py examples/paper/small/rates.yaml && rates.py examples/paper/small/rates.yaml
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tables import markdown

from megatron_lrpath.experiment.load import load_experiment
from megatron_lrpath.experiment.run import experiment_tasks
from megatron_lrpath.runs.history import read_history

LAST = 50


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", type=Path, metavar="EXPERIMENT")
    lines = []
    for task in experiment_tasks(load_experiment(parser.parse_args().experiment)):
        history = read_history(task.folder)
        found = history["loss"][-LAST:]
        loss = f"{found.mean():.3f}" if len(found) else "–"
        lines.append([task.key, f"{len(history.steps)} of {task.run.steps}", loss])
    print(markdown(["training", "steps", f"mean loss of the last {LAST}"], lines), end="")


if __name__ == "__main__":
    main()

"""`lrpath status`: how far each run of a plan has come, read from its files."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from megatron_lrpath.launch.tasks import Task

HELP = "show what is done, running, interrupted or waiting"
_STYLES = {"done": "green", "running": "cyan", "interrupted": "red", "extended": "yellow", "waiting": "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The plan and the form of the answer."""
    parser.add_argument("plan", type=Path, metavar="PLAN", help="the plan (or experiment) file")
    parser.add_argument("--paradigm", choices=("ours", "ptfs", "cpt", "all"), default="all")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def execute(args: argparse.Namespace) -> int:
    """Print the states of all runs; 0."""
    import json

    from rich.console import Console

    status = collect(args.plan, args.paradigm)
    if args.json:
        print(json.dumps(status, indent=2, allow_nan=False))
    else:
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 140  # nobody's line to fit into
        steps = f"{status['done_steps']}/{status['total_steps']} steps"
        console.print(f"{status['plan']}: {steps}, in {status['output']}")
        console.print(table(status))
        for row in status["runs"]:
            if row["cause"]:
                console.print(f"{row['key']}: {row['cause']}", markup=False, soft_wrap=True)
    return 0


def collect(path: Path, paradigm: str = "all") -> dict[str, Any]:
    """The states of the runs of a plan or an experiment, as `states` gives them."""
    from megatron_lrpath.experiment.load import is_experiment, load_experiment
    from megatron_lrpath.launch.tasks import build_tasks
    from megatron_lrpath.plan import PARADIGMS, load_plan

    paradigms = PARADIGMS if paradigm == "all" else (paradigm,)
    if is_experiment(path):
        from megatron_lrpath.experiment.tasks import experiment_tasks

        experiment = load_experiment(path)
        return states(experiment.name, str(experiment.output), experiment_tasks(experiment, paradigms))
    plan = load_plan(path)
    return states(plan.name, str(plan.output), build_tasks(plan, paradigms))


def states(name: str, output: str, tasks: Sequence[Task]) -> dict[str, Any]:
    """The states as JSON-able data: `runs` (each training once), `done_steps`, `total_steps`.

    A run has `key`, `paradigm`, `run`, `same_as` (other names of this training), `state`, `waiting_for`,
    `first_step`, `step`, `last_step`, `lr`, `loss`, `seconds_per_step`, `seconds_left` (while it runs),
    `checkpoints` (steps of the complete ones) and `cause` (of an interruption, where the log names one). A plan
    that was submitted to Slurm has `job` too, see `launch.slurm.status`.
    What is not known is null.
    """
    from megatron_lrpath.launch.records import read_state
    from megatron_lrpath.launch.slurm.status import add_jobs

    by_key = {task.key: task for task in tasks}
    rows: list[dict[str, Any]] = []
    for task in tasks:
        state = read_state(task, by_key.get(task.parent or ""))
        known = state.state == "running" and state.seconds_per_step is not None
        left = (task.run.last_step - state.step) * (state.seconds_per_step or 0.0) if known else None
        rows.append(
            {
                "key": task.key,
                "paradigm": task.run.paradigm,
                "run": task.run.name,
                "same_as": [os.path.relpath(folder, output) for folder in task.aliases],
                "state": state.state,
                "waiting_for": state.waiting_for,
                "first_step": task.run.first_step,
                "step": state.step,
                "last_step": task.run.last_step,
                "lr": _finite(state.lr),
                "loss": _finite(state.loss),
                "seconds_per_step": _finite(state.seconds_per_step),
                "seconds_left": _finite(left),
                "checkpoints": state.checkpoints,
                "cause": state.cause,
            }
        )
    add_jobs(output, rows)
    return {
        "plan": name,
        "output": output,
        "done_steps": sum(max(0, row["step"] - row["first_step"]) for row in rows),
        "total_steps": sum(row["last_step"] - row["first_step"] for row in rows),
        "runs": rows,
    }


def table(status: dict[str, Any]) -> Table:
    """The states as a table."""
    from rich.table import Table
    from rich.text import Text

    from megatron_lrpath.launch.display import clock
    from megatron_lrpath.launch.slurm.status import job_text

    drawn = Table(box=None, pad_edge=False, header_style="bold")
    submitted = any("job" in row for row in status["runs"])
    titles = ("run", "state", "step", "rate", "loss", "left", "checkpoints", *(("job",) if submitted else ()))
    for title in titles:
        drawn.add_column(title, justify="right" if title in ("step", "rate", "loss", "left") else "left")
    for row in status["runs"]:
        name = " = ".join([row["key"], *row["same_as"]])
        state = f"waiting for {row['waiting_for']}" if row["waiting_for"] else row["state"]
        drawn.add_row(
            name,
            Text(state, style=_STYLES.get(row["state"], "")),
            f"{row['step']}/{row['last_step']}",
            "" if row["lr"] is None else f"{row['lr']:.3e}",
            "" if row["loss"] is None else f"{row['loss']:.4f}",
            "" if row["seconds_left"] is None else clock(row["seconds_left"]),
            _abridged(row["checkpoints"]),
            *([job_text(row["job"])] if submitted else []),
        )
    return drawn


def _abridged(steps: list[int]) -> str:
    """`20 40 60`, or with many `12: 20 … 240`."""
    words = [str(step) for step in steps]
    return " ".join(words) if len(words) <= 4 else f"{len(words)}: {words[0]} … {words[-1]}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

"""`lrpath status`: print the progress of each run of a plan, read from its files, once or repeatedly."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lrpath.commands.following import next_for, next_for_experiment, next_of_status
from megatron_lrpath.commands.options import PLAN_OR_EXPERIMENT, add_runs, number_in, paradigms_of
from megatron_lrpath.console import say_next, table_console, terminal_table
from megatron_lrpath.wording import byte_size, clock, listing, plural, short_number

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table

    from megatron_lrpath.plan import Plan
    from megatron_lrpath.runs.tasks import Task

HELP = "show which runs are done, running, interrupted or waiting"
EXAMPLE = "lrpath status examples/quickstart/plan.yaml --watch"
_STYLES = {"done": "green", "running": "cyan", "interrupted": "red", "extended": "yellow", "waiting": "dim"}
NARROW = 120  # minimum width of a terminal for the whole table, in columns
WORDS = ("run", "state", "checkpoints", "job")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plan and the output format."""
    add_runs(parser, PLAN_OR_EXPERIMENT)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--watch",
        type=number_in(0.1, 86_400, "a number of seconds from 0.1 on"),
        nargs="?",
        const=2.0,
        metavar="SECONDS",
        help="refresh every 2 seconds, until all is done or Ctrl-C",
    )


def execute(args: argparse.Namespace) -> int:
    """Print the states of all runs; return 0."""
    look = partial(collect, args.plan, partial(paradigms_of, args))
    console = table_console()
    if args.watch is not None:
        with suppress(KeyboardInterrupt):
            watch(console, look, args.watch, as_json=args.json)
    elif args.json:
        print(json.dumps(look(), indent=2, allow_nan=False))
    else:
        status = look()
        console.print(view(status, is_narrow(console)))
        say_next(next_of_status(status, args.plan, carried_on(args)))
    return 0


def carried_on(args: argparse.Namespace) -> str:
    """Return the next command for the plan or experiment."""
    from megatron_lrpath.experiment.load import is_experiment, load_experiment
    from megatron_lrpath.plan import load_plan
    from megatron_lrpath.runs.results import lies_elsewhere

    if is_experiment(args.plan):
        return next_for_experiment(load_experiment(args.plan))
    plan = load_plan(args.plan)
    if there := lies_elsewhere(args.plan, plan.output):
        return f"the same command there: {there}"
    return next_for(plan, paradigms_of(args, plan))


def is_narrow(console: Console) -> bool:
    """Return whether the terminal is too narrow for the whole table."""
    return console.width < NARROW


def view(status: dict[str, Any], narrow: bool = False) -> Group:
    """Return a line on the plan, the table of its runs, and why interrupted runs ended; `narrow`: for 80
    columns.
    """
    from rich.console import Group
    from rich.text import Text

    size = sum(row["bytes"] for row in status["runs"])
    heading = f"{status['plan']}: {status['done_steps']}/{status['total_steps']} steps, in {status['output']}"
    heading += f", checkpoints of {byte_size(size)}" if size else ""
    twins = [
        f"{row['key']} is {' and '.join(row['same_as'])}, too" for row in status["runs"] if row["same_as"]
    ]
    twins = twins if narrow else []
    reasons = [(row["key"], row["cause"] or (row["log"] and f"see {row['log']}")) for row in status["runs"]]
    reasons += [(row["key"], row["cause"]) for row in status.get("jobs", [])]
    causes = [f"{key}: {reason}" for key, reason in reasons if reason]
    unprepared = [f"fine-tuning: {status['unprepared']}"] if status.get("unprepared") else []
    elsewhere = [f"nothing in {status['output']} here: {status['elsewhere']}"] if status["elsewhere"] else []
    rewinds = [f"{row['key']}: {one}" for row in status["runs"] for one in (*row["rewinds"], *row["breaks"])]
    rewinds += [
        f"{row['key']}: trained to step {row['beyond']:,}, for versions that the plan no longer has"
        for row in status["runs"]
        if row["beyond"] is not None
    ]
    if aside := status["set_aside"]:
        rewinds.append(f"set aside by rewinds: {byte_size(aside)}, until `lrpath rewind PLAN --confirm`")
    lines = [*elsewhere, *unprepared, *causes, *rewinds, *differing(status["runs"]), *status["problems"]]
    return Group(Text(heading), table(status, narrow), *map(Text, [*twins, *lines]))


def differing(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for the runs that were trained with the same deviations from the plan's settings."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        if row["differs"]:
            alike.setdefault(tuple(row["differs"]), []).append(row["key"])
    return [
        f"{listing(keys)}: shown as trained; the plan now differs: {'; '.join(changes)}"
        for changes, keys in alike.items()
    ]


def collect(path: Path, choose: Callable[..., Sequence[str]]) -> dict[str, Any]:
    """Return the states of the runs of a plan or an experiment, see `states`.

    `choose` returns the paradigms: of an experiment if called without a plan. `unprepared` is the
    reason why a plan's fine-tunings have no steps, `elsewhere` the output's place if the command is called
    from another folder; null if neither applies. `set_aside` is the number of bytes that rewinds have set aside.
    """
    from megatron_lrpath.experiment.load import is_experiment, load_experiment
    from megatron_lrpath.plan import load_plan
    from megatron_lrpath.runs.folder import OutputFolder
    from megatron_lrpath.runs.results import lies_elsewhere
    from megatron_lrpath.runs.storage import folder_bytes
    from megatron_lrpath.runs.tasks import build_tasks

    if is_experiment(path):
        from megatron_lrpath.experiment.run import experiment_tasks

        experiment = load_experiment(path)
        plans = {point.name: point.plan for point in experiment.points}
        tasks = experiment_tasks(experiment, choose())
        found = states(experiment.name, str(experiment.output), [(task, plans[task.point]) for task in tasks])
        return found | {
            "unprepared": None,
            "elsewhere": lies_elsewhere(path, experiment.output) or None,
            "set_aside": 0,
        }
    plan = load_plan(path)
    paradigms = choose(plan)
    wanted = plan.sft is not None and set(plan.sft.paradigms) & set(paradigms)
    known = any(plan.sft_runs(name) for name in paradigms)
    missing = f"data not prepared yet (lrpath sft {path} --prepare)" if wanted and not known else None
    found = states(plan.name, str(plan.output), [(task, plan) for task in build_tasks(plan, paradigms)])
    aside = folder_bytes(OutputFolder(Path(plan.output)).set_aside)
    there = lies_elsewhere(path, plan.output) or None
    return found | {"unprepared": missing, "elsewhere": there, "set_aside": aside}


def states(name: str, output: str, planned: Sequence[tuple[Task, Plan]]) -> dict[str, Any]:
    """Return JSON-serializable data: `runs` (each training once), `done_steps`, `total_steps`.

    Args:
        name: the name of the plan or experiment.
        output: its output folder.
        planned: the trainings, each with its plan.

    A run has `key`, `paradigm`, `run`, `same_as` (other names of this training), `state`, `waiting_for`,
    `first_step`, `step`, `last_step`, `lr`, `loss`, `seconds_per_step`, `tokens_per_second`, `mfu`,
    `seconds_left` (while it runs), `checkpoints` (steps of the complete ones), `bytes` (of all of them on disk),
    `cause` (of an interruption, if the run has recorded one), `log` (the newest one of an interrupted run),
    `beyond` (the step that a main path has reached, if its plan ends earlier) and
    `differs` (where the plan differs from the plan that the run was trained with; throughput is that of the training).
    `rewinds` lists the rewinds of a main path, `breaks` its changes of machine or libraries, a clause each.
    If the plan was submitted to Slurm, a run has `job` and `next_job`, too, and `jobs` are evaluations and
    the report, see `launch.slurm.show.add_jobs`; without Slurm `jobs` is empty.
    `problems` lists files of runs that cannot be used. Unknown values are null.
    """
    from megatron_lrpath.launch.slurm.show import add_jobs
    from megatron_lrpath.runs.breaks import breaks_told
    from megatron_lrpath.runs.folder import RunFolder, read_json_object
    from megatron_lrpath.runs.lineage import changes, trained_tokens
    from megatron_lrpath.runs.rewinds import rewinds_told
    from megatron_lrpath.runs.state import read_state
    from megatron_lrpath.runs.storage import lying_in_all

    tasks = [task for task, _ in planned]
    by_key = {task.key: task for task in tasks}
    rows: list[dict[str, Any]] = []
    for task, plan in planned:
        state = read_state(task.folder, task.run, by_key.get(task.parent or ""))
        lineage = read_json_object(RunFolder(task.folder).lineage) or {}
        step_tokens = (
            trained_tokens(lineage, state.step) or task.sizes.size_of(state.step) * task.sample_tokens
        )
        known = state.state == "running" and state.seconds_per_step is not None
        pace = step_tokens / state.seconds_per_step if state.seconds_per_step else None
        left = (task.run.last_step - state.step) * (state.seconds_per_step or 0.0) if known else None
        measured = {
            "lr": state.logged.lr,
            "loss": state.logged.loss,
            "seconds_per_step": state.seconds_per_step,
        }
        measured |= {"tokens_per_second": pace, "mfu": state.logged.mfu, "seconds_left": left}
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
                **{name: one if math.isfinite(one or 0) else None for name, one in measured.items()},
                "checkpoints": state.checkpoints,
                "bytes": lying_in_all(task.checkpoints),
                "beyond": state.beyond,
                "cause": state.cause,
                "log": str(state.log) if state.log else None,
                "differs": changes(task.folder, lineage, plan, task.run),
                "rewinds": rewinds_told(lineage),
                "breaks": breaks_told(lineage),
            }
        )
    jobs = add_jobs(output, rows, tasks)
    return {
        "plan": name,
        "output": output,
        "done_steps": sum(max(0, row["step"] - row["first_step"]) for row in rows),
        "total_steps": sum(row["last_step"] - row["first_step"] for row in rows),
        "runs": rows,
        "jobs": jobs,
        "problems": file_problems(tasks),
    }


def file_problems(tasks: Sequence[Task]) -> list[str]:
    """Return damaged files of runs, a line each, and the number of files without a checksum, in one line."""
    from megatron_lrpath.runs.folder import inspect
    from megatron_lrpath.runs.history import HistoryTail

    found: list[str] = []
    unverified: list[str] = []
    for task in tasks:
        problems, names = inspect(task.folder)
        tail = HistoryTail(task.folder)
        tail.poll()
        if tail.unreadable:
            problems.append(f"{tail.path.name}: {plural(tail.unreadable, 'unreadable line')} left out")
        found += [f"{task.key}: {problem}" for problem in problems]
        unverified += [f"{task.key}/{name}" for name in names]
    if unverified:
        found.append(
            f"note: {plural(len(unverified), 'file')} of an earlier version without a checksum, read unverified "
            f"({unverified[0]}{', …' if unverified[1:] else ''})"
        )
    return found


def table(status: dict[str, Any], narrow: bool = False) -> Table:
    """Return the states as a table: the columns with content, only the most important ones if `narrow`."""
    from rich.text import Text

    from megatron_lrpath.launch.slurm.show import job_text

    names, rows = list(titles(narrow)), []
    for row in status["runs"]:
        cells = {**measured_cells(row), "run": row["key"], "step": f"{row['step']}/{row['last_step']}"}
        if row["same_as"] and not narrow:
            cells["run"] = " = ".join([row["key"], *row["same_as"]])
        state = f"waiting for {row['waiting_for']}" if row["waiting_for"] else row["state"]
        cells["state"] = Text(state, style=_STYLES.get(row["state"], ""))
        cells["job"] = job_text(row.get("job"), row.get("next_job"))
        rows.append(cells)
    for row in status.get("jobs", []):
        style = _STYLES.get(row["state"], "red" if row["state"] == "missing" else "")
        job = job_text(row["job"])
        rows.append({"run": row["key"], "state": Text(row["state"], style=style), "job": job})
    shown = [name for name in names if any(cells.get(name) for cells in rows)]
    align = ("L" if name == "run" else "l" if name in WORDS else "R" for name in shown)
    return terminal_table(shown, "".join(align), ([cells.get(name, "") for name in shown] for cells in rows))


def titles(narrow: bool) -> tuple[str, ...]:
    """Return the titles of the table's columns."""
    if narrow:
        return "run", "state", "step", "loss", "tokens/s", "MFU", "left", "saves", "job"
    return "run", "state", "step", "rate", "loss", "tokens/s", "MFU", "left", "checkpoints", "on disk", "job"


def measured_cells(row: dict[str, Any]) -> dict[str, Any]:
    """Return the numeric cells of a run; empty if unknown."""
    steps = [str(step) for step in row["checkpoints"]]
    return {
        "rate": "" if row["lr"] is None else f"{row['lr']:.3e}",
        "loss": "" if row["loss"] is None else f"{row['loss']:.4f}",
        "tokens/s": "" if row["tokens_per_second"] is None else short_number(row["tokens_per_second"]),
        "MFU": "" if row["mfu"] is None else f"{row['mfu']:.1%}",
        "left": "" if row["seconds_left"] is None else clock(row["seconds_left"]),
        "checkpoints": " ".join(steps) if len(steps) <= 4 else f"{len(steps)}: {steps[0]} … {steps[-1]}",
        "saves": f"{len(steps)}" if steps else "",
        "on disk": byte_size(row["bytes"]) if row["bytes"] else "",
    }


def watch(
    console: Console, collect: Callable[[], dict[str, Any]], seconds: float, as_json: bool = False
) -> None:
    """Print the result of `collect` every `seconds` until all runs are done or Ctrl-C.

    If the output is not a terminal, or is JSON (a line each), only changes are printed.
    """
    from rich.live import Live

    if as_json or not console.is_terminal:
        before = None
        for status in statuses(collect, seconds):
            # Changes of states and steps are printed, changes of pace alone are not.
            progress = [(row["key"], row["state"], row["step"]) for row in status["runs"]]
            progress += [(row["key"], row["state"], 0) for row in status["jobs"]]
            if progress != before:
                if as_json:
                    print(json.dumps(status, allow_nan=False), flush=True)
                else:
                    console.print(view(status), soft_wrap=True)
            before = progress
        return
    with Live(console=console, auto_refresh=False) as live:
        for status in statuses(collect, seconds):
            live.update(view(status, is_narrow(console)), refresh=True)


def statuses(collect: Callable[[], dict[str, Any]], seconds: float) -> Iterator[dict[str, Any]]:
    """Yield the status now and every `seconds`, and finally when all is done."""
    while True:
        status = collect()
        yield status
        others = {row["state"] for row in status.get("jobs", [])}
        if all(row["state"] == "done" for row in status["runs"]) and not others & {"running", "waiting"}:
            return
        time.sleep(seconds)

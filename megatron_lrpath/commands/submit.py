"""`lrpath submit`: run a plan as Slurm jobs."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lrpath.commands.options import (
    PLAN_OR_EXPERIMENT,
    WRITTEN,
    add_runs,
    add_set,
    overridden,
    paradigms_of,
)
from megatron_lrpath.console import say_next, table_console, terminal_table
from megatron_lrpath.wording import duration, hours_text, plural, short_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.tree import Tree

    from megatron_lrpath.launch.slurm.compare import Decision
    from megatron_lrpath.launch.slurm.jobs import Job
    from megatron_lrpath.launch.slurm.ledger import SubmittedPlan
    from megatron_lrpath.launch.slurm.settings import Settings
    from megatron_lrpath.launch.slurm.submit import Submission
    from megatron_lrpath.plan import Plan
    from megatron_lrpath.readiness import Request

HELP = "submit a plan (or experiment) to Slurm; a second call submits only what is missing"
EXAMPLE = "lrpath submit plan.yaml --paradigm ours --nodes 4 --time 1-00:00:00 --dry-run"
TAKES_EXTRA = True  # Megatron arguments for every training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plan, the selection of runs, and an option for every setting of the cluster."""
    from megatron_lrpath.launch.slurm.settings import SETTINGS

    add_runs(parser, PLAN_OR_EXPERIMENT, "only this run, and those it starts from")
    add_set(parser, WRITTEN)
    parser.add_argument("--dry-run", action="store_true", help="print jobs, graph and scripts, no more")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--settings", type=Path, metavar="FILE", help="settings of the cluster")
    group = parser.add_argument_group("settings of the cluster", "each overrides the settings file")
    for setting in SETTINGS:
        group.add_argument(setting.option, metavar=setting.kind.upper(), help=setting.about)


def execute(args: argparse.Namespace) -> int:
    """Submit, or show what would be submitted; return 0. Raise UserError (status 2) if something must be
    fixed first.
    """
    from megatron_lrpath.experiment.load import is_experiment, load_experiment
    from megatron_lrpath.launch.slurm.settings import read_settings, within_job
    from megatron_lrpath.launch.slurm.submit import Submission
    from megatron_lrpath.readiness import CLUSTER, Request, fetch_archived, require_ready

    settings = within_job(read_settings(args.settings, vars(args)), os.environ)
    extra = tuple(args.extra)

    def request_for(paradigms: tuple[str, ...]) -> Request:
        return Request(paradigms, (args.run,) if args.run else (), extra=extra, where=CLUSTER)

    if not args.set and is_experiment(args.plan):
        from megatron_lrpath.experiment.run import experiment_request, experiment_submission

        experiment, paradigms = load_experiment(args.plan), paradigms_of(args)
        submission = experiment_submission(experiment, settings, paradigms, args.run, extra)
        request, follow = experiment_request(experiment, request_for(paradigms)), args.plan
    else:
        submitted, follow = submitted_plan(args, settings, request_for)
        paradigms = paradigms_of(args, submitted.plan)
        submission = Submission.of(submitted, settings, paradigms, args.run, extra)
        request = request_for(paradigms)
    check = partial(require_ready, [submitted.plan for submitted in submission.plans], request)
    if args.dry_run:
        try:
            show_dry_run(submission, args.json)
            sys.stdout.flush()
        finally:  # raises last, with all reasons that prevent the submission
            check()
        if not args.json:
            say_next("the same command without --dry-run")
        return 0
    if not args.set:  # with --set it was checked before it was written
        check()
    fetch_archived([submitted.plan for submitted in submission.plans], request)
    decided = submission.carry_out()
    rows = [row(submission, decision, number) for decision, number in decided]
    costs = cost(submission, [decision for decision, _ in decided])
    if args.json:
        print(json.dumps({"jobs": rows, "cost": costs}, indent=2))
    else:
        show_table(submission, rows)
        for one in costs:
            print(cost_text(one))
        say_next(f"lrpath status {shlex.quote(str(follow))}")
    return 0


def submitted_plan(
    args: argparse.Namespace, settings: Settings, request_for: Callable[[tuple[str, ...]], Request]
) -> tuple[SubmittedPlan, Path]:
    """Return the plan as submitted, and the file to pass to `lrpath status`.

    With --set this is OUTPUT/plan.yaml, which is written after the plan was checked (not for --dry-run).
    """
    from megatron_lrpath.launch.slurm.ledger import SubmittedPlan
    from megatron_lrpath.readiness import require_ready

    changed = overridden(args, settings.output)
    if changed is None:
        submitted = SubmittedPlan.of(args.plan, settings.data, settings.output)
        return submitted, submitted.latest if settings.data or settings.output else args.plan
    data = None if settings.data is None else os.path.abspath(settings.data)
    submitted = SubmittedPlan.moved(changed.asked, changed.body.encode(), data)
    changed = changed.moved(submitted.plan.data, submitted.plan.tokenizer, submitted.text.decode())
    if not args.dry_run:
        require_ready([changed.asked], request_for(paradigms_of(args, changed.asked)))
        changed.write()
        submitted = SubmittedPlan(changed.plan, submitted.text)  # later messages refer to the file
    return submitted, changed.path


def row(submission: Submission, decision: Decision, number: int | None) -> dict[str, Any]:
    """Return a job for the table and for JSON."""
    place = decision.job.allocation
    return {
        "key": decision.job.key,
        "kind": decision.job.kind,
        "action": decision.action,
        "job": number,
        "nodes": place.nodes,
        "processes_per_node": place.per_node,
        "waits_for": [{"key": wait.key, "step": wait.step} for wait in decision.job.waits],
        "arguments": [*place.arguments, *submission.extra] if decision.job.kind != "report" else [],
    }


def show_dry_run(submission: Submission, as_json: bool) -> None:
    """Print what would be submitted: the jobs, the graph, and every script with the call of sbatch."""
    from rich.console import Console

    decisions = submission.look()
    rows = [row(submission, decision, decision.old) for decision in decisions]
    for decision, shown in zip(decisions, rows, strict=True):
        if decision.is_new:
            files, waits = submission.files(decision.job), decision.job.waits
            branch = any(wait.step is not None for wait in waits)
            kind = "afterany" if branch or decision.job.kind == "report" else "afterok"
            keys = ":".join(wait.key for wait in waits)  # placeholders for their jobs' numbers
            dependency = [f"--dependency={kind}:{keys}"] if waits else []
            shown["sbatch"] = ["sbatch", *files.options, *dependency, str(files.script_file)]
            shown["script"], shown["spec"] = files.script, files.spec
    costs = cost(submission, decisions)
    if as_json:
        print(json.dumps({"jobs": rows, "cost": costs}, indent=2))
        return
    show_table(submission, rows)
    console = Console(highlight=False)
    for one in costs:
        console.print(cost_text(one), markup=False, soft_wrap=True)
    console.print(graph(submission))
    for shown in rows:
        if "script" in shown:
            console.out(f"\n# {shlex.join(shown['sbatch'])}\n{shown['script']}", end="", highlight=False)


def cost(submission: Submission, decisions: list[Decision]) -> list[dict[str, Any]]:
    """Return the remaining training, by plan: steps, tokens, GPU hours and wall time at the measured pace.

    Without a measurement they follow from the kind of GPU at an assumed utilization; both are omitted
    without GPUs.
    """
    from megatron_lrpath.launch.layouts import MFU
    from megatron_lrpath.runs.checkpoints import latest_step

    by_plan: dict[str, list[Job]] = {}
    for decision in decisions:
        if decision.job.kind == "train" and decision.action != "done":
            by_plan.setdefault(str(decision.job.plan.path), []).append(decision.job)
    found = []
    for jobs in by_plan.values():
        plan, steps, tokens = jobs[0].plan, 0, 0
        for task in (job.task for job in jobs if job.task is not None):
            last, done = task.run.last_step, max(task.run.first_step, latest_step(task.checkpoints) or 0)
            steps, tokens = steps + last - done, tokens + task.tokens(min(done, last), last)
        one = {"plan": plan.name, "steps": steps, "tokens": tokens, "mfu": MFU}
        found.append(one | time_of(plan, tokens, jobs, bool(submission.settings.gpus_per_node)))
    return found


def time_of(plan: Plan, tokens: int, jobs: list[Job], gpus: bool) -> dict[str, Any]:
    """Return hours for these tokens, and seconds until the last version of these jobs is trained, by their
    basis.
    """
    from megatron_lrpath.launch.estimate import estimate_of
    from megatron_lrpath.launch.layouts import PEAK, gpu_seconds, seconds_per_step

    versions = [job.task for job in jobs if job.task is not None and not job.task.run.is_sft]
    left = estimate_of(plan, versions)
    if left.pace is not None and left.pace.measured:
        hours = tokens / left.pace.tokens * left.pace.seconds * left.pace.processes / 3600
        return {
            "gpu_hours": {"measured": hours},
            "wall_seconds": {"measured": left.wall},
            "pace": {"basis": left.pace.basis, "seconds_per_step": left.pace.seconds, "unit": left.pace.unit},
        }
    peaks = PEAK if gpus else {}
    world = jobs[0].allocation.world_size
    return {
        "gpu_hours": {name: gpu_seconds(plan, tokens, peak) / 3600 for name, peak in peaks.items()},
        "wall_seconds": {
            name: left.chain / plan.batch.tokens * seconds_per_step(plan, world, peak)
            for name, peak in peaks.items()
        },
        "pace": None,
    }


def cost_text(one: dict[str, Any]) -> str:
    """Return the cost of a plan, a line for each part."""
    text = (
        f"{one['plan']}: {plural(one['steps'], 'step')} left to train, {short_number(one['tokens'])} tokens"
    )
    pace, wall = one["pace"], one["wall_seconds"]
    unit = pace["unit"] if pace else "GPU"
    times = [
        f"{hours_text(hours, unit)}{f' on {name}' if pace is None else ''} ({duration(wall[name])} when no job waits)"
        for name, hours in one["gpu_hours"].items()
    ]
    if not times:
        return text
    basis = f"at {pace['seconds_per_step']:.3g} s a step, {pace['basis']}" if pace else ""
    basis = basis or f"computed for {one['mfu']:.0%} of the peak"
    return "\n  ".join([text, *times, basis])


def show_table(submission: Submission, rows: list[dict[str, Any]]) -> None:
    """Print the jobs as a table."""
    titles = ("job", "number", "", "nodes", "waits for")
    table = terminal_table(titles, "LRLRl")
    for shown in rows:
        place = f"{shown['nodes']} × {shown['processes_per_node']}"
        waits = ", ".join(
            wait["key"] if wait["step"] is None else f"{wait['key']} at step {wait['step']}"
            for wait in shown["waits_for"]
        )
        waits = "all evaluations" if shown["kind"] == "report" and shown["waits_for"] else waits
        number = "" if shown["job"] is None else str(shown["job"])
        table.add_row(shown["key"], number, shown["action"], place, waits)
    console = table_console()
    heading = (
        f"{submission.name}: {plural(len(rows), 'job')} (nodes × processes), results in {submission.output}"
    )
    console.print(heading, markup=False, soft_wrap=True)
    console.print(table)
    layout: list[str] = next((shown["arguments"] for shown in rows if shown["kind"] == "train"), [])
    if layout:
        console.print(f"layout: {' '.join(layout)}", markup=False, soft_wrap=True)


def graph(submission: Submission) -> Tree:
    """Return the graph as a tree: each job below the one it waits for, the report below the plan."""
    from rich.tree import Tree

    tree = Tree(submission.name)
    nodes: dict[str, Tree] = {}
    for job in submission.jobs:
        wait = job.waits[0] if job.waits and job.kind != "report" else None
        step = f" from step {wait.step}" if wait and wait.step is not None else ""
        label = f"{job.key}{step}" if job.kind != "report" else "report after all"
        nodes[job.key] = (nodes[wait.key] if wait else tree).add(label)
    return tree

"""`lrpath report`: the page with tables and figures of a plan's runs."""

from __future__ import annotations

import argparse
import shlex
from datetime import datetime
from pathlib import Path

from megatron_lrpath.commands.options import PLAN_OR_EXPERIMENT, add_runs, paradigms_of
from megatron_lrpath.runs.folder import OutputFolder

HELP = "write a page with tables and figures of what has been trained"
EXAMPLE = "lrpath report examples/quickstart/plan.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plan, and the report's folder."""
    add_runs(parser, PLAN_OR_EXPERIMENT)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the report (default: OUTPUT/report of the plan)"
    )


def execute(args: argparse.Namespace) -> int:
    """Write the report, print its main table and the page's path; return 0."""
    from rich.console import Console

    from megatron_lrpath.experiment.load import is_experiment, load_experiment
    from megatron_lrpath.experiment.table import make_table, show_table, write_table
    from megatron_lrpath.launch.estimate import cost_lines, estimate
    from megatron_lrpath.plan import load_plan
    from megatron_lrpath.report.page import make_report, show, write_report

    if is_experiment(args.plan):
        experiment = load_experiment(args.plan)
        table = make_table(experiment)
        page = write_table(table, args.output or OutputFolder(experiment.output).report)
        show_table(table, page, Console())
        return 0
    plan, now = load_plan(args.plan), datetime.now().astimezone()
    paradigms = paradigms_of(args, plan)
    left = estimate(plan, paradigms)
    report = make_report(plan, now, paradigms, "; ".join(cost_lines(left, now)) if left.steps else "")
    page = write_report(report, args.output or OutputFolder(Path(plan.output)).report)
    show(report, page, Console())
    if not report.gaps:  # they name what to do
        print(f"next: lrpath export {shlex.quote(str(args.plan))}, or new data: lrpath update")
    return 0

"""`lrpath doctor`: check whether this machine can train, and what a plan lacks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lrpath.commands.options import add_plan
from megatron_lrpath.console import quiet, terminal_table

if TYPE_CHECKING:
    from megatron_lrpath.readiness import Finding

HELP = "check this machine (versions, GPUs, NCCL, disk) and what a plan needs (tokenizer, data, memory)"
EXAMPLE = "lrpath doctor examples/quickstart/plan.yaml"
MARKS = {
    "ok": "[green]ok[/]",
    "info": "[dim]–[/]",
    "warning": "[yellow]warning[/]",
    "failed": "[red]FAILED[/]",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plan, and the output format."""
    add_plan(parser, "the plan file (default: only the machine)", optional=True)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def execute(args: argparse.Namespace) -> int:
    """Check and print; return 0, or 1 if a check failed."""
    quiet()
    from megatron_lrpath.doctor import machine_checks, plan_checks
    from megatron_lrpath.readiness import worst

    machine = machine_checks(Path.cwd())
    plan = plan_checks(args.plan) if args.plan else []
    failed = worst([*machine, *plan]) == "failed"
    if args.json:
        parts = {"machine": machine, "plan": plan}
        answer = {name: [asdict(check) for check in checks] for name, checks in parts.items()}
        print(json.dumps({"ok": not failed, **answer}, indent=2, ensure_ascii=False))
    else:
        show("machine", machine)
        if plan:
            print()
            show(str(args.plan), plan)
    return 1 if failed else 0


def show(title: str, checks: Sequence[Finding]) -> None:
    """Print a table; advice is below each finding."""
    from rich.console import Console
    from rich.text import Text

    table = terminal_table(("check", "", "found"), "lll", title=Text(title), title_justify="left")
    for check in checks:
        advice = f"\n→ {check.advice}" if check.advice else ""
        table.add_row(Text(check.name), MARKS[check.status], Text(check.found + advice, overflow="fold"))
    Console().print(table)

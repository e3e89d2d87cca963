"""The check of a plan before a process starts: its arguments, data and output, and the machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lrpath.console import say, warn
from megatron_lrpath.errors import UserError
from megatron_lrpath.launch.resources import sizes_left
from megatron_lrpath.plan import PARADIGMS, Plan
from megatron_lrpath.readiness import machine
from megatron_lrpath.readiness.arguments import argument_checks, effect_checks
from megatron_lrpath.readiness.data import chat_checks, data_checks, made_checks, tokenizer_check
from megatron_lrpath.readiness.finding import FAILED, INFO, WARNING, Finding
from megatron_lrpath.readiness.output import (
    fetch_parents,
    identity_checks,
    parent_checks,
    renamed_checks,
    renamed_versions,
    weights_checks,
)
from megatron_lrpath.runs.tasks import Task, build_tasks, with_ancestors

ANYWHERE, HERE, CLUSTER = "anywhere", "here", "cluster"


@dataclass(frozen=True)
class Request:
    """The planned use of a plan.

    Attributes:
        paradigms, runs: the selection; with `runs` those runs and their ancestors.
        fine_tunings: None without fine-tunings, "only" for fine-tunings alone.
        extra: Megatron arguments in addition to the plan's.
        device, nproc: of the processes, if they are to start here; `nproc` None: their number is open.
        evaluate: whether the versions are evaluated at the end.
        where: HERE, CLUSTER (its memory and GPUs are not here), or ANYWHERE (only files are checked).
    """

    paradigms: tuple[str, ...] = PARADIGMS
    runs: tuple[str, ...] = ()
    fine_tunings: str | None = "too"
    extra: tuple[str, ...] = ()
    device: str = "auto"
    nproc: int | None = None
    evaluate: bool = True
    where: str = HERE

    def tasks(self, plan: Plan) -> list[Task]:
        """Return the requested trainings, parents before children."""
        tasks = build_tasks(plan, self.paradigms, fine_tunings=self.fine_tunings is not None)
        if not self.runs:
            return tasks
        wanted = {task.key for name in self.runs for task in with_ancestors(tasks, plan, name)}
        return [task for task in tasks if task.key in wanted]

    def todo(self, tasks: Sequence[Task]) -> list[Task]:
        """Return the tasks that are not complete and of the requested kind."""
        return [
            task for task in tasks if not task.complete and (task.run.is_sft or self.fine_tunings != "only")
        ]

    def tunes(self, plan: Plan) -> bool:
        """Return whether fine-tunings of the plan are requested."""
        named = not self.runs or any(name.startswith("sft") for name in self.runs)
        return bool(
            self.fine_tunings and named and plan.sft and set(plan.sft.paradigms) & set(self.paradigms)
        )


def check_plan(plan: Plan, request: Request, known: dict[Path, str] | None = None) -> list[Finding]:
    """Run every check, in seconds; write to no run's folder and start no process.

    Args:
        plan: the plan.
        request: the planned use of it.
        known: fingerprints of datasets that were read for other plans.

    Raises:
        UserError: the plan has no such run.
    """
    tasks = request.tasks(plan)
    todo = request.todo(tasks)
    findings = argument_checks(plan, [task.run for task in todo], request.extra)
    extra = () if findings else request.extra
    findings += effect_checks(plan, extra) if todo else []
    tokenizer, vocabulary = tokenizer_check(plan)
    findings += [tokenizer] if todo else []
    renamed = renamed_versions(plan)
    names = {one.new: one.old for one in renamed}
    opened = data_checks(plan, [task.run for task in todo], request.evaluate, names, known)
    findings += opened.findings + made_checks(plan)
    findings += chat_checks(plan) if request.tunes(plan) and todo else []
    findings += renamed_checks(plan, renamed)
    going_on = {task.key for task in todo} | {
        task.parent for task in todo if task.parent and not task.run.is_sft
    }
    findings += identity_checks(plan, tasks, opened.slices, going_on, extra)
    findings += parent_checks(plan, todo, tasks)
    findings += machine.optimizer_checks(plan, request.where != ANYWHERE) if todo else []
    if request.where != ANYWHERE and todo:
        findings += weights_checks(plan, todo, extra)
        findings += [
            machine.output_check(Path(plan.output)),
            machine.room_check(plan, todo, vocabulary, request.where == HERE),
        ]
    if request.where == HERE and todo:
        findings.append(machine.process_check(plan, request.device, request.nproc, extra, sizes_left(todo)))
        findings += machine.memory_checks(plan, vocabulary, request.device, request.nproc, extra)
    return findings


def fetch_archived(plans: Iterable[Plan], request: Request) -> None:
    """Fetch the checkpoints that the request starts from and only the plans' archives have.

    Raises:
        UserError: an archive does not answer, or its copy is damaged.
    """
    for plan in plans:
        if plan.archive is not None:
            tasks = request.tasks(plan)
            fetch_parents(plan, request.todo(tasks), tasks)


def require_ready(plans: Iterable[Plan], request: Request) -> None:
    """Check the plans before any process starts; print warnings and notes.

    Raises:
        UserError: lists all problems in one message.
    """
    known: dict[Path, str] = {}
    found = [(plan, check_plan(plan, request, known)) for plan in plans]
    refuse(found)
    tell(finding for _, findings in found for finding in findings)


def tell(findings: Iterable[Finding]) -> None:
    """Print warnings and notes, each once."""
    for status, line in dict.fromkeys((finding.status, finding.line) for finding in findings):
        if status == WARNING:
            warn(line)
        elif status == INFO:
            say(f"note: {line}")


def refuse(found: Sequence[tuple[Plan, Sequence[Finding]]], missing_too: bool = True) -> None:
    """Raise UserError with all failed findings; without `missing_too`, missing files do not count."""
    messages = []
    told: set[str] = set()
    for plan, findings in found:
        lines = [one.line for one in findings if one.status == FAILED and (missing_too or not one.is_missing)]
        new = [line for line in dict.fromkeys(lines) if line not in told]
        told |= set(new)
        if len(new) == 1:
            messages.append(f"{plan.path}: {new[0]}")
        elif new:
            messages.append("\n  ".join([f"{plan.path}: {len(new)} problems must be fixed first", *new]))
    if messages:
        raise UserError("\n".join(messages))

"""One check of a plan before anything starts: arguments, data, what lies in the output, and the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lrpath.console import warn
from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import PARADIGMS, Plan
from megatron_lrpath.readiness import data, identity, machine
from megatron_lrpath.readiness.finding import FAILED, WARNING, Finding
from megatron_lrpath.runs.tasks import Task, build_tasks, with_ancestors

ANYWHERE, HERE, CLUSTER = "anywhere", "here", "cluster"


@dataclass(frozen=True)
class Request:
    """What is about to be done with a plan.

    Attributes:
        paradigms, run: what of it; with `run` that one and its ancestors.
        only_sft: its fine-tunings alone.
        extra: Megatron arguments beside the plan's.
        device, nproc: of the processes, where they are to start here; None leaves their number open.
        evaluate: whether the versions are evaluated at the end.
        where: HERE, CLUSTER (its memory and GPUs are not here), or ANYWHERE (the files alone count).
    """

    paradigms: tuple[str, ...] = PARADIGMS
    run: str | None = None
    only_sft: bool = False
    extra: tuple[str, ...] = ()
    device: str = "auto"
    nproc: int | None = None
    evaluate: bool = True
    where: str = HERE

    def tasks(self, plan: Plan) -> list[Task]:
        """The trainings that are asked for, parents before children."""
        tasks = build_tasks(plan, self.paradigms)
        return with_ancestors(tasks, plan, self.run) if self.run else tasks

    def todo(self, tasks: Sequence[Task]) -> list[Task]:
        """Those of them that are not complete."""
        return [task for task in tasks if not task.complete and (task.run.is_sft or not self.only_sft)]


def check_plan(plan: Plan, request: Request) -> list[Finding]:
    """Every check, in seconds; nothing is written and no process started.

    Raises:
        UserError: the plan has no such run.
    """
    tasks = request.tasks(plan)
    todo = request.todo(tasks)
    runs = [task.run for task in todo]
    findings, vocabulary = data.tokenizer_checks(plan) if todo else ([], data.USUAL_VOCABULARY)
    opened = data.data_checks(plan, runs, request.evaluate)
    findings += opened.findings
    if plan.sft is not None and set(plan.sft.paradigms) & set(request.paradigms) and todo:
        findings += data.chat_checks(plan)
    findings += identity.identity_checks(plan, opened.slices, {task.key for task in todo}, request.extra)
    findings += identity.parent_checks(tasks)
    if request.where != ANYWHERE and todo:
        findings += [machine.output_check(Path(plan.output)), machine.room_check(plan, todo, vocabulary)]
    if request.where == HERE and todo:
        findings.append(machine.process_check(plan, request.device, request.nproc, request.extra))
        findings.append(machine.memory_check(plan, vocabulary, request.device))
    return findings


def require_ready(plan: Plan, request: Request) -> None:
    """Stop before any process starts where something is wrong; what is only doubtful is said.

    Raises:
        UserError: everything that is wrong, in one message.
    """
    findings = check_plan(plan, request)
    if failed := [finding for finding in findings if finding.status == FAILED]:
        raise UserError(refusal(plan, failed))
    for finding in findings:
        if finding.status == WARNING:
            warn(finding.line)


def refusal(plan: Plan, failed: Sequence[Finding]) -> str:
    """The message about what keeps a plan from being carried out."""
    if len(failed) == 1:
        return f"{plan.path}: {failed[0].line}"
    lines = "\n".join(f"  {finding.line}" for finding in failed)
    return f"{plan.path}: {len(failed)} things are to be mended first; nothing was started\n{lines}"

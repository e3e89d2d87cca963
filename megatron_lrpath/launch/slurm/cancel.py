"""Ends a plan's jobs: those that wait at once, running trainings after they have saved."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from megatron_lrpath.errors import UserError
from megatron_lrpath.launch.slurm import commands
from megatron_lrpath.launch.slurm.ledger import Entry, Ledger, dependents
from megatron_lrpath.launch.tasks import build_tasks, identity
from megatron_lrpath.plan import Plan, Run


def cancel(ledger: Ledger, keys: Collection[str], now: bool) -> list[tuple[Entry, str]]:
    """End the jobs of the trainings `keys`, with their evaluations and what waits for them, and say how.

    With all jobs the report's goes too. Raises UserError where Slurm's commands fail.
    """
    entries = ledger.entries()
    queue = commands.queue() if entries else {}
    chosen = [entry for entry in entries if entry.key.removeprefix("eval/") in keys]
    waiting = [other for entry in chosen for other in dependents(entries, entry.number)]
    numbers = {entry.number for entry in [*chosen, *waiting] if entry.number in queue}
    alive = [entry for entry in entries if entry.number in numbers]
    for entry in alive:  # before anything ends: a job that ends by itself must not come back
        mark = ledger.cancel_mark(entry.number)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    trains = {entry.number for entry in alive if entry.target and queue[entry.number].state == "RUNNING"}
    saving = set() if now else trains
    commands.cancel([entry.number for entry in alive if entry.number not in saving])
    for number in saving:
        commands.ask_to_save(number)
    return [(entry, "saves and ends" if entry.number in saving else "ended") for entry in alive]


def plan_keys(plan: Plan, paradigms: Sequence[str], run: str | None) -> set[str]:
    """The trainings of a plan's paradigms, or of one run. Raises UserError for an unknown run."""
    if run is None:
        return {task.key for task in build_tasks(plan, paradigms)}
    runs = [plan.run(paradigms[0], run)] if len(paradigms) == 1 else found(plan, paradigms, run)
    return {"/".join(identity(one)) for one in runs}


def found(plan: Plan, paradigms: Sequence[str], name: str) -> list[Run]:
    """The runs of that name in any of the paradigms."""
    runs = [one for paradigm in paradigms for one in plan.runs(paradigm) if one.name == name]
    if not runs:
        raise UserError(f"--run {name}: there is no such run; `lrpath plan {plan.path}` lists them")
    return runs

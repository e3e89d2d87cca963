"""Refuses a plan whose output holds another plan's jobs or trainings: jobs read the copy submitted last."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import chain

from megatron_lrpath.errors import PlanError, UserError
from megatron_lrpath.launch.slurm.snapshot import Snapshot
from megatron_lrpath.plan import PARADIGMS, Plan, differences, load_plan
from megatron_lrpath.training.lineage import read_lineage

SHOWN = 3  # differences that the message names


@dataclass(frozen=True)
class Conflict:
    """A training of another plan: its key, what there is of it, and what differs."""

    key: str
    state: str
    changes: list[str]


def check_output(snapshot: Snapshot, alive: Collection[str]) -> None:
    """Raises UserError where a training in the plan's output would not be this plan's.

    `alive` are the trainings (`paradigm/run`) that have a job waiting or running, an evaluation's too. A plan
    with more versions, in other folders or with another layout is the same (see `plan.identity`); a changed one
    is taken as long as nothing of what was changed has begun or is in the queue.
    """
    found = next(chain(_begun(snapshot.plan), _queued(snapshot, alive)), None)
    if found is None:
        return
    more = f"; and {len(found.changes) - SHOWN} more" if len(found.changes) > SHOWN else ""
    end = f", or end its jobs first (lrpath cancel {snapshot.latest})" if found.state != "was trained" else ""
    raise UserError(
        f"{snapshot.plan.output} is another plan's output: {found.key} {found.state} there under other settings "
        f"({'; '.join(found.changes[:SHOWN])}{more}). Nothing was submitted. Give {snapshot.plan.path} an output of "
        f"its own (--output, LRPATH_OUTPUT, or `output` in the plan){end}."
    )


def _begun(plan: Plan) -> Iterator[Conflict]:
    """Trainings in the output that were started under another plan; they would refuse to go on."""
    for paradigm in PARADIGMS:
        for run in (*plan.runs(paradigm), *plan.sft_runs(paradigm)):
            lineage = read_lineage(plan.folder(run)) if run.same_as is None else None
            if lineage and (changes := differences(lineage["identity"], plan.identity(run))):
                yield Conflict(f"{paradigm}/{run.name}", "was trained", changes)


def _queued(snapshot: Snapshot, alive: Collection[str]) -> Iterator[Conflict]:
    """Trainings with a job that would be others under this plan than under the one submitted last."""
    try:
        before = load_plan(snapshot.latest) if alive and snapshot.latest.is_file() else None
    except PlanError:
        return  # nothing that a job could read
    if before is None:
        return
    # a path alone, which --data may have moved; where a training has begun it counts
    tokenizer = replace(snapshot.plan.tokenizer, model=before.tokenizer.model)
    plan = replace(snapshot.plan, tokenizer=tokenizer)
    for key in alive:
        paradigm, name = key.split("/")
        try:
            old, new = (one.identity(one.run(paradigm, name)) for one in (before, plan))
            changes = differences(old, new)
        except UserError as error:  # one of them has no such run
            changes = [str(error)]
        if changes:
            yield Conflict(key, "has a job", changes)

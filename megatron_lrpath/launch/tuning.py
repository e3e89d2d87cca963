"""What `lrpath run` and `lrpath sft` do about fine-tunings: their data first, then those whose versions are trained."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_lrpath.errors import UserError
from megatron_lrpath.launch.records import is_done
from megatron_lrpath.launch.resources import cores
from megatron_lrpath.launch.tasks import Task
from megatron_lrpath.plan import Plan
from megatron_lrpath.plan.sft import PREFIX as SFT_PREFIX
from megatron_lrpath.plan.sft import sft_folder


def prepare_chats(plan: Plan, paradigms: Sequence[str], name: str | None) -> None:
    """Prepare the data of the fine-tunings that belong to the choice (of paradigms, or of one run), where needed.

    First of all: what is wrong with them shows before days of training, and their size says how many steps
    a fine-tuning has.
    """
    wanted = plan.sft is not None and set(plan.sft.paradigms) & set(paradigms)
    if wanted and (name is None or name.startswith(SFT_PREFIX)):
        from megatron_lrpath.sft.prepare import prepare, tell

        tell(prepare(plan, cores()), sft_folder(plan))


def fine_tunings(plan: Plan, tasks: Sequence[Task], name: str | None) -> list[Task]:
    """The fine-tunings (or the one called `name`) whose versions are trained.

    Raises:
        UserError: there are none.
    """
    by_key = {task.key: task for task in tasks}
    found = [task for task in tasks if task.run.kind == "sft" and name in (None, task.run.name)]
    if not found:
        raise UserError(
            f"{plan.path}: there is no fine-tuning{f' {name}' if name else ''} here; see its `sft`"
        )
    ready = [task for task in found if task.parent is None or is_done(by_key[task.parent])]
    waiting = [task for task in found if task not in ready]
    if not ready:
        raise UserError(f"{waiting[0].key}: {waiting[0].parent} is not trained yet: lrpath run {plan.path}")
    for task in waiting:
        print(f"{task.key}: left out, {task.parent} is not trained yet", file=sys.stderr)
    return ready

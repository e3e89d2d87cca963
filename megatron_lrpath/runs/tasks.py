"""A plan's runs as tasks: each training once, even if several paradigms share it, with its parent."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_lrpath.errors import UserError
from megatron_lrpath.paradigms import OURS
from megatron_lrpath.plan import PARADIGMS, Plan, Run
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.runs.results import is_complete
from megatron_lrpath.schedule import BatchSizes
from megatron_lrpath.wording import nearest


@dataclass(frozen=True)
class Task:
    """One training.

    `aliases` are the folders of runs that share this training under another name. `parent` is the key of
    the task whose checkpoint at step `parent_step` this one starts from. `sizes` are the samples of its steps, each
    of `sample_tokens` tokens.
    """

    run: Run
    folder: Path
    aliases: tuple[Path, ...] = ()
    parent: str | None = None
    parent_step: int = 0
    sizes: BatchSizes = field(default_factory=lambda: BatchSizes.constant(1))
    sample_tokens: int = 0

    @property
    def key(self) -> str:
        """`<paradigm>/<run>`, unique in a plan."""
        return self.run.key

    @property
    def complete(self) -> bool:
        """Return whether the training is complete, as its folder shows now."""
        return is_complete(self.folder, self.run)

    def tokens(self, first: int, last: int) -> int:
        """Return the tokens of the steps `first` + 1 to `last`."""
        return self.sizes.between(first, last) * self.sample_tokens

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return RunFolder(self.folder).checkpoints


def named_paradigms(plan: Plan) -> tuple[str, ...]:
    """Return the paradigms that are trained and reported by default.

    These are the paradigms in its key `paradigms`. Without the key: ours, those in `sft`, and those that have
    been begun in the output, so that an output from before the key is completely included.
    """
    if plan.paradigms is not None:
        return plan.paradigms
    tuned = set(plan.sft.paradigms) if plan.sft is not None else set(PARADIGMS)
    tuned = set() if tuned == set(PARADIGMS) else tuned
    return tuple(
        name
        for name in PARADIGMS
        if name == OURS.name or (plan.runs(name) and (name in tuned or _is_begun(plan, name)))
    )


def _is_begun(plan: Plan, paradigm: str) -> bool:
    """Return whether a paradigm has a folder of a run that it does not share, or the folders of all its runs."""
    begun = [run for run in plan.runs(paradigm) if plan.folder(run).is_dir()]
    others = [run for name in PARADIGMS if name != paradigm for run in plan.runs(name)]
    shared = {run.carried_out_as for run in others if run.same_as and plan.folder(run).is_symlink()}
    alone = [run for run in begun if run.key not in shared]
    return bool(alone) or 0 < len(begun) == len(plan.runs(paradigm))


def paradigms_with(plan: Plan, name: str) -> tuple[str, ...]:
    """Return the paradigms with a run of this name: those of `named_paradigms`, or if there are none, all."""
    named = named_paradigms(plan)
    has = [
        one for one in PARADIGMS if any(run.name == name for run in (*plan.runs(one), *plan.sft_runs(one)))
    ]
    return tuple(one for one in has if one in named) or tuple(has)


def build_tasks(plan: Plan, paradigms: Sequence[str], fine_tunings: bool = True) -> list[Task]:
    """Return the trainings of `paradigms`, each once, after its parent; fine-tunings if steps are known."""
    makers = (plan.runs, plan.sft_runs) if fine_tunings else (plan.runs,)
    every = {run.key: run for runs in makers for paradigm in PARADIGMS for run in runs(paradigm)}
    chosen = [run for run in every.values() if run.paradigm in paradigms]
    aliases: dict[str, list[Path]] = {run.carried_out_as: [] for run in chosen}
    for run in chosen:
        if run.same_as:
            aliases[run.carried_out_as].append(plan.folder(run))
    tasks = []
    for key, others in aliases.items():
        run = every[key]
        tasks.append(
            Task(
                run=run,
                folder=plan.folder(run),
                aliases=tuple(others),
                parent=every[f"{run.paradigm}/{run.parent.run}"].carried_out_as if run.parent else None,
                parent_step=run.parent.step if run.parent else 0,
                sample_tokens=plan.batch_of(run).seq_length,
                sizes=plan.sizes_of(run),
            )
        )
    return tasks


def with_ancestors(tasks: Sequence[Task], plan: Plan, name: str) -> list[Task]:
    """Return the tasks of the run called `name` and its ancestors. Raise `UserError` for an unknown name."""
    by_key = {task.key: task for task in tasks}
    paradigms = dict.fromkeys([*(task.run.paradigm for task in tasks), *PARADIGMS])
    runs = [run for paradigm in paradigms for run in (*plan.runs(paradigm), *plan.sft_runs(paradigm))]
    keys = (run.carried_out_as for run in runs if run.name == name)
    key: str | None = next((key for key in keys if key in by_key), None)
    if key is None:
        raise unknown_run(plan.path, name, [task.run.name for task in tasks])
    wanted: set[str] = set()
    while key is not None:
        wanted.add(key)
        key = by_key[key].parent
    return [task for task in tasks if task.key in wanted]


def unknown_run(path: Path, name: str, known: Sequence[str]) -> UserError:
    """Return the error about a run that is not among the `known` ones of the plan or experiment at `path`."""
    listed = ", ".join(dict.fromkeys(known))
    return UserError(f"{path} has no run {name!r}{nearest(name, known)}; it has {listed}")


def link_aliases(task: Task) -> None:
    """Let the folders of the runs that share this training point to it, by relative links.

    A training that was begun under the other name is used instead: the link then has the other direction.
    Raise `UserError` if both folders have content.
    """
    for alias in task.aliases:
        if alias.is_symlink() or task.folder.is_symlink():
            continue
        link, target = alias, task.folder
        if alias.exists() and not any(alias.iterdir()):
            alias.rmdir()
        elif alias.exists() and not task.folder.exists():
            link, target = task.folder, alias
        elif alias.exists():
            raise UserError(
                f"{task.folder} and {alias} are one and the same training, but both folders exist; "
                "remove one of them and call again"
            )
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)

"""An experiment's trainings as tasks of the launchers: each once, with links where several plans share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_lrpath.errors import UserError
from megatron_lrpath.experiment.sharing import training_key
from megatron_lrpath.experiment.spec import Experiment, Point
from megatron_lrpath.files import atomic_write_text
from megatron_lrpath.launch.tasks import Task, build_tasks, with_ancestors


@dataclass(frozen=True)
class PointTask(Task):
    """A task of one of an experiment's plans, `plan_path`; its key begins with the point's name."""

    point: str = ""
    plan_path: Path = Path()

    @property
    def key(self) -> str:
        """`<point>/<paradigm>/<run>`, unique in an experiment."""
        return f"{self.point}/{super().key}"


def write_plans(experiment: Experiment) -> None:
    """Write the plan file of every point, where it is not there already."""
    for point in experiment.points:
        path = point.plan.path
        if not path.is_file() or path.read_text(encoding="utf-8") != point.text:
            atomic_write_text(path, point.text)


def experiment_tasks(experiment: Experiment, paradigms: Sequence[str] = ()) -> list[PointTask]:
    """Every training of the experiment once, parents before children.

    The first point that needs a training carries it out in its own folder; in the others' folders it is an
    alias (a relative link, once `launch.tasks.link_aliases` has been called). Every task's `command` is that
    of its own point's plan, `plan_path`. Plans must have been written (`write_plans`) before one is started.

    Raises UserError where the experiment has none of the paradigms (none given: all that it has).
    """
    if paradigms and not set(paradigms) & set(experiment.paradigms):
        raise UserError(
            f"{experiment.path}: the experiment is of {', '.join(experiment.paradigms)} alone; it has no "
            f"{' or '.join(paradigms)}"
        )
    return shared_tasks([experiment], paradigms)


def shared_tasks(experiments: Sequence[Experiment], paradigms: Sequence[str] = ()) -> list[PointTask]:
    """The same for several experiments (from `load.load_together`), each training once in all of them."""
    tasks: dict[str, PointTask] = {}
    for experiment in experiments:
        chosen = [name for name in experiment.paradigms if not paradigms or name in paradigms]
        for point in experiment.points:
            name = point.name if len(experiments) == 1 else f"{experiment.name}/{point.name}"
            _share(tasks, point, name, point_tasks(experiment, point, chosen))
    return list(tasks.values())


def _share(tasks: dict[str, PointTask], point: Point, name: str, own: Sequence[Task]) -> None:
    """Add a point's `own` tasks to those that there are, as aliases where the training is there already."""
    owners: dict[str, str] = {}
    for task in own:
        same = training_key(point.plan, task.run)
        if same not in tasks:
            parent = owners[task.parent] if task.parent else None
            tasks[same] = _owned(task, point, name, parent)
        else:
            first = tasks[same]
            tasks[same] = replace(first, aliases=(*first.aliases, task.folder, *task.aliases))
        owners[task.key] = tasks[same].key


def chosen_keys(experiment: Experiment, paradigms: Sequence[str], run: str | None) -> set[str]:
    """The keys of the experiment's trainings, or of all that are the run called `run`. UserError for none."""
    tasks = experiment_tasks(experiment, paradigms)
    keys = {task.key for task in tasks if run in (None, task.run.name)}
    if not keys:
        names = ", ".join(dict.fromkeys(task.run.name for task in tasks))
        raise UserError(f"--run {run}: there is no such run; the experiment's runs are {names}")
    return keys


def point_tasks(experiment: Experiment, point: Point, paradigms: Sequence[str]) -> list[Task]:
    """The tasks of one point's plan, as if it were alone."""
    tasks = build_tasks(point.plan, paradigms, fine_tunings=False)  # `lrpath sft` on the point's own plan
    if not experiment.only:
        return tasks
    wanted = {task.key for name in experiment.only for task in with_ancestors(tasks, point.plan, name)}
    return [task for task in tasks if task.key in wanted]


def _owned(task: Task, point: Point, name: str, parent: str | None) -> PointTask:
    return PointTask(
        run=task.run,
        folder=task.folder,
        aliases=task.aliases,
        parent=parent,
        parent_step=task.parent_step,
        step_tokens=task.step_tokens,
        point=name,
        plan_path=point.plan.path,
    )

"""Compare a plan's output with the plan: identities of runs, parents' checkpoints, names of versions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lrpath.data.identity import training_identity
from megatron_lrpath.data.slice import Slice, open_mix, slice_path
from megatron_lrpath.errors import UserError
from megatron_lrpath.launch.memory import arguments_of
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.plan.identity import reached
from megatron_lrpath.readiness.arguments import given_beside
from megatron_lrpath.readiness.finding import FAILED, INFO, WARNING, Finding
from megatron_lrpath.runs.archive import Archive, fetch_missing
from megatron_lrpath.runs.checkpoints import checkpoint_complete, complete_steps, latest_step, weights_folder
from megatron_lrpath.runs.folder import RunFolder, read_json_object
from megatron_lrpath.runs.lineage import changes, is_bound, newest_step, read_lineage, require_same_parent
from megatron_lrpath.runs.results import completed_step
from megatron_lrpath.runs.rewinds import require_no_rewind
from megatron_lrpath.runs.state import has_begun
from megatron_lrpath.runs.tasks import Task
from megatron_lrpath.sft.prepared import open_prepared
from megatron_lrpath.wording import clauses, listing, plural

GO_BACK = "Restore those settings, or set another `output` in the plan to train again."
SHOWN = 4  # maximum number of a run's differences in the message


def identity_checks(
    plan: Plan,
    tasks: Sequence[Task],
    slices: Mapping[str, Slice],
    going_on: Collection[str],
    extra: Sequence[str] = (),
) -> list[Finding]:
    """Check that every run with a checkpoint was trained with the plan's current settings.

    Args:
        plan: the plan.
        tasks: the requested runs.
        slices: the available slices of the versions.
        going_on: the keys of the runs that will continue with `extra`, or whose checkpoints other runs start from.
        extra: Megatron arguments in addition to the plan's.
    """
    alike: dict[tuple[str, ...], list[str]] = {}
    problems = []
    for run in (task.run for task in tasks):
        try:
            found = run_changes(plan, run, slices, extra if run.key in going_on else None)
        except UserError as error:
            problems.append(Finding("identity", FAILED, str(error)))
            continue
        if found:
            alike.setdefault(tuple(found), []).append(run.key)
    if alike:
        told = [f"{listing(keys)} ({clauses(found, SHOWN)})" for found, keys in alike.items()]
        text = f"{plan.output}: trained under other settings than the plan's: {'; '.join(told)}"
        problems.append(Finding("identity", FAILED, text, GO_BACK))
    return problems


def run_changes(
    plan: Plan, run: Run, slices: Mapping[str, Slice], extra: Sequence[str] | None = None
) -> list[str]:
    """Return the differences between a run's lineage and what the trainer would compare; empty without a
    checkpoint.

    Facts whose file is missing count as unchanged; the arguments also do if `extra` is None.
    """
    folder = plan.folder(run)
    lineage = read_lineage(folder)
    require_no_rewind(folder, lineage)
    if lineage is None or not is_bound(folder):
        return []
    stored = lineage["identity"]
    names = [version.name for version in plan.versions[: run.version_index]] if not run.is_sft else []
    current = training_identity(
        plan,
        run,
        [slices[name] for name in names if name in slices],
        mixed(plan, run),
        chats(plan, run, stored),
        stored.get("arguments") if extra is None else given_beside(plan, run, extra),
    )
    if not Path(plan.tokenizer.model or "").is_file():
        current["tokenizer_model"] = stored.get("tokenizer_model")
    return changes(folder, lineage, plan, run, current)


def mixed(plan: Plan, run: Run) -> list[Slice]:
    """Return the slices of a branch's mix; none if one is missing."""
    try:
        return open_mix(plan.data, run.mix, verify=False) if run.mix else []
    except UserError:  # the checks of the data report it
        return []


def chats(plan: Plan, run: Run, stored: Mapping[str, Any]) -> Any:
    """Return the identity of a fine-tuning's prepared data; the recorded one if they are missing."""
    if not run.is_sft:
        return None
    try:
        return open_prepared(plan, verify=False).identity
    except UserError:  # the preparation reports it
        return stored.get("sft_data")


def parent_checks(plan: Plan, todo: Sequence[Task], tasks: Sequence[Task]) -> list[Finding]:
    """Return what prevents a run of `todo` from starting: a changed parent, or a parent that passed the step
    without keeping its checkpoint.

    A checkpoint in the plan's archive is fetched at the start, see `fetch_parents`.
    """
    by_key = {task.key: task for task in tasks}
    checks = []
    for task in todo:
        parent = by_key.get(task.parent or "")
        if parent is None:
            continue
        name = f"parent of {task.key}"
        if has_begun(task):
            try:
                require_same_parent(task.folder, parent.folder, task.parent_step)
            except UserError as error:
                checks.append(Finding(name, FAILED, str(error)))
        elif has_passed(parent, task.parent_step):
            checks.append(archived(plan, task, parent) or Finding(name, FAILED, *gone(task, parent)))
    return checks


def weights_checks(plan: Plan, todo: Sequence[Task], extra: Sequence[str]) -> list[Finding]:
    """Check that the weights that runs of `todo` start from are in their folder; no finding if none are given."""
    given = arguments_of(plan, extra).get("pretrained_checkpoint")
    begins = any(task.parent is None and not has_begun(task) for task in todo)
    if not begins or not isinstance(given, str):
        return []
    try:
        weights_folder(Path(given))
    except UserError as error:
        return [Finding("weights", FAILED, f"pretrained_checkpoint: {error}")]
    return []


def archived(plan: Plan, task: Task, parent: Task) -> Finding | None:
    """Return a finding if the archive has the parent's checkpoint, or that is unknown; otherwise None."""
    name = f"parent of {task.key}"
    try:
        archive = Archive.of(plan)
        if archive is None or not archive.has(parent.key, task.parent_step):
            return None
    except UserError as error:
        found, advice = gone(task, parent)
        return Finding(
            name, FAILED, f"{found}, and it is unknown whether the archive has it: {error}", advice
        )
    return Finding(
        name,
        INFO,
        f"the checkpoint of {parent.key} at step {task.parent_step} is in {plan.archive} alone; "
        "it is fetched before the training starts",
    )


def fetch_parents(plan: Plan, todo: Sequence[Task], tasks: Sequence[Task]) -> None:
    """Fetch the parents' checkpoints that runs of `todo` start from and only the archive has.

    Raises:
        UserError: the archive does not answer, or its copy is damaged; a repeated call resumes it.
    """
    by_key = {task.key: task for task in tasks}
    starts = [(task, by_key[task.parent]) for task in todo if task.parent in by_key and not has_begun(task)]
    fetch_missing(
        plan,
        [(parent.run, task.parent_step) for task, parent in starts if has_passed(parent, task.parent_step)],
    )


def has_passed(parent: Task, step: int) -> bool:
    """Return whether the parent has reached `step` without keeping a complete checkpoint of it."""
    if checkpoint_complete(parent.checkpoints, step):
        return False
    return (completed_step(parent.folder) or 0) >= step or (latest_step(parent.checkpoints) or 0) > step


def gone(task: Task, parent: Task) -> tuple[str, str]:
    """Return the message about a missing parent's checkpoint, and what to do."""
    kept = complete_steps(parent.checkpoints)
    steps = f"{plural(len(kept), 'checkpoint')}: {', '.join(map(str, kept))}" if kept else "no checkpoint"
    found = (
        f"it starts from the checkpoint of {parent.key} at step {task.parent_step}, which is not in "
        f"{parent.checkpoints} ({steps})"
    )
    advice = (
        "Restore it; or, where steps or alpha of the plan have changed, choose them so that the run leaves at one of "
        f"those steps or a later one; or remove {parent.folder} to train {parent.key} again."
    )
    return found, advice


@dataclass(frozen=True)
class Renamed:
    """Version number `number` is `new` in the plan and was `old` when `runs` were trained (folders)."""

    number: int
    new: str
    old: str
    runs: tuple[Path, ...]


def renamed_versions(plan: Plan) -> list[Renamed]:
    """Return versions whose names no run in the output has, if runs there have another name in their place.

    A name at another position of the plan was moved, not changed; the runs' identities detect that.
    """
    trained = list(trained_versions(Path(plan.output)))
    names = {name for _, versions in trained for name in versions}
    planned = [version.name for version in plan.versions]
    found = []
    for index, new in enumerate(planned):
        places: dict[str, list[Path]] = {}
        for folder, versions in trained:
            if index < len(versions) and versions[index] not in planned:
                places.setdefault(versions[index], []).append(folder)
        if new not in names and len(places) == 1:
            [(old, folders)] = places.items()
            found.append(Renamed(index + 1, new, old, tuple(folders)))
    return found


def trained_versions(output: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield every run in the output with a checkpoint, with the names of the versions that it has reached."""
    for folder in sorted(output.glob("*/*")):
        lineage: dict[str, Any] = {}
        if not folder.is_symlink() and folder.is_dir() and is_bound(folder):
            lineage = read_json_object(RunFolder(folder).lineage) or {}
        identity = lineage.get("identity")
        versions = reached(identity, {}, newest_step(folder)).get("versions") if identity else None
        if isinstance(versions, list):
            yield folder, [str(version["name"]) for version in versions]


def renamed_checks(plan: Plan, renamed: list[Renamed]) -> list[Finding]:
    """Return the findings on renamed versions, one for each.

    It is a failure if the main path has reached the version or its slice has the old name; otherwise the
    version can be a new one in the place of the old one.
    """
    checks = []
    for one in renamed:
        folder = Path(plan.data.slices)
        has_slice = slice_path(folder, one.old).exists() and not slice_path(folder, one.new).exists()
        is_certain = has_slice or plan.folder(plan.main) in one.runs
        found = (
            f"version {one.number} is {one.new} in the plan, and has been trained under its old name {one.old} "
            f"({listing([str(run) for run in one.runs])})"
        )
        advice = (
            f"Name it {one.old} again (a version's name decides its order of samples); or give the plan another "
            "`output`, and draw its slice under the new name."
        )
        checks.append(Finding("versions", FAILED if is_certain else WARNING, found, advice))
    return checks

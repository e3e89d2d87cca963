"""Rewind a main path to a kept checkpoint: what is set aside with its tail and what is kept, and the moves.

Every move can be repeated, so that an interrupted call can be called again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_lrpath.data.slice import ENDING, slice_path, valid_name, validation_paths
from megatron_lrpath.errors import UserError
from megatron_lrpath.experiment.load import is_written_by_experiment
from megatron_lrpath.files import atomic_write_bytes, sync_folder
from megatron_lrpath.paradigms import OURS, PARADIGMS
from megatron_lrpath.plan import Plan, load_plan
from megatron_lrpath.plan.file.edit import without_versions, write_text
from megatron_lrpath.plan.file.load import plan_from
from megatron_lrpath.plan.file.source import parse_source, read_text
from megatron_lrpath.runs.checkpoints import (
    checkpoint_folder,
    complete_steps,
    steps_found,
    sweep,
    write_tracker,
)
from megatron_lrpath.runs.failure import now
from megatron_lrpath.runs.folder import OutputFolder, RunFolder, read_json_object
from megatron_lrpath.runs.history import drop_steps_after
from megatron_lrpath.runs.lineage import changes, newest_step, read_lineage, record_rewind
from megatron_lrpath.runs.results import write_result
from megatron_lrpath.runs.rewinds import (
    GOING,
    SetAside,
    command,
    free_number,
    half_removed,
    read_set_aside,
    unfinished,
)
from megatron_lrpath.sealed import write_sealed
from megatron_lrpath.upkeep.quiet import run_folders
from megatron_lrpath.wording import listing

INHERITED = ("max_lr", "global_batch_size")  # keys of a version that later ones keep
AWAY = ".set-aside-"  # suffix of a slice that is set aside, with the rewind's number


@dataclass(frozen=True)
class Rewind:
    """The work of a call: its record, and the keys of the branches that are kept."""

    record: SetAside
    staying: tuple[str, ...]


def begun(plan: Plan, step: int, dropped: Sequence[str]) -> SetAside | None:
    """Return the rewind that an interrupted call has begun; None if there is none.

    Raises:
        UserError: it was called with other options.
    """
    found = unfinished(read_lineage(plan.folder(plan.main)))
    if found is None:
        return None
    if (found["to_step"], set(found["dropped"])) != (step, set(dropped)):
        raise UserError(
            f"{plan.output}: another rewind was interrupted; call it again first: {command(plan.path, found)}"
        )
    return read_set_aside(Path(plan.output), found["number"])


def is_done(plan: Plan, step: int, dropped: Sequence[str]) -> bool:
    """Return whether the main path's last rewind is the requested one, with no training since."""
    folder = plan.folder(plan.main)
    rewinds = (read_lineage(folder) or {}).get("rewinds", [])
    last = rewinds[-1] if rewinds else None
    return (
        last is not None
        and (last["to_step"], set(last["dropped"])) == (step, set(dropped))
        and newest_step(folder) == step
        and not {version.name for version in plan.versions} & set(dropped)
    )


def prepare(plan: Plan, step: int, dropped: Sequence[str]) -> Rewind:
    """Return what a rewind to `step` without the versions `dropped` moves. Nothing is written.

    Raises:
        UserError: it is not possible; with what to do.
    """
    require_own(plan)
    require_versions(plan, dropped)
    require_step(plan, step, dropped)
    require_valid(plan, new_text(plan, dropped))
    output, folder = Path(plan.output), plan.folder(plan.main)
    going = runs_after(plan, step, dropped)
    used = [one["number"] for one in (read_lineage(folder) or {}).get("rewinds", [])]
    number = free_number(output, max(used, default=0))
    away = OutputFolder(output).set_aside / str(number)
    root = RunFolder(folder).checkpoints
    tail = [checkpoint_folder(root, one) for one in reversed(steps_found(root)) if one > step]
    sources = [*tail, *(output / key for key in going)]
    record = SetAside(
        number=number,
        time=now(),
        to_step=step,
        from_step=newest_step(folder),
        dropped=tuple(dropped),
        runs=tuple(going),
        moves=tuple(pair(output, one, away / one.relative_to(output)) for one in sources),
        slices=tuple((name, f"{name}{AWAY}{number}") for name in slices_of(plan, dropped)),
    )
    require_one_disk(output, sources)
    staying = [run.key for run in plan.runs(OURS.name) if run.makes_version and run.key not in going]
    return Rewind(record, tuple(key for key in staying if (output / key).is_dir()))


def pair(output: Path, source: Path, target: Path) -> tuple[str, str]:
    """Return source and target, as in the record."""
    return os.path.relpath(source, output), os.path.relpath(target, output)


def new_text(plan: Plan, dropped: Collection[str]) -> str:
    """Return the plan's text without the versions in `dropped`. Raise PlanError if it cannot be edited."""
    text = read_text(plan.path)
    names = [version.name for version in plan.versions if version.name in dropped]
    sets = {valid_name(name) for name in dropped}
    valid = [one for one in plan.data.more_valid if Path(one).name.removesuffix(ENDING) in sets]
    return without_versions(plan.path, text, names, valid) if names or valid else text


def slices_of(plan: Plan, dropped: Collection[str]) -> list[str]:
    """Return the existing files of the dropped versions' slices and of their validation sets, except the
    first set.
    """
    paths = [slice_path(plan.data.slices, name) for one in dropped for name in (one, valid_name(one))]
    first = validation_paths(plan.data)[0].resolve()
    return [path.name for path in paths if path.is_file() and path.resolve() != first]


def require_valid(plan: Plan, text: str) -> None:
    """Refuse a rewind that would leave an invalid plan. Raise UserError with the further changes that it
    needs.
    """
    try:
        plan_from(parse_source(plan.path, text))
    except UserError as error:
        raise UserError(
            f"without these versions the plan could not be used; change it first: {error}"
        ) from None


def require_own(plan: Plan) -> None:
    """Refuse a main path that is not the plan's, or not in its output. Raise UserError with what to do."""
    folder = plan.folder(plan.main)
    if is_written_by_experiment(plan):
        raise UserError(
            f"{plan.path}: was written by an experiment, whose other plans use the same main path; give this one "
            "another name and `output`, and train it alone, to let its main path go another way"
        )
    lineage = read_lineage(folder)
    if lineage is None:
        raise UserError(f"{folder}: there is no main path to rewind; train it first: lrpath run {plan.path}")
    if not folder.resolve().is_relative_to(Path(plan.output).resolve()):
        raise UserError(f"{folder}: is in another output ({folder.resolve()}); rewind it with its own plan")
    if found := changes(folder, lineage, plan, plan.main):
        raise UserError(
            f"{folder}: was trained under other settings than the plan's ({listing(found[:2])}); rewind it with "
            "the plan that it was trained with"
        )
    reached, last = newest_step(folder), plan.main.last_step
    if reached > max(last, plan.timeline.ends[-1]):
        raise UserError(
            f"{folder}: has gone on to step {reached:,}, past this plan; rewind it with the plan that has its later "
            "versions"
        )


def require_versions(plan: Plan, dropped: Sequence[str]) -> None:
    """Refuse versions that cannot be dropped. Raise UserError with what to do."""
    names = [version.name for version in plan.versions]
    if unknown := [name for name in dropped if name not in names]:
        raise UserError(f"--drop {', '.join(unknown)}: no version of {plan.path}; it has {', '.join(names)}")
    if names[0] in dropped:
        raise UserError(
            f"--drop {names[0]}: nothing of the main path is older than its first version; begin a new plan with "
            "another `output`"
        )
    for number, version in enumerate(plan.versions[:-1]):
        after = plan.versions[number + 1]
        kept = [key for key in INHERITED if getattr(version, key) is not None and getattr(after, key) is None]
        if kept and version.name in dropped and after.name not in dropped:
            raise UserError(
                f"--drop {version.name}: {after.name} keeps the {listing(kept)} of {version.name}; write it "
                f"at {after.name} in {plan.path} first"
            )
    mixed = [
        f"{version.name} mixes in {part.name}"
        for version in plan.versions
        if version.mix is not None and version.name not in dropped
        for part in version.mix.parts
        if part.name in {one for name in dropped for one in (name, valid_name(name))}
    ]
    if mixed:
        raise UserError(f"--drop: {listing(mixed)}; change their `branch_mix` in {plan.path} first")


def require_step(plan: Plan, step: int, dropped: Sequence[str]) -> None:
    """Refuse a step from which the main path cannot continue. Raise UserError with the available steps."""
    folder = plan.folder(plan.main)
    root = RunFolder(folder).checkpoints
    ends = zip(plan.timeline.ends, plan.versions, strict=True)
    starts = [end - version.steps for end, version in ends if version.name in dropped]
    latest = min([*starts, newest_step(folder) - 1])
    kept = [one for one in complete_steps(root) if one <= latest]
    told = (
        f"steps that are kept: {', '.join(f'{one}' for one in kept[-8:])}" if kept else "none is kept there"
    )
    if starts and step > latest == min(starts):
        raise UserError(
            f"--to-step {step}: the main path has read {dropped[starts.index(min(starts))]} from step "
            f"{min(starts):,} on; choose that step or an earlier one ({told})"
        )
    if step > latest:
        raise UserError(
            f"--to-step {step}: the main path is at {newest_step(folder):,}; choose an earlier step ({told})"
        )
    if step not in kept:
        fetch = f"; if the archive has it: lrpath archive {plan.path} --fetch {plan.main.key}:{step}"
        raise UserError(
            f"{root}: there is no complete checkpoint of step {step} ({told}){fetch if plan.archive else ''}"
        )


def require_one_disk(output: Path, sources: Sequence[Path]) -> None:
    """Refuse what a rename cannot move. Raise UserError with what to do."""
    disk = output.stat().st_dev
    if far := [one for one in sources if one.parent.stat().st_dev != disk]:
        raise UserError(
            f"{far[0].parent}: is on another disk than {output}, where nothing can be set aside without copying; "
            "move the output's folder to that disk (and link its present path to it), and call again"
        )


def runs_after(plan: Plan, step: int, dropped: Collection[str]) -> list[str]:
    """Return the keys of the runs that are set aside with the tail: branches after `step`, and runs that read
    dropped data.

    All runs that start from them are included, fine-tunings among them.
    """
    output = Path(plan.output)
    parents = dict(_parents(output, run_folders(output)))
    main = plan.main.key
    going = {key for key, (parent, left) in parents.items() if parent == main and left > step}
    going |= {key for key in _reading(plan, dropped) if key in parents}
    while more := {key for key, (parent, _) in parents.items() if parent in going} - going:
        going |= more
    return sorted(going - {main})


def _parents(output: Path, folders: Sequence[Path]) -> Iterator[tuple[str, tuple[str, int]]]:
    """Yield each run's key with its parent's and the step of its start; "" and 0 for random weights."""
    for folder in folders:
        lineage = read_lineage(folder)
        parent = (lineage or {}).get("parent") or {}
        paradigm, key = folder.parent.name, folder.relative_to(output).as_posix()
        yield key, (f"{paradigm}/{parent['run']}" if parent.get("run") else "", int(parent.get("step") or 0))


def _reading(plan: Plan, dropped: Collection[str]) -> set[str]:
    """Return the keys of the runs of a dropped version, or whose steps come after it in another paradigm."""
    if not dropped:
        return set()
    first = min(index for index, version in enumerate(plan.versions, 1) if version.name in dropped)
    found = {run.key for run in plan.runs(OURS.name) if run.makes_version and run.version in dropped}
    others = (run for name in PARADIGMS if name != OURS.name for run in plan.runs(name))
    return found | {run.key for run in others if run.version_index >= first}


SHOWN = ("number", "time", "to_step", "from_step", "dropped")  # of a record, in the lineage


def carry_out(plan: Plan, record: SetAside) -> Plan:
    """Record the rewind, change the plan, set the tail aside; return the changed plan. Only while no training
    runs.
    """
    output, folder = Path(plan.output), plan.folder(plan.main)
    record.save(output)
    note(folder, record, finished=False)
    plan = edit_plan(plan, record)
    sweep(RunFolder(folder).checkpoints)
    for base, pairs in ((output, record.moves), (Path(plan.data.slices), record.slices)):
        for source, target in pairs:
            move(base / source, base / target)
    cut(folder, record.folder(output) / folder.relative_to(output), record.to_step)
    write_tracker(RunFolder(folder).checkpoints, record.to_step)
    write_result(folder, plan.main, record.to_step)
    note(folder, record, finished=True)  # last: until then the main path cannot be used
    return plan


def note(folder: Path, record: SetAside, finished: bool) -> None:
    """Record the rewind, begun or finished, in the main path's lineage."""
    fields = asdict(record)
    record_rewind(folder, {name: fields[name] for name in SHOWN} | {"finished": finished})


def edit_plan(plan: Plan, record: SetAside) -> Plan:
    """Remove the dropped versions from the plan's file, if it still has them; return the plan in it."""
    text = new_text(plan, record.dropped)
    if text == read_text(plan.path):
        return plan
    write_text(plan.path, text)
    return load_plan(plan.path)


def move(source: Path, target: Path) -> None:
    """Rename, unless that is already done.

    Raises:
        UserError: both paths exist.
    """
    if not source.exists():
        return
    if target.exists():
        raise UserError(
            f"{source}: was set aside as {target}, and exists again; remove one of the two and call again"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
    sync_folder(source.parent)
    sync_folder(target.parent)


def cut(folder: Path, aside: Path, step: int) -> None:
    """Copy the parts of the main path's files about steps after `step`, and truncate the files."""
    run = RunFolder(folder)
    for path in (run.history, run.evaluations, run.result):
        kept = aside / path.name
        if path.exists() and not kept.exists():
            atomic_write_bytes(kept, path.read_bytes())
    drop_steps_after(run.history, step)
    if known := read_json_object(run.evaluations):
        left = {key: one for key, one in known.items() if not key.isdecimal() or int(key) <= step}
        if left != known:
            write_sealed(run.evaluations, left)
    run.error.unlink(missing_ok=True)


def remove_set_aside(plan: Plan, records: Sequence[SetAside]) -> None:
    """Permanently remove the files that finished rewinds have set aside, and leftovers of an interrupted
    removal.
    """
    output = Path(plan.output)
    for left in half_removed(output):
        shutil.rmtree(left, ignore_errors=True)
    for record in records:
        for _, target in record.slices:
            (Path(plan.data.slices) / target).unlink(missing_ok=True)
        folder = record.folder(output)
        going = folder.with_name(folder.name + GOING)
        folder.rename(going)
        shutil.rmtree(going, ignore_errors=True)
    root = OutputFolder(output).set_aside
    if root.is_dir() and not any(root.iterdir()):
        root.rmdir()

"""Perform a rewind from its record; every step can be repeated, so that an interrupted call can be called
again.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_write_bytes, sync_folder
from megatron_lrpath.plan import Plan, load_plan
from megatron_lrpath.runs.checkpoints import sweep, write_tracker
from megatron_lrpath.runs.folder import OutputFolder, RunFolder, read_json_object
from megatron_lrpath.runs.history import drop_steps_after
from megatron_lrpath.runs.lineage import record_rewind
from megatron_lrpath.runs.results import write_result
from megatron_lrpath.runs.set_aside import GOING, SetAside, half_removed
from megatron_lrpath.sealed import write_sealed
from megatron_lrpath.upkeep.rewind import new_text

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
    note(folder, record, finished=True)  # last: until then the main path is of no use to anybody
    return plan


def note(folder: Path, record: SetAside, finished: bool) -> None:
    """Record the rewind, begun or finished, in the main path's lineage."""
    fields = asdict(record)
    record_rewind(folder, {name: fields[name] for name in SHOWN} | {"finished": finished})


def edit_plan(plan: Plan, record: SetAside) -> Plan:
    """Remove the dropped versions from the plan's file, if it still has them."""
    text = new_text(plan, record.dropped)
    data = plan.path.read_bytes()
    mark = b"\xef\xbb\xbf" if data.startswith(b"\xef\xbb\xbf") else b""
    if mark + text.encode() == data:
        return plan
    atomic_write_bytes(plan.path.resolve(), mark + text.encode())
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

"""Make the checkpoint of another training, or an imported model, the beginning of a main path.

A checkpoint is checked, copied and recorded. The plan names it before the copy gets its final name, so that a
run without the plan's entry never starts from it. After a kill at any point, a repeated call completes it.
The original is only read.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lrpath.data.identity import trainer_facts
from megatron_lrpath.data.slice import Slice, slice_path
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import sync_folder
from megatron_lrpath.plan import Plan, run_identity
from megatron_lrpath.plan.file.edit import with_entry, with_key, write_text
from megatron_lrpath.plan.file.keys import UNKNOWN
from megatron_lrpath.plan.file.load import plan_from
from megatron_lrpath.plan.file.source import parse_source, read_text
from megatron_lrpath.plan.spec import Adopted
from megatron_lrpath.runs import checkpoints as disk
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.runs.lineage import write_adopted
from megatron_lrpath.upkeep.quiet import run_folders
from megatron_lrpath.wording import byte_size, listing

PARENT = "adopted"  # the parent's name in the lineage


@dataclass(frozen=True)
class Adoption:
    """The work of an adoption: `source` is copied, `text` becomes the plan's, which is then `plan`."""

    source: Path
    text: str
    plan: Plan

    @property
    def adopted(self) -> Adopted:
        """The plan's entry."""
        assert self.plan.adopted is not None
        return self.plan.adopted

    @property
    def root(self) -> Path:
        """The main path's checkpoints."""
        return RunFolder(self.plan.folder(self.plan.main)).checkpoints

    @property
    def is_done(self) -> bool:
        """Return whether the main path has the checkpoint already."""
        return disk.checkpoint_complete(self.root, self.adopted.step)


def prepare(plan: Plan, root: Path, step: int, samples: int, data: Sequence[str]) -> Adoption:
    """Return the work to adopt the checkpoint of `step` under `root`. Nothing is written.

    Args:
        plan: the plan.
        root: the other training's folder of checkpoints.
        step: the step of the checkpoint.
        samples: the number of samples that it was trained on.
        data: names of the slices that it has read; empty if unknown.

    Raises:
        UserError: it is not possible; with what to do.
    """
    source = disk.checkpoint_folder(root.resolve(), step)
    require_flat(source)
    adopted = adopted_from(plan, source, str(source), (step, samples), data)
    adoption = Adoption(source, *with_adopted(plan, read_text(plan.path), adopted))
    require_fresh(adoption)
    return adoption


def adopted_from(
    plan: Plan, source: Path, name: str, position: tuple[int, int], data: Sequence[str]
) -> Adopted:
    """Return the plan's entry for the checkpoint in the folder `source`, called `name`, of (step, samples).

    Raises:
        UserError: a slice of `data` is missing, or the plan has adopted another checkpoint.
    """
    fingerprint = disk.files_fingerprint(disk.content_files(source))
    adopted = Adopted(*position, name, fingerprint, tuple(data))
    for one in data:
        Slice.load(slice_path(plan.data.slices, one))
    before = plan.adopted
    if before is not None and (before.facts() != adopted.facts() or before.data != adopted.data):
        raise UserError(
            f"{plan.path}: has adopted another checkpoint ({before.checkpoint}) or other data already; remove "
            "`adopted` from it and give it another `output`, or name that checkpoint"
        )
    return adopted


def prepare_weights(plan: Plan, root: Path, data: Sequence[str]) -> tuple[str, Plan]:
    """Return the text of a plan whose runs without a parent begin with the imported model under `root`, and the plan.

    The text is empty if the plan begins with it already. Nothing is written.

    Args:
        plan: the plan.
        root: a folder of `tools/import_hf.py`.
        data: names of the slices that the model was trained on; empty if unknown.

    Raises:
        UserError: it is not possible; with what to do.
    """
    given = plan.megatron.get("pretrained_checkpoint")
    if given is not None and Path(str(given)).resolve() != root.resolve():
        raise UserError(
            f"{plan.path}: begins with another model, pretrained_checkpoint {given}; remove that line from its "
            f"`megatron`, or give --checkpoint {given}"
        )
    name = str(root) if given is None else str(given)
    adopted = adopted_from(plan, root / disk.RELEASE, name, (0, 0), data)
    begun = [
        folder for folder in run_folders(Path(plan.output)) if disk.has_begun(RunFolder(folder).checkpoints)
    ]
    if begun and plan.adopted is None:
        raise UserError(
            f"{listing(list(map(str, begun[:3])))}: trained already; give {plan.path} another `output` to begin with "
            "other weights"
        )
    text = read_text(plan.path)
    if given is None:
        text = with_entry(plan.path, text, "megatron", "pretrained_checkpoint", name)
    return with_adopted(plan, text, adopted)


def with_adopted(plan: Plan, text: str, adopted: Adopted) -> tuple[str, Plan]:
    """Return the plan's `text` with the entry, and the plan in it; the text is empty if the plan has the entry.

    Raises:
        UserError: the plan does not allow it.
    """
    if plan.adopted is not None:
        return "", plan
    entry: dict[str, Any] = {
        "checkpoint": adopted.checkpoint,
        "step": adopted.step,
        "samples": adopted.samples,
        "fingerprint": adopted.fingerprint,
        "data": list(adopted.data) or UNKNOWN,
    }
    text = with_key(plan.path, text, "adopted", entry)
    return text, plan_from(parse_source(plan.path, text))


def require_rate(adoption: Adoption, rate: float | None) -> None:
    """Refuse a checkpoint whose rate differs from the rate with which the main path continues.

    Raises:
        UserError: both rates.
    """
    wanted = adoption.plan.main.path.lr_at(adoption.adopted.step)
    if rate is None:
        raise UserError(
            f"{adoption.source}: has no learning rate, so no optimizer state to continue with; take a checkpoint that "
            "was saved with the optimizer"
        )
    if abs(rate - wanted) > 1e-9 * wanted:
        raise UserError(
            f"{adoption.source}: its next step would have the learning rate {rate:g}, and the main path of "
            f"{adoption.plan.path} goes on at {wanted:g}. Set schedule.max_lr to the constant rate that it was "
            "trained at, or take a checkpoint from before its decay."
        )


def require_fresh(adoption: Adoption) -> None:
    """Refuse an output in which anything else has been trained. Raise UserError with what to do."""
    plan, output = adoption.plan, Path(adoption.plan.output)
    main = plan.folder(plan.main)
    others = [str(folder) for folder in run_folders(output) if folder != main]
    if disk.has_begun(adoption.root) and not adoption.is_done:
        others.append(str(main))
    if others and not adoption.is_done:
        raise UserError(
            f"{listing(others[:3])}: trained already; an adopted checkpoint begins a main path. Give {plan.path} "
            "another `output`."
        )


def require_flat(source: Path) -> None:
    """Refuse a folder that is not a complete distributed checkpoint. Raise UserError with what to do."""
    if not disk.checkpoint_complete(source.parent, int(source.name.removeprefix("iter_"))):
        steps = disk.complete_steps(source.parent)
        have = f"it has steps {', '.join(map(str, steps))}" if steps else "it has no complete checkpoint"
        raise UserError(
            f"{source.parent}: no complete checkpoint of step {source.name[5:].lstrip('0')}; {have}"
        )
    if not (source / ".metadata").is_file() or any(one.is_dir() for one in source.iterdir()):
        raise UserError(
            f"{source}: not a distributed checkpoint; save it with --ckpt-format torch_dist (Megatron converts one "
            "with --ckpt-convert-format torch_dist --ckpt-convert-save DIR)"
        )


def carry_out(adoption: Adoption) -> None:
    """Copy, record, rename. The caller must prevent trainings in the output.

    Raises:
        UserError: the disk has too little space, or a file changes while it is read.
    """
    plan, step, root = adoption.plan, adoption.adopted.step, adoption.root
    aside = disk.saving_folder(disk.checkpoint_folder(root, step))
    aside.mkdir(parents=True, exist_ok=True)
    require_room(adoption, aside)
    sums = {path.name: copied(path, aside / path.name) for path in disk.content_files(adoption.source)}
    disk.write_manifest(aside, step, sums)
    sync_folder(aside)
    parent = {
        "run": PARENT,
        "step": step,
        "checkpoints": str(adoption.source.parent),
        "fingerprint": adoption.adopted.fingerprint,
    }
    identity = run_identity(plan, plan.main) | {"slices": {}} | trainer_facts(plan, None)
    write_adopted(plan.folder(plan.main), identity, parent)
    if adoption.text:
        write_text(plan.path, adoption.text)
    aside.rename(disk.checkpoint_folder(root, step))
    sync_folder(root)
    disk.write_tracker(root, step)


def copied(source: Path, target: Path) -> disk.FileSum:
    """Copy a file unless an earlier call has; return its sum. Raise UserError if the two then differ."""
    wanted = disk.sum_file(source)
    if not target.is_file() or disk.sum_file(target) != wanted:
        shutil.copyfile(source, target)
        with target.open("rb") as stream:
            os.fsync(stream.fileno())
        if disk.sum_file(target) != wanted:
            raise UserError(
                f"{source}: changed while it was copied, or {target} holds other bytes; check the disk and call again"
            )
    return wanted


def require_room(adoption: Adoption, aside: Path) -> None:
    """Refuse a disk with too little space for the copy. Raise UserError with both sizes."""
    needed = sum(path.stat().st_size for path in disk.content_files(adoption.source))
    there = sum(path.stat().st_size for path in aside.iterdir())
    free = shutil.disk_usage(aside).free
    if needed - there > free:
        raise UserError(
            f"{aside}: the checkpoint takes {byte_size(needed)}, and {byte_size(free)} are free; free space or give "
            f"{adoption.plan.path} another `output`"
        )

"""Which checkpoints lie in a folder, and which are whole: read from names and small files, without torch.

A checkpoint is written in `iter_0000010.saving`, gets its manifest last, and is renamed to `iter_0000010`:
what stands under that name with a manifest was whole when it was written. What turns out damaged is renamed
to `iter_0000010.damaged`, and what retention removes goes by way of `iter_0000010.removing`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from megatron_lrpath.files import atomic_write_text, sweep_unfinished, sync_folder
from megatron_lrpath.training.checkpoints.manifest import MANIFEST

CHECKPOINTS = "checkpoints"  # in a run's folder
TRACKER = "latest_checkpointed_iteration.txt"
SAVE_INTERVAL = 500  # steps, for a plan that says nothing else; of these checkpoints the newest two are kept
SAVING, REMOVING, DAMAGED = ".saving", ".removing", ".damaged"
_STEP_FOLDER = re.compile(r"iter_(\d{7,18})")
_LEFTOVER = re.compile(rf"iter_\d{{7,18}}({re.escape(SAVING)}|{re.escape(REMOVING)})")


def checkpoint_folder(root: Path, step: int) -> Path:
    """Megatron's folder for the checkpoint of `step` under `root`."""
    return root / f"iter_{step:07d}"


def saving_folder(folder: Path) -> Path:
    """Where the checkpoint that is to stand in `folder` is written."""
    return folder.with_name(folder.name + SAVING)


def checkpoint_complete(root: Path, step: int) -> bool:
    """Whether the checkpoint of `step` under `root` is whole, so that a branch may start from it.

    Ours have a manifest (what it says is checked on loading). One that plain Megatron wrote has none: of a
    `torch_dist` checkpoint it writes `metadata.json` after everything else in the folder; for other formats
    the tracker, moved on at the end, shows that the folder was finished.
    """
    folder = checkpoint_folder(root, step)
    if (folder / MANIFEST).is_file():
        return True
    if (folder / ".metadata").is_file():
        return _is_json(folder / "metadata.json")
    tracked = tracked_step(root)
    return tracked is not None and tracked >= step and not _is_empty(folder)


def complete_steps(root: Path) -> list[int]:
    """The steps under `root` whose checkpoints are complete, ascending."""
    return [step for step in steps_found(root) if checkpoint_complete(root, step)]


def steps_found(root: Path) -> list[int]:
    """The steps that have a folder under `root`, complete or not, ascending."""
    return sorted(int(match[1]) for name in _names(root) if (match := _STEP_FOLDER.fullmatch(name)))


def latest_step(root: Path) -> int | None:
    """The newest complete checkpoint's step, None where there is none."""
    steps = complete_steps(root)
    return steps[-1] if steps else None


def tracked_step(root: Path) -> int | None:
    """The step in the tracker file, None where there is none or it cannot be read."""
    try:
        with (root / TRACKER).open("rb") as stream:
            text = stream.read(64).strip()
    except OSError:
        return None
    return int(text) if re.fullmatch(rb"\d{1,18}", text) else None


def write_tracker(root: Path, step: int) -> None:
    """Let the tracker, from which Megatron's tools learn the newest step, say `step`; atomically."""
    if tracked_step(root) != step:
        atomic_write_text(root / TRACKER, str(step))


def damaged_found(root: Path) -> list[str]:
    """The names of the checkpoints under `root` that were set aside."""
    return sorted(name for name in _names(root) if name.startswith("iter_") and DAMAGED in name)


def set_aside(root: Path, step: int) -> Path:
    """Rename a checkpoint that is not whole, so that nobody takes it for one; its new name."""
    folder = checkpoint_folder(root, step)
    for number in range(1, 1000):
        target = folder.with_name(f"{folder.name}{DAMAGED}{f'-{number}' if number > 1 else ''}")
        if not target.exists():
            break
    folder.rename(target)
    sync_folder(root)
    return target


def sweep(root: Path) -> None:
    """Remove what a killed process left of a save or a removal. Only for who holds the run's lock."""
    for name in _names(root):
        if _LEFTOVER.fullmatch(name):
            shutil.rmtree(root / name, ignore_errors=True)
        elif _STEP_FOLDER.fullmatch(name) and _is_empty(root / name):
            (root / name).rmdir()
    sweep_unfinished(root / TRACKER)


def remove(root: Path, step: int) -> None:
    """Remove a checkpoint; killed half-way it leaves nothing that looks like one."""
    folder = checkpoint_folder(root, step)
    going = folder.with_name(folder.name + REMOVING)
    folder.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def _names(root: Path) -> list[str]:
    try:
        return os.listdir(root)
    except OSError:
        return []


def _is_empty(folder: Path) -> bool:
    """Whether `folder` holds nothing, or is no folder."""
    return not folder.is_dir() or not _names(folder)


def _is_json(path: Path) -> bool:
    """Whether `path` holds one whole JSON value (the file is not written atomically)."""
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return True

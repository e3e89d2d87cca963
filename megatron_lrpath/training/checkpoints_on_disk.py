"""Which checkpoints lie in a folder, and which are whole: read from names and small files, without torch."""

from __future__ import annotations

import json
import re
from pathlib import Path

CHECKPOINTS = "checkpoints"  # in a run's folder
TRACKER = "latest_checkpointed_iteration.txt"
_STEP_FOLDER = re.compile(r"iter_(\d{7,})")


def checkpoint_folder(root: Path, step: int) -> Path:
    """Megatron's folder for the checkpoint of `step` under `root`."""
    return root / f"iter_{step:07d}"


def checkpoint_complete(root: Path, step: int) -> bool:
    """Whether the checkpoint of `step` under `root` is whole, so that a branch may start from it.

    Megatron writes a `torch_dist` checkpoint's `metadata.json` after everything else in the folder, and then
    moves the tracker on: either shows that the folder was finished. A folder that retention removed is not
    complete.
    """
    folder = checkpoint_folder(root, step)
    if not folder.is_dir():
        return False
    if (folder / ".metadata").is_file() and _is_json(folder / "metadata.json"):
        return True
    tracked = tracked_step(root)
    return tracked is not None and tracked >= step


def complete_steps(root: Path) -> list[int]:
    """The steps under `root` whose checkpoints are complete, ascending."""
    try:
        names = [entry.name for entry in root.iterdir()]
    except OSError:
        return []
    steps = sorted(int(match[1]) for name in names if (match := _STEP_FOLDER.fullmatch(name)))
    return [step for step in steps if checkpoint_complete(root, step)]


def latest_step(root: Path) -> int | None:
    """The newest complete checkpoint's step, None where there is none."""
    steps = complete_steps(root)
    return steps[-1] if steps else None


def tracked_step(root: Path) -> int | None:
    """The step in the tracker file, None where there is none or it cannot be read."""
    try:
        return int((root / TRACKER).read_text(encoding="ascii").strip())
    except (OSError, ValueError):
        return None


def _is_json(path: Path) -> bool:
    """Whether `path` holds one whole JSON value (the file is not written atomically)."""
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return True

"""Digests of exact bytes of all state in a checkpoint that determines the rest of a training."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from tests.support.training_fixtures import launch

VOLATILE = ("args", "rerun_state_machine", "content_metadata")  # source of the load, timings


def states(*folders: Path) -> list[dict[str, str]]:
    """Return for each checkpoint folder: weights, moments, step counts, rates, random states, counters."""
    with tempfile.TemporaryDirectory() as place:
        answer = Path(place) / "states.json"
        launch("tests.support.states:main", [str(answer), *map(str, folders)]).ok()
        return list(json.loads(answer.read_text()))


def main(argv: list[str]) -> None:
    """Write the states of the folders `argv[1:]` to the file `argv[0]`."""
    Path(argv[0]).write_text(json.dumps([read(Path(word)) for word in argv[1:]]))


def read(folder: Path) -> dict[str, str]:
    """Return the leaves of a checkpoint by name."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    found: dict[str, Any] = {}
    reader = dcp.FileSystemReader(folder)
    _load_state_dict(found, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    leaves = flatten(found, "")
    arguments = next(value for name, value in found.items() if name.startswith("common_state"))[0]["args"]
    leaves["consumed_train_samples"] = str(arguments.consumed_train_samples)
    return leaves


def flatten(value: Any, name: str) -> dict[str, str]:
    """Return the leaves of `value` by name."""
    import numpy as np
    import torch

    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items() if key not in VOLATILE]
    elif isinstance(value, list | tuple):
        items = [(str(index), item) for index, item in enumerate(value)]
    elif isinstance(value, torch.Tensor):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {name: f"{value.dtype}{tuple(value.shape)}{hashlib.sha256(raw).hexdigest()[:24]}"}
    elif isinstance(value, np.ndarray):
        return {name: hashlib.sha256(value.tobytes()).hexdigest()[:24]}
    else:
        return {name: repr(value)}
    leaves: dict[str, str] = {}
    for key, item in items:
        leaves |= flatten(item, f"{name}.{key}" if name else key)
    return leaves

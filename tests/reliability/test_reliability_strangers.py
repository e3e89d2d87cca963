"""A checkpoint is data: no content of a checkpoint is executed."""

from __future__ import annotations

import io
import os
import pickle
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.training_fixtures import launch


class Malicious:
    """Writes a file when it is unpickled without restrictions."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def write_checkpoint(folder: Path, common: object) -> None:
    """Write a distributed checkpoint with only the object in which Megatron keeps its arguments."""
    import torch
    import torch.distributed.checkpoint as dcp

    content = io.BytesIO()
    torch.save([common], content)
    state = {"common_state/shard_0_1": content}
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    planner.transform_object = lambda item, value: value  # type: ignore[method-assign]
    dcp.save(state, checkpoint_id=folder, planner=planner, no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')


def load_common(argv: list[str]) -> None:
    """Load the common state as a start does."""
    from megatron.core import dist_checkpointing

    from megatron_lrpath.training import seams
    from megatron_lrpath.training.session import Session

    seams.apply(Session("cpu"))
    print(sorted(dist_checkpointing.load_common_state_dict(argv[0])))


def load_refused(argv: list[str]) -> None:
    """Load the common state, and print the refusal."""
    try:
        load_common(argv)
    except BaseException as error:  # torch wraps it
        print(f"refused: {error}")


def test_harmless_common_state_is_loaded(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "iter_0000001", {"iteration": 1, "args": None})
    outcome = launch(
        "tests.reliability.test_reliability_strangers:load_common", [str(tmp_path / "iter_0000001")]
    ).ok()
    assert "['args', 'iteration']" in outcome.output


def test_a_malicious_object_in_the_common_state_is_refused(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    write_checkpoint(tmp_path / "iter_0000001", {"args": Malicious(trap)})
    outcome = launch(
        "tests.reliability.test_reliability_strangers:load_refused", [str(tmp_path / "iter_0000001")]
    )
    assert "holds more than data" in outcome.output, outcome.output[-2000:]
    assert not trap.exists()


def test_a_malicious_metadata_file_is_refused(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    write_checkpoint(tmp_path / "iter_0000001", {})
    (tmp_path / "iter_0000001/.metadata").write_bytes(pickle.dumps(Malicious(trap)))
    outcome = launch(
        "tests.reliability.test_reliability_strangers:load_refused", [str(tmp_path / "iter_0000001")]
    )
    assert "which has no place in a checkpoint" in outcome.output, outcome.output[-2000:]
    assert not trap.exists()


@pytest.mark.parametrize("name", ["common", "metadata"])
def test_the_traps_work_without_the_seams(tmp_path: Path, name: str) -> None:
    """The tests above can fail: torch's own way of loading runs the trap."""
    import torch.distributed.checkpoint as dcp

    trap = tmp_path / "executed"
    folder = tmp_path / "iter_0000001"
    write_checkpoint(folder, {"args": Malicious(trap)} if name == "common" else {})
    if name == "metadata":
        (folder / ".metadata").write_bytes(pickle.dumps(Malicious(trap)))
    state = {"common_state/shard_0_1": io.BytesIO()}
    with suppress(BaseException):  # the trap's result is no checkpoint
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    assert trap.exists()

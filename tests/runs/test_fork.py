"""A main path that continues in another output keeps its first checkpoint, regardless of the original."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import Plan
from megatron_lrpath.runs.checkpoints import complete_steps, present_fingerprint, tracked_step
from megatron_lrpath.runs.fork import fork_main
from megatron_lrpath.runs.lineage import read_lineage, write_lineage
from megatron_lrpath.runs.results import completed_step
from tests.support.fake_trainer import save
from tests.support.plan_text import plan_with


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return the folder of a main path with checkpoints of steps 40 and 100."""
    folder = tmp_path / "main"
    for step in (40, 100):
        save(folder / "checkpoints", step)
    write_lineage(folder, {"run": "main", "versions": []}, None, 0, 1, None)
    return folder


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return plan_with(tmp_path, versions=[{"name": "v1", "steps": 100}])


def test_a_fork_outlives_the_checkpoint_that_it_began_with(tmp_path: Path, source: Path, plan: Plan) -> None:
    fork = tmp_path / "fork"
    before = present_fingerprint(source / "checkpoints", 40)
    fork_main(source, 40, fork, plan.main)
    assert complete_steps(fork / "checkpoints") == [40]
    assert tracked_step(fork / "checkpoints") == 40
    assert completed_step(fork) == plan.main.last_step == 40
    assert read_lineage(fork) == read_lineage(source)
    shutil.rmtree(source)
    assert complete_steps(fork / "checkpoints") == [40]
    assert present_fingerprint(fork / "checkpoints", 40) == before
    fork_main(source, 40, fork, plan.main)  # nothing left to do


def test_a_fork_that_still_trains_is_not_complete(tmp_path: Path, source: Path, plan: Plan) -> None:
    fork_main(source, 100, tmp_path / "fork", plan.main)
    assert completed_step(tmp_path / "fork") is None


@pytest.mark.parametrize("stop", ["links", "lineage"])
def test_an_interrupted_fork_is_completed(
    tmp_path: Path, source: Path, plan: Plan, stop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: object, **named: object) -> None:
        raise KeyboardInterrupt

    fork = tmp_path / "fork"
    place = "pathlib.Path.rename" if stop == "links" else "megatron_lrpath.runs.fork.write_sealed"
    with monkeypatch.context() as patch:
        patch.setattr(place, stopped)
        with pytest.raises(KeyboardInterrupt):
            fork_main(source, 40, fork, plan.main)
    fork_main(source, 40, fork, plan.main)
    assert complete_steps(fork / "checkpoints") == [40]
    assert sorted(path.name for path in (fork / "checkpoints").iterdir()) == [
        "iter_0000040",
        "latest_checkpointed_iteration.txt",
    ]
    assert read_lineage(fork) is not None


def test_without_hard_links_the_checkpoint_is_linked_as_a_folder(
    tmp_path: Path, source: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object, **named: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refused)
    fork_main(source, 40, tmp_path / "fork", plan.main)
    assert (tmp_path / "fork/checkpoints/iter_0000040").is_symlink()
    assert complete_steps(tmp_path / "fork/checkpoints") == [40]


def test_a_source_without_a_lineage_is_refused(tmp_path: Path, plan: Plan) -> None:
    with pytest.raises(UserError, match="lineage is missing"):
        fork_main(tmp_path / "nothing", 40, tmp_path / "fork", plan.main)
    assert not (tmp_path / "fork").exists()

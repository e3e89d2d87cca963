"""Location of a run and its files: long paths, a umask, a checkout that is read-only."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import megatron_lrpath
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import (
    NAME_LIMIT,
    PATH_LIMIT,
    ROOM,
    atomic_rewrite,
    atomic_write_text,
    length_problem,
)
from megatron_lrpath.plan import load_plan
from megatron_lrpath.runs.checkpoints import complete_steps
from tests.support.training_fixtures import make_plan, train
from tests.training.test_training_rates import words_without_plan


def longest_below(folder: Path) -> Path:
    """Return a folder with the longest path that is allowed for runs."""
    room = PATH_LIMIT - ROOM - len(os.fsencode(folder))
    parts, rest = divmod(room, 200)
    names = ["x" * 199] * (parts - 1) + ["x" * 100, "x" * (rest + 98)]
    path = folder.joinpath(*names)
    assert len(os.fsencode(path)) == PATH_LIMIT - ROOM
    return path


def test_a_run_at_the_longest_path_is_readable_by_its_group_and_writes_nowhere_else(tmp_path: Path) -> None:
    """A shared checkout and a shared virtual environment may therefore be read-only."""
    make_plan(tmp_path, (6,))
    place = longest_below(tmp_path)
    argv = [*words_without_plan(tmp_path / "plan.yaml", tmp_path), "--lr", "0.01", "--lr-path", "main"]
    argv += ["--train-iters", "4", "--save", str(place), "--tensorboard-dir", str(place / "tensorboard")]
    train([*argv, "--exit-interval", "2"]).ok()
    written = train(argv, probe="written_for_a_group").ok().probed[0]
    assert complete_steps(place) == [2, 4]
    shared = [str(Path(megatron_lrpath.__file__).parents[1]), sys.prefix]
    assert any(path.startswith(str(place)) for path in written)
    assert [path for path in written if path.startswith(tuple(shared)) and "__pycache__" not in path] == []
    last = place / "iter_0000004"
    assert {path.stat().st_mode & 0o777 for path in last.rglob("*") if path.is_file()} == {0o640}
    assert last.stat().st_mode & 0o777 == 0o750


def test_a_path_without_room_for_the_files_of_a_run_is_refused_when_the_plan_is_read(tmp_path: Path) -> None:
    place = longest_below(tmp_path)
    assert length_problem(place) is None
    for wrong, said in (
        (f"{place}x", "leave room for the files"),
        (tmp_path / ("ü" * 128), f"{NAME_LIMIT} is the"),
    ):
        assert said in str(length_problem(wrong))
        with pytest.raises(UserError, match="output") as raised:
            load_plan(make_plan(tmp_path, (4,), output=str(wrong)))
        assert said in str(raised.value)


@pytest.mark.parametrize(("mask", "mode"), [(0o002, 0o664), (0o027, 0o640), (0o077, 0o600)])
def test_a_file_that_replaces_another_has_the_mode_of_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        for text in ("first", "second"):
            atomic_write_text(tmp_path / "file", text)
            assert (tmp_path / "file").stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


@pytest.mark.parametrize("mode", [0o600, 0o444, 0o664])
def test_a_users_file_keeps_its_permissions_and_its_links(tmp_path: Path, mode: int) -> None:
    plan, link = tmp_path / "plan.yaml", tmp_path / "link.yaml"
    plan.write_text("first")
    plan.chmod(mode)
    link.symlink_to(plan.name)
    atomic_rewrite(link, b"second")
    assert (plan.read_text(), plan.stat().st_mode & 0o777) == ("second", mode)
    assert link.is_symlink()

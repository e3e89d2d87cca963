"""Writing commands that are killed or run two at once leave complete files, old or new, and no others.

`scripts/kill_writers.py` tries every moment of every command; this file tries a few.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lrpath import files
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import appearing_folder, atomic_write_text, sweep_abandoned
from tests.support import ROOT

KILLS = int(os.environ.get("LRPATH_WRITER_KILLS", "5"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("writers", "kills"),
    [
        *((name, KILLS) for name in ("slices", "datasets", "submit", "run")),
        ("merge,import,export,report,chats", 2),  # together: they share the import of torch
    ],
)
def test_a_killed_writer_leaves_the_old_or_the_new_and_two_at_once_do_no_harm(
    tmp_path: Path, writers: str, kills: int
) -> None:
    command = [sys.executable, "-W", "ignore", "scripts/kill_writers.py", str(tmp_path), "--writers", writers]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        [*command, "--kills", str(kills)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    for writer in writers.split(","):
        assert f"{writer}: {kills} kills" in answer.stdout


def write_and_die(target: Path, folder: bool) -> None:
    """Write in a process that is killed meanwhile."""
    pid = os.fork()
    if pid == 0:
        if folder:
            with appearing_folder(target) as partial:
                (partial / "new").write_text("half")
                os.kill(os.getpid(), 9)
        with files.atomic_open(target) as stream:
            stream.write(b"half")
            os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_killed_process_left_is_gone_after_the_next_call(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "it"
    write_and_die(target, folder)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".it.")
    if folder:
        with appearing_folder(target) as partial:
            (partial / "new").write_text("whole")
    else:
        atomic_write_text(target, "whole")
    assert list(tmp_path.iterdir()) == [target]


def test_a_writer_that_lives_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "it"
    with files.atomic_open(target) as stream:
        stream.write(b"the first")
        assert sweep_abandoned(target)
        atomic_write_text(target, "the second")
    assert target.read_text() == "the first"
    with appearing_folder(tmp_path / "folder") as partial:
        (partial / "new").touch()
        with (
            pytest.raises(UserError, match="another process is writing it now"),
            appearing_folder(tmp_path / "folder"),
        ):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "it"]


@pytest.mark.parametrize("exchange", [True, False])
def test_the_old_folder_is_kept_until_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    target = tmp_path / "it"
    if not exchange:  # a file system that cannot exchange two names
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for text in ("old", "new"):
        with appearing_folder(target) as partial:
            (partial / "file").write_text(text)
            assert not target.exists() or (target / "file").read_text() == "old"
    assert (target / "file").read_text() == "new"
    target.rename(tmp_path / ".it.old")  # killed between the two renames
    with pytest.raises(KeyError), appearing_folder(target):
        raise KeyError
    assert (target / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]

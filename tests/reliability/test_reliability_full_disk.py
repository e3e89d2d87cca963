"""A full disk stops no training: saves fail and are retried, records wait for room, nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_lrpath import cli
from megatron_lrpath.errors import refusal
from megatron_lrpath.full_disk import PatientFile, keep_printing
from megatron_lrpath.runs import checkpoints as disk
from megatron_lrpath.runs import history as histories
from megatron_lrpath.runs.checkpoints import read_manifest, sum_file
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.training import steps as watching
from megatron_lrpath.training.exits import Exits
from tests.support.faults import BALLAST, fill, train_with
from tests.support.training_fixtures import history, make_plan, run_words, train
from tests.training.test_watching import curves


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a real disk of 20 MB at `runs`, where a plan in `tmp_path` has its output."""
    folder = tmp_path / "runs"
    folder.mkdir()
    yield from mounted(folder, ["-t", "tmpfs", "-o", "size=20m", "tmpfs"])


@pytest.fixture
def small_ext4(tmp_path: Path) -> Iterator[Path]:
    """Yield a small ext4 disk at `runs`, where a folder also needs space."""
    folder, image = tmp_path / "runs", tmp_path / "image"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(40 * 2**20)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no ext4 can be made here")
    yield from mounted(folder, ["-o", "loop", str(image)])


def mounted(folder: Path, options: list[str]) -> Iterator[Path]:
    """Yield `folder` with a disk mounted there."""
    mount = ["mount", *options, str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no right to mount here")
    yield folder
    for _ in range(50):  # a process that is ending may still have a file open
        if subprocess.run(["umount", str(folder)], check=False, capture_output=True).returncode == 0:
            return
        time.sleep(0.2)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def root_of(folder: Path) -> Path:
    """Return the folder of the main path's checkpoints."""
    return folder / "runs/ours/main/checkpoints"


def test_a_full_disk_fails_the_save_and_not_the_training(tmp_path: Path) -> None:
    """Each attempt prints both numbers, the older checkpoints stay, and a later save succeeds."""
    argv = run_words(make_plan(tmp_path, (6, 6)), "ours", "main", "--save-interval", "2")
    outcome = train_with(["full:3:4"], argv).ok()
    assert disk.complete_steps(root_of(tmp_path)) == [2, 3, 8, 9]
    warnings = [line for line in outcome.output.splitlines() if "lrpath: WARNING" in line]
    assert [step for step in range(1, 10) for line in warnings if f"of step {step} could not" in line] == [
        4,
        6,
    ]
    assert all("MB and 1.0 kB are free" in line for line in warnings)
    assert [line["step"] for line in history(tmp_path / "runs/ours/main")] == list(range(1, 10))
    assert not [name for name in os.listdir(root_of(tmp_path)) if disk.SAVING in name]


def test_a_full_disk_at_a_branch_point_stops_the_run(tmp_path: Path) -> None:
    argv = run_words(make_plan(tmp_path, (6, 6)), "ours", "main")
    outcome = train_with(["full:1:1"], argv)
    assert outcome.status == [1]
    assert "Other runs start from step 3" in outcome.output
    train(argv).ok()
    assert disk.complete_steps(root_of(tmp_path)) == [3, 6, 9]


@pytest.mark.parametrize("extra", [(), ("--async-save",)], ids=["sync", "async"])
def test_a_disk_that_is_full_for_a_while_costs_the_saves_of_that_while_alone(
    tmp_path: Path, small_disk: Path, extra: tuple[str]
) -> None:
    """Writing fails, not the check of the space: for checkpoints, history, TensorBoard, lineage and log."""
    spikes = ("--loss-spike-window", "8", "--loss-spike-action", "skip")
    argv = run_words(make_plan(tmp_path, (180,)), "ours", "main", "--save-interval", "10", *spikes, *extra)
    faults = ["roomy", f"brimful:15:54:{small_disk}", "large:30:100", f"log:{small_disk / 'log'}"]
    train_with(faults, argv).ok()
    run = small_disk / "ours/main"
    assert [step for step in disk.complete_steps(root_of(tmp_path)) if step < 54] == [10]
    assert set(disk.complete_steps(root_of(tmp_path))) >= {60, 70, 80, 90}
    for step in disk.complete_steps(root_of(tmp_path)):
        checkpoint = disk.checkpoint_folder(root_of(tmp_path), step)
        sums = {name: sum_file(checkpoint / name) for name in read_manifest(checkpoint)}
        assert sums == read_manifest(checkpoint)
    assert not [name for name in os.listdir(root_of(tmp_path)) if disk.SAVING in name]
    steps = list(range(1, 91))
    assert [line["step"] for line in history(run)] == steps
    assert list(curves(run)[watching.LOSS]) == [step * 4 * 16 for step in steps]
    assert list(curves(run)["lm loss"]) == steps
    lineage = json.loads((run / "lineage.json").read_text())
    assert 30 in [skip["step"] for skip in lineage["skipped"]]
    log = (small_disk / "log").read_text()
    assert log.count("could not be saved") == 4
    for name in ("history.jsonl", "tfevents"):
        lines = [line for line in log.splitlines() if name in line]
        assert [("buffered in memory" in line, "no data is lost" in line) for line in lines] == [
            (True, False),
            (False, True),
        ]


@pytest.mark.parametrize("extra", [(), ("--async-save",)], ids=["sync", "async"])
def test_a_disk_that_refuses_the_metadata_costs_the_saves_alone(tmp_path: Path, extra: tuple[str]) -> None:
    """The first rank writes the metadata while the other waits; both continue."""
    argv = run_words(make_plan(tmp_path, (20,)), "ours", "main", "--save-interval", "2", *extra)
    outcome = train_with(["metadata:2:4"], argv, nproc=2).ok()
    assert disk.complete_steps(root_of(tmp_path)) == [2, 6, 10]
    assert outcome.output.count("could not be saved: No space left on device") == 2
    assert [line["step"] for line in history(tmp_path / "runs/ours/main")] == list(range(1, 11))
    assert not [name for name in os.listdir(root_of(tmp_path)) if disk.SAVING in name]


def test_a_disk_without_room_for_a_folder_costs_the_saves_alone(tmp_path: Path, small_ext4: Path) -> None:
    argv = run_words(make_plan(tmp_path, (40,)), "ours", "main", "--save-interval", "5")
    train_with([f"brimful:6:14:{small_ext4}"], argv).ok()
    kept = disk.complete_steps(root_of(tmp_path))
    assert 10 not in kept
    assert {15, 20} <= set(kept)
    assert [line["step"] for line in history(small_ext4 / "ours/main")] == list(range(1, 21))


def test_a_part_that_was_written_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk writes three bytes of a line and refuses the rest, twice; a sync that misses lines fails."""
    file = PatientFile(tmp_path / "lines", "The lines")
    file.write(b"first\n")
    original, room = os.write, [3]

    def write(descriptor: int, data: bytes) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = original(descriptor, bytes(data)[: room[0]])
        room[0] -= written
        return written

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        file.write(b"second\n")
        room[0] = 2
        file.write(b"third\n")
        with pytest.raises(OSError, match="No space left") as refusal:
            file.sync()
    assert refusal.value.filename == str(tmp_path / "lines")
    assert (tmp_path / "lines").read_bytes() == b"first\nsecon"
    file.sync()
    file.write(b"fourth\n")
    file.close()
    assert (tmp_path / "lines").read_bytes() == b"first\nsecond\nthird\nfourth\n"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "lines: No space left on device. The lines cannot be written and is buffered in memory" in said[0]
    assert said[1].endswith("lines: the disk accepts writes again, no data is lost.")


def test_what_a_sync_loses_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk (for example with a quota) accepts lines, and has no room for them at the sync."""
    path = tmp_path / "lines"
    path.write_bytes(b"of an earlier start\n")
    file = PatientFile(path, "The lines", synced=True)
    file.write(b"first\n")
    file.sync()
    file.write(b"second\n")

    def lose(descriptor: int) -> None:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - 4)
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lose)
        with pytest.raises(OSError, match="quota"):
            file.sync()
    file.write(b"third\n")
    file.sync()
    file.close()
    assert path.read_bytes() == b"of an earlier start\nfirst\nsecond\nthird\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_log_keeps_the_order_of_what_is_printed_and_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Output and errors go to one file, whose disk accepts nothing for a while."""
    original, room = os.write, [True]

    def write(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(number, os.strerror(number))
        return original(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    with (tmp_path / "log").open("a") as one, (tmp_path / "log").open("a") as other:
        monkeypatch.setattr(sys, "stdout", one)
        monkeypatch.setattr(sys, "stderr", other)
        keep_printing()
        for step, free in enumerate((True, False, False, True)):
            room[0] = free
            print(f"step {step}")
            print(f"warning {step}", file=sys.stderr)
    lines = [f"{what} {step}" for step in range(4) for what in ("step", "warning")]
    assert (tmp_path / "log").read_text().splitlines() == lines


def test_a_start_on_a_full_disk_is_reported(
    tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training and commands report one error; the same arguments resume when there is room."""
    plan = make_plan(tmp_path, (6,))
    argv = run_words(plan, "ours", "main")
    fill(str(small_disk))
    for command in ("run", "report"):
        assert cli.main([command, str(plan)]) == 2
        *warnings, error = capsys.readouterr().err.splitlines()
        assert all(line.startswith("lrpath: WARNING: disk: 0 bytes free") for line in warnings)
        assert error.startswith(f"lrpath: error: {small_disk}")
        assert error.endswith(": No space left on device. Free disk space and call again.")
    outcome = train(argv)
    assert outcome.status == [1], outcome.output
    assert "Traceback" not in outcome.output
    assert "No space left on device. Free disk space and call again." in outcome.output
    (small_disk / BALLAST).unlink()
    train(argv).ok()


def test_a_history_is_truncated_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No new file is written, because a full disk has no room for it; with nothing to cut, nothing is written."""

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(histories, "atomic_write_text", no_room)
    path = RunFolder(tmp_path).history
    lines = [f'{{"step": {step}, "loss": 4.5}}\n' for step in range(1, 9)]
    path.write_text("".join(lines) + '{"step": 9, "lo')
    before = path.stat().st_ino
    histories.drop_steps_after(path, 6)
    assert path.read_text() == "".join(lines[:6])
    os.utime(path, ns=(1, 1))
    histories.drop_steps_after(path, 6)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before, 1)


def test_a_disk_error_of_one_rank_is_reported_by_that_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the rendezvous no other rank can detect it."""

    def end(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit), Exits().reported():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/runs")
    assert "/data/runs: No space left on device. Free disk space and call again." in capsys.readouterr().err


def test_a_missing_right_without_a_name_is_no_users_mistake() -> None:
    assert refusal(PermissionError(errno.EPERM, os.strerror(errno.EPERM))) is None
    assert refusal(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) is not None

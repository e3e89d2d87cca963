"""Files read from a run's folder: histories that are being written, checkpoints, locks."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lrpath.locks import FolderLock, LockHeldError, describe_owner, is_held
from megatron_lrpath.runs.checkpoints import checkpoint_complete, complete_steps
from megatron_lrpath.runs.history import HistoryTail, parse_line
from megatron_lrpath.runs.results import completed_step


def line(step: int, seconds: float = 0.5) -> str:
    return json.dumps({"step": step, "lr": 1e-3, "loss": 2.0, "seconds": seconds}) + "\n"


def test_a_line_counts_once_it_is_whole(tmp_path):
    path = tmp_path / "history.jsonl"
    tail = HistoryTail(tmp_path)
    assert tail.poll() == []
    path.write_text(line(1) + line(2)[:10])
    assert [row.step for row in tail.poll()] == [1]
    with path.open("a") as stream:
        stream.write(line(2)[10:] + line(3, 1.5))
    assert [row.step for row in tail.poll()] == [2, 3]
    assert tail.poll() == []
    assert tail.seconds_per_step == 0.5


def test_a_long_history_is_read_from_its_end(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text("".join(line(step) for step in range(1, 20_001)))
    tail = HistoryTail(tmp_path)
    rows = tail.poll()
    assert rows[-1].step == 20_000
    assert len(rows) < 2000


def test_a_history_cut_back_by_a_resume_is_read_again(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text("".join(line(step) for step in range(1, 9)))
    tail = HistoryTail(tmp_path)
    tail.poll()
    path.write_text("".join(line(step) for step in range(1, 5)))
    tail.poll()
    assert tail.last is not None
    assert tail.last.step == 4


@given(st.binary(max_size=80))
def test_a_damaged_line_is_no_row_and_no_crash(data):
    row = parse_line(data)
    assert row is None or row.step >= 0


@pytest.mark.parametrize("value", [None, "0.1", True, [], {}])
def test_values_of_other_kinds_are_unknown(value):
    row = parse_line(json.dumps({"step": 3, "lr": value, "loss": value, "seconds": value}).encode())
    assert row is not None
    assert (row.lr, row.loss, row.seconds) == (None, None, None)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"step": "9"}', '{"step": true}', "{"])
def test_a_damaged_result_is_no_result(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    assert completed_step(tmp_path) is None


def test_a_checkpoint_is_complete_only_with_its_last_file_or_the_tracker(tmp_path):
    folder = tmp_path / "iter_0000060"
    assert not checkpoint_complete(tmp_path, 60)
    folder.mkdir()
    (folder / ".metadata").write_text("x")
    assert not checkpoint_complete(tmp_path, 60)
    (folder / "metadata.json").write_text('{"sharded_b')
    assert not checkpoint_complete(tmp_path, 60)
    (folder / "metadata.json").write_text("{}")
    assert checkpoint_complete(tmp_path, 60)
    assert complete_steps(tmp_path) == [60]


def test_the_tracker_vouches_for_folders_that_are_there_and_no_newer(tmp_path):
    for step in (20, 40, 60):
        (tmp_path / f"iter_{step:07d}/mp_rank_00").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("40")
    assert complete_steps(tmp_path) == [20, 40]
    assert not checkpoint_complete(tmp_path, 30)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4\x00")
    assert complete_steps(tmp_path) == []


def test_a_lock_is_seen_by_others_and_gone_with_its_owner(tmp_path):
    assert not is_held(tmp_path)
    program = (
        "import sys; from pathlib import Path; from megatron_lrpath.locks import FolderLock\n"
        "lock = FolderLock.acquire(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        assert is_held(tmp_path)
        with pytest.raises(LockHeldError, match=f"process {owner.pid} on "):
            FolderLock.acquire(tmp_path, patience=0)
        owner.kill()
        owner.wait()
    assert not is_held(tmp_path)
    FolderLock.acquire(tmp_path, patience=0).close()


def test_a_lock_with_unreadable_text_still_locks(tmp_path):
    lock = FolderLock.acquire(tmp_path)
    (tmp_path / ".lock").write_text("\x00[")
    assert describe_owner(tmp_path) == "another process"
    assert is_held(tmp_path)
    lock.close()


def test_a_history_replaced_by_one_of_the_same_length_is_read_again(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text(line(1) + line(2))
    tail = HistoryTail(tmp_path)
    tail.poll()
    other = tmp_path / "other"
    other.write_text(line(1) + line(3))
    other.rename(path)
    tail.poll()
    assert tail.last is not None
    assert tail.last.step == 3

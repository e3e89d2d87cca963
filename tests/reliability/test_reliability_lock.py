"""One process at a time trains a run, on this machine and on a disk that machines share."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_lrpath.errors import UserError
from megatron_lrpath.locks import LOCK_NAME, FolderLock, owner_of
from megatron_lrpath.training.guards import runlock

HOLD = (
    "import sys, time; from functools import partial; from pathlib import Path\n"
    "from megatron_lrpath.training.exits import Exits; from megatron_lrpath.training.guards import runlock\n"
    "runlock.BEAT = 0.1; root = Path(sys.argv[1])\n"
    "lock = runlock.hold(root, partial(Exits().lost_lock, root)); print('held', flush=True); time.sleep(600)"
)


def hold(root: Path, patience: float = runlock.PATIENCE) -> runlock.RunLock:
    """Return the lock on a folder; fail if another process takes it over."""
    return runlock.hold(root, lambda owner: pytest.fail(f"{owner} took it over"), patience)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the heartbeat to a tenth of a second."""
    monkeypatch.setattr(runlock, "BEAT", 0.1)


def test_a_second_launch_is_refused_and_names_the_first(tmp_path: Path) -> None:
    """It is accepted as soon as the first process is killed."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        with pytest.raises(UserError, match=f"process {owner.pid} on {socket.gethostname()} is training"):
            hold(tmp_path, patience=0.2)
        owner.kill()
        owner.wait()
    hold(tmp_path, patience=0).close()


def test_a_released_lock_is_taken_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(tmp_path).close()
    assert (tmp_path / LOCK_NAME).read_bytes() == b""
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    hold(tmp_path).close()


def write_elsewhere(root: Path, beat: int, **owner: str) -> None:
    """Write the lock file as an owner on another machine, or in another container, does."""
    record = {"pid": 4711, "host": "elsewhere", "since": 1, "beat": beat, **owner}
    path = root / LOCK_NAME
    path.touch()
    with path.open("r+b") as stream:  # as RunLock writes: the file is never empty
        stream.truncate(stream.write(json.dumps(record).encode()))


@pytest.mark.parametrize("owner", [{}, {"host": socket.gethostname(), "space": "another container's"}])
def test_an_owner_on_another_machine_is_noticed_by_its_heartbeat(
    tmp_path: Path, owner: dict[str, str]
) -> None:
    """flock does not reach the other machine or container, which may have the same name as this machine."""
    stop = threading.Event()

    def beat() -> None:
        number = 0
        while not stop.wait(0.05):
            number += 1
            write_elsewhere(tmp_path, number, **owner)

    write_elsewhere(tmp_path, 0, **owner)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"process 4711 on \S+ is training this run already"):
            hold(tmp_path)
    finally:
        stop.set()
        thread.join()


def test_two_owners_with_one_name_process_id_and_second_are_distinguished(tmp_path: Path) -> None:
    """Two containers may have them, each with a lock that does not reach the other."""
    (tmp_path / LOCK_NAME).touch()
    first, second = (runlock.RunLock(tmp_path, None, pytest.fail) for _ in range(2))
    second.start()
    assert not first.is_ours()
    with pytest.raises(runlock.LockLostError):
        first.beat()
    second.close()


def test_a_dead_owner_on_another_machine_holds_nothing(tmp_path: Path) -> None:
    write_elsewhere(tmp_path, 3)
    lock = hold(tmp_path)
    assert lock.is_ours()
    lock.close()


def test_an_owner_that_was_overtaken_ends_before_it_writes_again(tmp_path: Path) -> None:
    """The owner was suspended for longer than a successor waits; the file keeps the successor's name."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        write_elsewhere(tmp_path, 9)
        _, said = owner.communicate(timeout=240)
        assert owner.returncode == 1
    assert "process 4711 on elsewhere took this run over" in said
    assert "Traceback" not in said
    assert owner_of(tmp_path)["host"] == "elsewhere"


def test_a_process_that_does_not_wait_is_refused_a_held_lock(tmp_path: Path) -> None:
    lock = hold(tmp_path)
    write_elsewhere(tmp_path, 0)
    lock.beat()
    assert lock.is_ours()
    lock.close()


def test_a_disk_without_locks_is_guarded_by_the_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> FolderLock:
        (tmp_path / LOCK_NAME).touch()
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr(FolderLock, "acquire", unsupported)
    first = hold(tmp_path)
    with pytest.raises(UserError, match="is training this run already"):
        second_of_two(tmp_path)
    assert first.is_ours()
    first.close()


def second_of_two(root: Path) -> None:
    """Simulate a second launch on the same disk, distinguished from the first by its host name."""
    original = socket.gethostname
    socket.gethostname = lambda: "elsewhere"  # type: ignore[assignment]
    try:
        hold(root)
    finally:
        socket.gethostname = original

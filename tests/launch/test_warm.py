"""Runs forked from a warm process have the same ends, signals, kills and results as fresh processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_lrpath.launch import warm
from megatron_lrpath.launch.process import only_one
from megatron_lrpath.launch.torchrun import Ranks
from megatron_lrpath.runs import failure
from tests.support import ROOT
from tests.support.states import states
from tests.support.training_fixtures import history, make_plan
from tests.support.waiting import until

GRACE = 20.0


def start(folder: Path, *ends: str) -> Any:
    """Start forked ranks with these ends (tests/support/ends.py), log and failure as files in `folder`."""
    environment = {failure.VARIABLE: str(folder / "error.json"), "OMP_NUM_THREADS": "1"}
    return warm.start(Ranks("tests.support.ends", ends, len(ends)), environment, GRACE, folder / "log")


def tree(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def gone(processes: list[psutil.Process]) -> bool:
    """Return whether none of the processes runs."""
    return not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes)


@pytest.mark.parametrize(
    ("ends", "status", "text"),
    [
        (("ok",), 0, None),
        (("ok", "ok"), 0, None),
        (("exit:75", "exit:75"), 75, None),
        (("exit:3",), 3, "its process exited with status 3"),
        (("exit:3", "wait:{}/waits"), 3, "rank 0 exited with status 3"),
        (("complain:Connection closed by peer", "late kill:9"), 137, "rank 1 was killed by SIGKILL"),
        (("user:no such slice",), 2, "no such slice"),
    ],
)
def test_ends(tmp_path: Path, ends: tuple[str, ...], status: int, text: str | None) -> None:
    assert start(tmp_path, *(end.format(tmp_path) for end in ends)).wait() == status
    found = failure.read(tmp_path / "error.json")
    assert (found is None) == (text is None)
    assert text is None or text in found.message


def test_a_folder_of_temporary_files_without_room_for_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's sockets are in the folder, and Linux accepts 107 bytes; longer paths start runs cold."""
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    assert not warm.has_room_for_sockets()
    process = start(tmp_path, "exit:75")
    assert not isinstance(process, warm.WarmProcess)
    assert process.wait() == 75
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    assert warm.has_room_for_sockets()


def test_ranks_meet_and_their_output_is_in_the_log(tmp_path: Path) -> None:
    assert warm.start(Ranks("tests.support.meeting", ("word",), 2), {}, GRACE, tmp_path / "log").wait() == 0
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["rank 0 of 2: word", "rank 1 of 2: word"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_supervisor_ends_all_ranks(tmp_path: Path, number: int) -> None:
    process = start(tmp_path, f"wait:{tmp_path}/0", f"wait:{tmp_path}/1")
    until(lambda: all((tmp_path / name).exists() for name in "01"), 60)
    processes = tree(psutil.Process(int((tmp_path / "0").read_text())).ppid())
    process.send_signal(number)
    assert process.wait() not in (0, None)
    assert gone(processes)
    assert failure.read(tmp_path / "error.json") is None  # the rank ended on request


def test_the_ranks_of_a_killed_supervisor_end(tmp_path: Path) -> None:
    process = start(tmp_path, f"wait:{tmp_path}/0", f"wait:{tmp_path}/1")
    until(lambda: all((tmp_path / name).exists() for name in "01"), 60)
    processes = tree(psutil.Process(int((tmp_path / "0").read_text())).ppid())
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    until(lambda: gone(processes), 60)


def test_the_lock_lasts_as_long_as_the_run(tmp_path: Path) -> None:
    with only_one(tmp_path, "holds it"):
        descriptor = next(
            int(name) for name in os.listdir("/proc/self/fd")
            if os.path.realpath(f"/proc/self/fd/{name}").startswith(str(tmp_path))
        )  # fmt: skip
        ranks = Ranks("tests.support.ends", (f"wait:{tmp_path}/0",), 1)
        process = warm.start(ranks, {}, GRACE, tmp_path / "log", (descriptor,))
        until((tmp_path / "0").exists, 60)
    with pytest.raises(Exception, match="holds it"), only_one(tmp_path, "holds it", patience=0.1):
        pass
    process.terminate()
    process.wait()
    with only_one(tmp_path, "holds it"):
        pass


@pytest.mark.parametrize(
    ("preloaded", "expected"),
    [
        (types.SimpleNamespace(SOURCES={"a": 1}, modified={"a": 1}.get), True),
        (types.SimpleNamespace(SOURCES={"a": 1}, modified={"a": 2}.get), False),
        (types.SimpleNamespace(SOURCES={"a": 1}, modified={}.get), False),
        (None, False),
    ],
)
def test_changed_sources_are_imported_again(
    preloaded: Any, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, warm.PRELOADED, preloaded)
    with subprocess.Popen(["sleep", "100"]) as sleeper:  # a parent with one thread
        monkeypatch.setattr(os, "getppid", lambda: sleeper.pid)
        assert warm.is_forkable() is expected
        sleeper.kill()


def test_a_server_with_threads_is_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, warm.PRELOADED, types.SimpleNamespace(SOURCES={}, modified={}.get))
    code = "import threading, sys; threading.Thread(target=sys.stdin.read).start(); print('on', flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"on\n"
        monkeypatch.setattr(os, "getppid", lambda: other.pid)
        assert not warm.is_forkable()


def lrpath(plan: Path, *argv: str) -> subprocess.Popen[str]:
    """Start `lrpath run` of the main path, as a user does."""
    command = [
        sys.executable,
        "-m",
        "megatron_lrpath.cli",
        "run",
        str(plan),
        "--run",
        "main",
        "--device",
        "cpu",
    ]
    return subprocess.Popen(
        [*command, *argv], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_killed_and_called_again_it_ends_bit_equal_to_fresh_processes(tmp_path: Path) -> None:
    changes = {"megatron": {"save_interval": 50}}
    plan = make_plan(tmp_path, (400,), **changes)
    fresh = make_plan(tmp_path / "fresh", (400,), **changes)
    first = lrpath(plan)
    main = tmp_path / "runs/ours/main"
    until(lambda: (main / "history.jsonl").exists() and len(history(main)) > 20, 120)
    processes = tree(first.pid)
    assert any("forkserver" in " ".join(one.cmdline()) for one in processes)
    first.kill()
    until(lambda: gone(processes[1:]), 60)
    assert len(history(main)) < 200
    for process in (lrpath(plan), lrpath(fresh, "--cold")):
        output = process.communicate(timeout=280)[0]
        assert process.returncode == 0, output
        assert "Warning" not in output
    folders = [
        folder / "runs/ours/main/checkpoints/iter_0000200" for folder in (tmp_path, tmp_path / "fresh")
    ]
    ours, expected = states(*folders)
    assert ours == expected


def test_a_process_with_lasting_imports_ends_without_a_word() -> None:
    code = "import megatron_lrpath.launch.preloaded"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "leaked" not in ended.stderr

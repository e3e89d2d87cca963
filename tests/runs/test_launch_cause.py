"""The cause of a failure is passed on as data: its writer, its precedence, and torchrun's part."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lrpath.errors import RendezvousError, TrainingStoppedError, UserError
from megatron_lrpath.launch import torchrun
from megatron_lrpath.runs import failure
from megatron_lrpath.runs.failure import Failure
from tests.support import ROOT

CLOSED = "[pair.cc:561] Connection closed by peer [127.0.0.1]:17324. This is typically"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "error.json"
    monkeypatch.setenv(failure.VARIABLE, str(path))
    return path


def message(file: Path) -> str:
    found = failure.read(file)
    assert found is not None
    return found.message


CAUSE, CONSEQUENCE = RuntimeError("bad\nthing"), RuntimeError(CLOSED)


@pytest.mark.parametrize("errors", [(CAUSE, CONSEQUENCE), (CONSEQUENCE, CAUSE)])
def test_a_cause_counts_more_than_its_consequences_in_any_order(file, errors):
    for error in errors:
        failure.record_error(error)
    assert message(file) == "RuntimeError: bad"


def test_the_first_cause_stays(file):
    failure.record_error(UserError("slice v2 has 5 tokens, 10 are needed"))
    failure.record_error(CAUSE)
    failure.record(failure.of_status("rank 1", -9, 1))
    assert message(file) == "slice v2 has 5 tokens, 10 are needed"


def test_a_killed_rank_is_named_not_its_neighbours_complaint(file):
    failure.record_error(CONSEQUENCE)
    failure.record(failure.of_status("rank 1", -9, 1))
    assert message(file) == "rank 1 was killed by SIGKILL, possibly out of memory"


def test_a_ranks_message_takes_precedence_over_its_exit_status(file):
    failure.record(failure.of_status("rank 0", 1, 0))
    failure.record_error(CAUSE)
    assert message(file) == "RuntimeError: bad"


def test_of_consequences_alone_the_first_is_kept(file):
    failure.record_error(CONSEQUENCE)
    failure.record(failure.of_status("rank 0", 1, 0))
    assert message(file) == f"RuntimeError: {CLOSED}"


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/d/x")


@pytest.mark.parametrize(
    ("error", "kind", "status", "again", "text"),
    [
        (
            UserError("a.yaml:3: alpha: 2 is not between 0 and 1"),
            "user",
            2,
            False,
            "a.yaml:3: alpha: 2 is not",
        ),
        (
            UserError("2 problems:\n- --bf16: refused.\n- --fp16: refused.\nLeave one out."),
            "user",
            2,
            False,
            "2 problems: --bf16: refused; --fp16: refused; Leave one out.",
        ),
        (TrainingStoppedError("step 6: the loss is not finite"), "stopped", 1, None, "step 6: the loss"),
        (RendezvousError("rank 0: not all 2 ranks have come"), "not-met", 1, True, "rank 0: not all 2 ranks"),
        (FULL, "stopped", 1, None, "/d/x: No space left on device. Free disk space"),
        (KeyError("x"), "error", 1, None, "KeyError: 'x'"),
        (AssertionError(), "error", 1, None, "AssertionError"),
    ],
)
def test_the_kind_of_a_failure_and_whether_calling_again_helps(error, kind, status, again, text):
    found = failure.of_error(error, step=5)
    assert (found.kind, found.status, found.calling_again_helps) == (kind, status, again)
    assert found.message.startswith(text)
    assert (found.host, found.pid, found.step) == (socket.gethostname(), os.getpid(), 5)


def test_an_exception_names_its_rank_where_there_are_several(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    found = failure.of_error(ValueError("odd"))
    assert (found.rank, found.message) == (3, "rank 3: ValueError: odd")


def test_what_is_written_is_read_again(file):
    found = failure.of_error(ValueError("odd"), step=7)
    failure.record(found)
    assert failure.read(file) == found
    failure.clear(file)
    failure.clear(file)
    assert failure.read(file) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"kind": "error", "mess',
        b"[1, 2]",
        b'{"name": "another program\'s"}',
        b'{"kind": "error", "message": 5}',
        b'{"kind": "error", "message": "x", "step": "five"}',
        b'{"kind": "error", "message": "x", "rank": true}',
        b"\xff\xfe\x00",
        json.dumps({"kind": "error", "message": "x" * 10**6}).encode(),
    ],
)
def test_a_torn_foreign_or_huge_file_is_none_and_gives_way(file, content):
    file.write_bytes(content)
    assert failure.read(file) is None
    failure.record_error(CAUSE)
    assert message(file) == "RuntimeError: bad"


def test_a_newer_version_may_write_more(file):
    file.write_text('{"kind": "error", "message": "x", "weather": "fine"}')
    assert failure.read(file) == Failure("error", "x")


def test_a_disk_that_refuses_the_file_hides_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv(failure.VARIABLE, str(tmp_path / "file" / "error.json"))
    (tmp_path / "file").touch()  # not a folder
    with pytest.raises(KeyError), failure.recorded():
        raise KeyError("x")


def test_without_a_launcher_the_run_folder_has_it_and_a_new_start_forgets_the_old_one(tmp_path, monkeypatch):
    monkeypatch.delenv(failure.VARIABLE, raising=False)
    failure.record_error(CAUSE)  # there is no file to write, and no error
    failure.write(tmp_path / "error.json", failure.of_error(KeyError("old")))
    monkeypatch.setenv("RANK", "1")
    failure.use_folder(tmp_path)
    assert message(tmp_path / "error.json") == "KeyError: 'old'"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv(failure.VARIABLE)
    failure.use_folder(tmp_path)
    assert failure.read(tmp_path / "error.json") is None
    failure.record_error(CAUSE)
    assert message(tmp_path / "error.json") == "RuntimeError: bad"


def under_torchrun(file: Path, *ends: str) -> int:
    """Return the exit status of ranks that end so under torchrun."""
    command = torchrun.Ranks("tests.support.ends", tuple(ends), len(ends)).command
    environment = {**os.environ, failure.VARIABLE: str(file), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command], env=environment, timeout=240, check=False, capture_output=True
    ).returncode


@pytest.mark.parametrize(
    ("ends", "text"),
    [
        ((f"complain:{CLOSED}", "late kill:9"), "rank 1 was killed by SIGKILL, possibly out of memory"),
        (("kill:11", f"late raise:{CLOSED}"), "rank 0 was killed by SIGSEGV"),
        (("exit:3", "wait:/dev/null"), "rank 0 exited with status 3"),
        ((f"complain:{CLOSED}", "late raise:bad"), "rank 1: RuntimeError: bad"),
    ],
)
def test_torchrun_reports_how_its_ranks_ended(file, ends, text):
    assert under_torchrun(file, *ends) == 1
    assert message(file) == text


def test_ranks_that_saved_and_stopped_are_no_failure(file):
    assert under_torchrun(file, "exit:75") == 75
    assert not file.exists()


def test_the_entry_is_named_by_its_interpreter():
    command = torchrun.Ranks("a.module", ("--run", "main"), 2).command
    assert command[0] == sys.executable
    assert command[-6:] == ["2", "-m", "--", "a.module", "--run", "main"]
    assert torchrun.Ranks("a.module", ("x",), alone=True).command == [sys.executable, "-m", "a.module", "x"]
    assert signal.Signals(9).name in failure.of_status("it", -9).message

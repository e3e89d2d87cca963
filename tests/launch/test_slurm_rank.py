"""The process that srun starts for a rank: it ends like the rank, records how, and forwards signals once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_lrpath.errors import UserError
from megatron_lrpath.runs import failure
from megatron_lrpath.training.pretrain import set_single_process_environment
from tests.support import ROOT
from tests.support.waiting import until

SLURM = {
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
}


def start(folder: Path, end: str) -> subprocess.Popen[bytes]:
    """Start rank 1 of two, as srun does."""
    environment = os.environ | SLURM | {failure.VARIABLE: str(folder / "error.json"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "megatron_lrpath.launch.slurm.rank", str(folder)]
    return subprocess.Popen(
        [*command, "tests.support.ends", "ok", end], env=environment, start_new_session=True
    )


@pytest.mark.parametrize(
    ("end", "status", "message", "again"),
    [
        ("ok", 0, None, None),
        ("exit:75", 75, None, None),
        ("exit:3", 3, "rank 1 on HOST exited with status 3", None),
        ("exit:2", 2, "rank 1 on HOST exited with status 2", False),
        ("user:the slice is damaged", 2, "the slice is damaged", False),
        ("raise:bad luck", 1, "rank 1: RuntimeError: bad luck", None),
        ("kill:9", -9, "rank 1 on HOST was killed by SIGKILL, possibly out of memory", None),
        ("kill:11", -11, "rank 1 on HOST was killed by SIGSEGV", None),
    ],
)
def test_the_end_of_a_rank_is_written_and_is_that_of_what_srun_started(tmp_path, end, status, message, again):
    assert start(tmp_path, end).wait(60) == status
    found = failure.read(tmp_path / "error.json")
    if message is None:
        assert found is None
        return
    assert found is not None
    assert (found.message, found.rank) == (message.replace("HOST", socket.gethostname()), 1)
    assert found.calling_again_helps == again


def test_a_rank_prints_into_its_own_log(tmp_path):
    assert start(tmp_path, "raise:bad luck").wait(60) == 1
    assert (tmp_path / "rank-1.log").read_text().endswith("RuntimeError: bad luck\n")


def test_a_signal_for_what_srun_started_reaches_the_rank_once(tmp_path):
    """Slurm's tracking by control groups signals no other process."""
    process = start(tmp_path, f"wait:{tmp_path / 'seen'}")
    until((tmp_path / "seen").exists, 60)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(60) == 75
    assert (tmp_path / "seen").read_text() == "1 signals"
    assert not (tmp_path / "error.json").exists()


def test_the_rank_does_not_outlive_what_srun_started(tmp_path):
    process = start(tmp_path, f"wait:{tmp_path / 'seen'}")
    until(lambda: (tmp_path / "seen").exists() and (tmp_path / "seen").read_text(), 60)
    rank = int((tmp_path / "seen").read_text())
    assert rank != process.pid
    process.kill()
    process.wait()
    until(lambda: not psutil.pid_exists(rank) or psutil.Process(rank).status() == "zombie", 60)


@pytest.mark.parametrize(
    ("tasks", "is_run", "refused"), [("2", True, True), ("2", False, False), ("1", True, False)]
)
def test_several_tasks_of_srun_without_a_rank_do_not_train_a_run_each(
    monkeypatch, capsys, tasks, is_run, refused
):
    variables = {"SLURM_STEP_NUM_TASKS": tasks, "SLURM_PROCID": "0", "MASTER_PORT": "1", "MASTER_ADDR": "x"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")  # restored at the end
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if refused:
        with pytest.raises(UserError, match="srun has started 2 processes, and RANK is not set"):
            set_single_process_environment(is_run)
        return
    set_single_process_environment(is_run)
    assert os.environ["WORLD_SIZE"] == "1"
    assert ("RANK is not set" in capsys.readouterr().err) is (tasks == "2")

"""The machine is divided among runs: processes, threads, GPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_lrpath.errors import UserError
from megatron_lrpath.launch import resources
from megatron_lrpath.launch.resources import (
    Share,
    default_nproc,
    micro_batch_arguments,
    model_parallel_size,
    share_out,
    whole_numbers,
)
from tests.support.launch_fixtures import write_plan


@pytest.fixture
def plan(tmp_path):
    return write_plan(tmp_path)  # a batch of 8 in micro batches of 4


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Pretend 16 cores, memory for many runs, and no GPU."""
    monkeypatch.setattr(resources, "cores", lambda: 16)
    monkeypatch.setattr(resources, "_memory_places", lambda nproc: 100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_no_more_jobs_than_can_go_side_by_side_and_all_cores_used(plan):
    share = share_out(plan, 4, "auto", None, None)
    assert (share.jobs, share.nproc, share.threads, share.device) == (4, 1, 4, "cpu")
    assert share_out(plan, 1, "auto", None, None).threads == 16


def test_memory_limits_the_jobs(plan, monkeypatch):
    monkeypatch.setattr(resources, "_memory_places", lambda nproc: 2)
    assert share_out(plan, 9, "cpu", None, None).jobs == 2


def test_given_values_are_used(plan):
    share = share_out(plan, 9, "cpu", 2, 3)
    assert (share.jobs, share.nproc, share.threads) == (3, 2, 2)


def test_a_model_parallel_plan_gets_its_processes(plan):
    parallel = replace(plan, megatron={"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2})
    assert default_nproc(parallel, 0) == 4
    assert default_nproc(plan, 0, ["--tensor-model-parallel-size", "2", "--bf16"]) == 2
    assert model_parallel_size({"context-parallel-size": 2, "bf16": True}) == 2


def test_gpus_are_used_as_far_as_the_batch_divides_among_them(plan, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    share = share_out(plan, 9, "auto", None, None)
    assert (share.nproc, share.jobs, share.device) == (2, 1, "cuda")


def test_runs_side_by_side_get_gpus_of_their_own(plan, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    share = share_out(plan, 9, "cuda", 2, None)
    assert [share.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(share.jobs)] == ["4,5", "6,7"]


def test_more_jobs_than_gpus_share_them(monkeypatch):
    share = Share(jobs=3, nproc=1, threads=1, device="cuda", gpus=("0", "1"))
    assert [share.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "1", "0"]


def test_a_missing_gpu_is_reported(plan, monkeypatch):
    with pytest.raises(UserError, match="no NVIDIA GPU is visible"):
        share_out(plan, 1, "cuda", None, None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match="4 processes, but one GPU is visible"):
        share_out(plan, 1, "auto", 4, None)


def test_a_users_smaller_thread_count_is_kept(monkeypatch):
    share = Share(jobs=1, nproc=1, threads=8, device="cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert share.environment(0)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "99")
    assert share.environment(0)["OMP_NUM_THREADS"] == "8"


def test_one_process_alone_may_let_its_threads_spin():
    assert "OMP_WAIT_POLICY" not in Share(1, 1, 8, "cpu").environment(0)
    assert Share(2, 1, 4, "cpu").environment(1)["OMP_WAIT_POLICY"] == "PASSIVE"


def test_numbers_are_found_among_words_in_both_spellings():
    assert whole_numbers(["--a", "2", "--b=3", "--c", "x", "-d", "4", "--e-f", "5"]) == {
        "a": "2",
        "b": "3",
        "e_f": "5",
    }


@pytest.mark.parametrize(
    ("nproc", "extra", "arguments"),
    [(1, (), ()), (2, (), ()), (4, (), ("--micro-batch-size", "2")), (4, ("--micro-batch-size", "1"), ())],
)
def test_the_micro_batch_shrinks_to_what_each_process_gets(plan, nproc, extra, arguments):
    assert micro_batch_arguments(plan, nproc, extra) == arguments


def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused_in_the_users_words(plan):
    with pytest.raises(UserError, match=r"--nproc 3: the batch of 8 samples does not divide by 3 copies"):
        micro_batch_arguments(plan, 3)

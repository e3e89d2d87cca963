"""What the machine has against what a plan takes: GPUs and their memory, processes, disk, a place to write."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_lrpath.launch import resources
from megatron_lrpath.plan import Plan
from megatron_lrpath.readiness import machine
from megatron_lrpath.readiness.machine import disk_check, memory_check, output_check, process_check
from tests.support.plan_text import plan_with

ANSWER = "0, GPU-aaaa-1, 81559\n1, GPU-bbbb-2, 40960\n"


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return plan_with(tmp_path)


def gpus(monkeypatch: pytest.MonkeyPatch, visible: str, answer: str = ANSWER) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(resources.shutil, "which", lambda name: f"/usr/bin/{name}")
    done = subprocess.CompletedProcess([], 0, answer, "")
    monkeypatch.setattr(resources.subprocess, "run", lambda *args, **named: done)


@pytest.mark.parametrize(
    ("visible", "answer", "sizes"),
    [
        ("", ANSWER, ()),
        ("1", ANSWER, (40960,)),
        ("0,1", ANSWER, (81559, 40960)),
        ("GPU-bbbb", ANSWER, (40960,)),
        ("MIG-cccc", ANSWER, (81559, 40960)),
        ("0", "No devices were found\n", ()),
        ("0", "0, GPU-aaaa-1, [N/A]\n", ()),
    ],
)
def test_the_memory_of_the_gpus_that_are_visible(
    monkeypatch: pytest.MonkeyPatch, visible: str, answer: str, sizes: tuple[int, ...]
) -> None:
    gpus(monkeypatch, visible, answer)
    assert resources.gpu_memory() == tuple(size * 2**20 for size in sizes)


@pytest.mark.parametrize(
    ("visible", "device", "nproc", "extra", "said"),
    [
        ("", "auto", None, (), "1 process a run on the CPU"),
        ("", "cpu", 4, (), "4 processes a run on the CPU"),
        ("", "cuda", None, (), "--device cuda: no NVIDIA GPU is visible"),
        ("0,1", "auto", None, (), "2 processes a run on 2 GPUs"),
        ("0,1", "auto", 4, (), "4 processes, but 2 GPUs are visible"),
        ("", "cpu", 3, (), "32 samples cannot be shared out among 3 data-parallel ranks"),
        ("", "cpu", 8, (), "32 samples cannot be shared out among 8 data-parallel ranks"),
        ("", "cpu", 8, ("--micro-batch-size", "4"), "8 processes a run on the CPU"),
        ("", "cpu", 1, ("--tensor-model-parallel-size", "2"), "1 process cannot hold one copy of the model"),
    ],
)
def test_processes_share_out_what_there_is(
    monkeypatch: pytest.MonkeyPatch,
    plan: Plan,
    visible: str,
    device: str,
    nproc: int | None,
    extra: tuple[str, ...],
    said: str,
) -> None:
    gpus(monkeypatch, visible)
    found = process_check(plan, device, nproc, extra)
    assert said in found.found
    assert found.status == ("ok" if " a run on " in said else "failed")


def test_a_model_that_no_gpu_holds_is_doubtful(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> None:
    gpus(monkeypatch, "0,1")
    small = memory_check(plan, 1000)
    assert (small.status, "a GPU alone" in small.found) == ("ok", True)
    large = replace(plan, model=replace(plan.model, recipe="3.1b"))
    found = memory_check(large, 100_000)
    assert (found.status, "it has 42.9 GB" in found.found) == ("warning", True)
    on_cpu = memory_check(plan, 1000, "cpu")
    assert (on_cpu.status, "a process alone" in on_cpu.found) == ("ok", True)


@pytest.mark.parametrize(
    ("free", "waits", "status"),
    [(70e9, False, "ok"), (50e9, False, "failed"), (50e9, True, "warning"), (5e9, True, "warning")],
)
def test_free_disk_against_what_the_checkpoints_take(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: float, waits: bool, status: str
) -> None:
    usage: Any = SimpleNamespace(free=free)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: usage)
    assert disk_check(tmp_path / "not/there/yet", 60e9, waits).status == status


def test_the_output_can_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert output_check(tmp_path / "not/there/yet").status == "ok"
    assert output_check(tmp_path / "file").status == "failed"
    assert output_check(tmp_path / "file/below").status == "failed"

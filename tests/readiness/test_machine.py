"""Resources of the machine against needs of a plan: GPUs and their memory, processes, disk, output."""

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
from megatron_lrpath.readiness.machine import (
    disk_check,
    host_check,
    memory_checks,
    output_check,
    process_check,
)
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
def test_processes_share_the_visible_devices(
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


@pytest.mark.parametrize(
    ("recipe", "megatron", "gpu", "nproc", "said"),
    [
        (None, {}, 81559, 1, ("ok", "each of 1 GPU will hold about 2.")),
        ("3.1b", {"bf16": True}, 24000, 2, ("failed", "each of 2 GPUs will hold about")),
        ("1.2b", {"bf16": True}, 16000, 2, ("warning", "it has 16.8 GB")),
        ("1.2b", {"bf16": True}, 81559, 2, ("ok", "each of 2 GPUs")),
    ],
)
def test_predicted_memory_against_the_gpu_that_is_there(
    monkeypatch: pytest.MonkeyPatch,
    plan: Plan,
    recipe: str | None,
    megatron: dict[str, Any],
    gpu: int,
    nproc: int,
    said: tuple[str, str],
) -> None:
    gpus(monkeypatch, "0,1", f"0, GPU-a, {gpu}\n1, GPU-b, {gpu}\n")
    if recipe:
        plan = replace(plan, model=replace(plan.model, recipe=recipe), megatron=megatron)
    monkeypatch.setattr(machine, "machine_memory", lambda: 500 * 10**9)
    found, host = memory_checks(plan, 1000, "auto", nproc)
    assert (found.status, said[1] in found.line) == (said[0], True), found.line
    assert host.status == "ok"
    (on_cpu,) = memory_checks(plan, 1000, "cpu")
    assert "a process alone would hold" in on_cpu.found


def test_a_save_that_the_host_cannot_hold_is_refused() -> None:
    assert host_check(10e9, 20e9).status == "ok"
    refused = host_check(30e9, 20e9)
    assert (refused.status, "take about 30.0 GB" in refused.line) == ("failed", True)


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

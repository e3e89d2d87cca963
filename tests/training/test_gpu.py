"""On a GPU: the rates and losses of the CPU, a training that is stopped and goes on bit for bit, a whole plan."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_lrpath.launch.resources import visible_gpus
from megatron_lrpath.plan import load_plan
from tests.support import ROOT
from tests.support.states import states
from tests.support.training_fixtures import history, make_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not visible_gpus(), reason="no GPU is visible"),
]
BF16 = {"bf16": True, "use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True}


def call(*words: object) -> str:
    """Run a Python command from the repository's root; its output."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    answer = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert answer.returncode == 0, (answer.stdout + answer.stderr)[-6000:]
    return answer.stdout + answer.stderr


def train(plan: Path, run: str, *extra: object, device: str = "cuda") -> list[dict[str, Any]]:
    """Train a run of ours as `pretrain_gpt.py` does; the lines of its history."""
    call("pretrain_gpt.py", "--plan", plan, "--paradigm", "ours", "--run", run, "--device", device, *extra)
    return history(plan.parent / "runs/ours" / run)


def test_the_rates_are_the_plans_and_the_losses_the_cpus(tmp_path: Path) -> None:
    losses = {}
    for device in ("cpu", "cuda"):
        plan = make_plan(tmp_path / device, (8, 8), megatron={"use_cpu_initialization": True})
        for run in ("main", "branch-v2"):
            lines = train(plan, run, device=device)
            steps = load_plan(plan).run("ours", run)
            assert [line["lr"] for line in lines] == pytest.approx(
                [steps.path.lr_at(line["step"] - 1) for line in lines], rel=1e-9
            )
            losses[device, run] = [line["loss"] for line in lines]
    for run in ("main", "branch-v2"):
        assert losses["cuda", run] == pytest.approx(losses["cpu", run], rel=2e-4), run


def test_a_stopped_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    folders = []
    for name, stops in (("whole", [None]), ("stopped", [5, None])):
        plan = make_plan(tmp_path / name, (8, 8), megatron=BF16)
        for stop in stops:
            train(plan, "main", *(["--exit-interval", stop] if stop else []))
        folders.append(plan.parent / "runs/ours/main/checkpoints/iter_0000012")
    whole, stopped = states(*folders)
    assert whole == stopped


@pytest.mark.parametrize("options", [{}, {"async_save": True}], ids=["synchronous", "asynchronous"])
def test_a_whole_plan_is_trained_evaluated_and_reported(tmp_path: Path, options: dict[str, Any]) -> None:
    plan = make_plan(tmp_path, (6, 6), megatron=BF16 | options)
    call("-m", "megatron_lrpath.cli", "run", plan, "--device", "cuda", "--jobs", "2")
    evaluated = sorted((tmp_path / "runs").rglob("eval.json"))
    assert len(evaluated) >= 6  # two versions under three paradigms
    assert "perplexity" in evaluated[0].read_text()
    call("-m", "megatron_lrpath.cli", "report", plan)
    assert list((tmp_path / "runs/report").glob("*.html"))


def test_the_doctor_names_the_gpu() -> None:
    name = call("-c", "import torch; print(torch.cuda.get_device_name())").splitlines()[-1]
    assert f"{name}" in call("-m", "megatron_lrpath.cli", "doctor")

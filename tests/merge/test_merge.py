"""Merged checkpoints: the weights of a decay, exact sums, no partial output, and a real evaluation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_lrpath.cli import main
from megatron_lrpath.errors import UserError
from megatron_lrpath.export.checkpoint import CheckpointReader
from megatron_lrpath.merge.preview import decay_shares, merge_weights
from megatron_lrpath.merge.torch_dist import merge_checkpoints
from megatron_lrpath.plan import load_plan
from megatron_lrpath.runs.checkpoints import checkpoint_folder, latest_step
from megatron_lrpath.schedule import LRPath, Schedule
from tests.support.training_fixtures import launch, make_plan, run_words, train
from tools import merge_checkpoints as merge_tool

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def write_checkpoint(root: Path, step: int, width: int = 3, **others: object) -> dict[str, torch.Tensor]:
    """Write a checkpoint with two tensors, an optimizer state and another entry; return the tensors."""
    torch.manual_seed(step)
    tensors = {"weight": torch.randn(4, width, dtype=torch.float64), "half": torch.randn(5).bfloat16()}
    folder = checkpoint_folder(root, step)
    state = {**tensors, "optimizer.state.exp_avg.weight": torch.ones(4), "step_of": f"step {step}", **others}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    return tensors


def test_the_weights_are_those_of_the_paper() -> None:
    assert merge_weights([0.9, 0.5, 0.2]) == pytest.approx([0.1, 0.4, 0.3, 0.2])
    with pytest.raises(ValueError, match="must fall"):
        merge_weights([0.5, 0.6])


def test_a_linear_decay_to_zero_over_many_checkpoints_is_their_mean() -> None:
    schedule = Schedule("linear", max_lr=1.0, min_lr=0.0)
    steps = list(range(0, 1001, 100))
    weights = merge_weights(decay_shares(LRPath(schedule, "branch", 0, 1000), steps))
    assert sum(weights) == pytest.approx(1)
    assert weights[1:-1] == pytest.approx([0.1] * 9)
    assert weights[0] + weights[-1] == pytest.approx(0.1)


def test_no_decay_leaves_the_last_checkpoint() -> None:
    path = LRPath(Schedule("constant", 1.0, 1.0), "branch", 0, 100, cycle=math.inf)
    assert merge_weights(decay_shares(path, [0, 50, 100])) == [0, 0, 1]


def test_the_merge_of_updates_is_the_merge_of_checkpoints() -> None:
    shares, points = [0.8, 0.3], [5.0, 7.0, 11.0]
    weights = merge_weights(shares)
    updates = points[0] + shares[0] * (points[1] - points[0]) + shares[1] * (points[2] - points[1])
    assert sum(weight * point for weight, point in zip(weights, points, strict=True)) == pytest.approx(
        updates
    )


def test_every_tensor_is_the_exact_weighted_sum(tmp_path: Path) -> None:
    made = [write_checkpoint(tmp_path, step) for step in (10, 20, 30)]
    weights = [0.2, 0.3, 0.5]
    folder = merge_checkpoints(tmp_path, [10, 20, 30], weights, tmp_path / "merged", 30)
    reader = CheckpointReader(folder)
    keys = set(reader.entries)
    assert keys == {"weight", "half", "step_of"}  # no optimizer state
    want = sum(weight * one["weight"] for weight, one in zip(weights, made, strict=True))
    assert torch.allclose(reader.tensor("weight"), want, rtol=1e-15, atol=1e-15)
    half = sum(weight * one["half"].float() for weight, one in zip(weights, made, strict=True))
    assert torch.equal(reader.tensor("half"), half.bfloat16())
    assert reader.raw("step_of") == CheckpointReader(checkpoint_folder(tmp_path, 30)).raw("step_of")
    assert latest_step(tmp_path / "merged") == 30


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10)
    write_checkpoint(tmp_path, 20, width=7)
    with pytest.raises(UserError, match="no complete checkpoint of step 30; there are 10, 20"):
        merge_checkpoints(tmp_path, [10, 30], [0.5, 0.5], tmp_path / "merged", 30)
    with pytest.raises(UserError, match="of another model"):
        merge_checkpoints(tmp_path, [10, 20], [0.5, 0.5], tmp_path / "merged", 20)
    assert not (tmp_path / "merged").exists()
    merge_checkpoints(tmp_path, [10, 10], [0.5, 0.5], tmp_path / "merged", 10)
    with pytest.raises(UserError, match="a checkpoint exists already"):
        merge_checkpoints(tmp_path, [10, 10], [0.5, 0.5], tmp_path / "merged", 10)


@pytest.mark.parametrize("steps", [("20", "10"), ("10", "10")])
def test_steps_of_the_tool_ascend(
    steps: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (10, 20):
        write_checkpoint(tmp_path, step)
    words = ["--checkpoints", str(tmp_path), "--output", str(tmp_path / "merged"), "--steps", *steps]
    assert merge_tool.main(words) == 2
    assert "do not ascend, each once" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_a_failure_on_the_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, 10)

    def broken(self: CheckpointReader, key: str) -> torch.Tensor:
        raise OSError("the disk is gone")

    monkeypatch.setattr(CheckpointReader, "tensor", broken)
    with pytest.raises(UserError, match="the disk is gone"):
        merge_checkpoints(tmp_path, [10, 10], [0.5, 0.5], tmp_path / "merged", 10)
    assert list((tmp_path / "merged").iterdir()) == []


@pytest.mark.slow
def test_a_branch_is_previewed_and_evaluated_without_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_plan(tmp_path, versions=(8, 4), megatron={"save_interval": 2})
    train(run_words(path, "ours", "main")).ok()
    assert main(["merge", str(path), "--version", "v2"]) == 2  # the main path has not reached the end of v2
    assert "needs the main path's checkpoint of step 12" in capsys.readouterr().err
    assert main(["merge", str(path), "--version", "v1", "--decay", "linear", "--min-lr-share", "0"]) == 0
    merged = load_plan(tmp_path / "runs/merged/v1-linear-from4-to0/plan.yaml")
    launch(
        "megatron_lrpath.evaluate.worker:main",
        ["--plan", str(merged.path), "--runs", "ours/branch-v1", "--device", "cpu"],
    ).ok()
    run = merged.run("ours", "branch-v1")
    evaluation = json.loads((merged.folder(run) / "eval.json").read_text())
    assert evaluation["step"] == 8
    assert 1 < evaluation["perplexity"] < 1000
    weights = json.loads((merged.folder(run) / "merged.json").read_text())["weights"]
    assert list(weights) == ["4", "6", "8"]
    assert sum(weights.values()) == pytest.approx(1)

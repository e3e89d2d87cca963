"""Estimated time of the rest of a plan: by formula before a measurement, then at the measured pace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lrpath.cli import main
from megatron_lrpath.launch.estimate import estimate
from megatron_lrpath.plan import Plan, load_plan
from megatron_lrpath.sealed import json_digest
from tests.support.report_tree import write_plan, write_run, write_slices

RECIPE = "1.2b"


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Return a plan of two versions of 60 steps, alpha 0.6, on a small model."""
    return write_plan(tmp_path, versions=2)


def of_recipe(plan: Plan) -> Plan:
    """Return the same plan with a recipe that has a layout."""
    text = plan.path.read_text().replace("model: tiny", f"model: {RECIPE}")
    plan.path.write_text(
        text.replace("global_batch_size: 32", "global_batch_size: 512").replace(
            "seq_length: 256", "seq_length: 2048"
        )
    )
    return load_plan(plan.path)


def train(plan: Plan, name: str, seconds: float, processes: int, mfu: float | None = None) -> None:
    """Write a complete run at that pace."""
    run = plan.run("ptfs" if name.startswith("scratch") else "ours", name)
    rows = [
        {"step": step, "loss": 3.0, "seconds": seconds, **({"mfu": mfu} if mfu else {})}
        for step in range(run.first_step + 1, run.last_step + 1)
    ]
    write_run(plan, run, rows)
    lineage = Path(plan.folder(run)) / "lineage.json"
    content = json.loads(lineage.read_text())
    content["starts"][-1]["world_size"] = processes
    content["identity_hash"] = json_digest(content["identity"])
    lineage.write_text(json.dumps(content))


def shown(plan: Plan, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["plan", str(plan.path), "--paradigm", "ours", "--no-curves"]) == 0
    return capsys.readouterr().out


def test_a_plan_prints_the_prediction_for_its_layout(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    said = shown(of_recipe(plan), capsys)
    assert "To train (ours): 156 steps left to train, 164M tokens" in said
    assert "GPU hours" in said
    assert "s a step, on 32 H100 at 40% of their peak; nothing is measured yet" in said


def test_a_small_model_is_not_promised_a_share_of_the_peak(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    said = shown(plan, capsys)
    assert "known once a run has logged its first steps" in said
    assert "GPU hours" not in said


@pytest.mark.parametrize(("mfu", "unit"), [(None, "process"), (0.4, "GPU")])
def test_a_measured_pace_is_taken(
    plan: Plan, mfu: float | None, unit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train(plan, "scratch-v1", 100.0, 2, mfu)
    said = shown(plan, capsys)
    assert "To train (ours): 156 steps left to train" in said
    assert f"8.7 {unit} hours, 3 h 20 min" in said  # the longest chain is 120 steps
    assert f"at 100 s a step, as ptfs/scratch-v1 was trained on 2 {unit}" in said
    assert main(["plan", str(plan.path), "--paradigm", "ours", "--json"]) == 0
    left = json.loads(capsys.readouterr().out)["left_to_train"]
    assert (left["paradigms"], left["steps"], left["wall_seconds"]) == (["ours"], 156, 12000.0)
    assert (round(left["hours"], 2), left["unit"]) == (8.67, f"{unit} hours")
    assert left["pace"]["measured"]


def test_a_branch_waits_for_its_part_of_the_main_path_alone(plan: Plan) -> None:
    left = estimate(plan, ("ours",))
    assert (left.steps, left.chain) == (84 + 2 * 36, 120 * 8192)


def test_nothing_left_to_train_is_reported(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    for run in plan.runs("ours"):
        train(plan, run.name, 1.0, 1)
    said = shown(plan, capsys)
    assert "To train (ours): nothing is left to train" in said
    assert said.endswith(f"next: lrpath eval {plan.path} --paradigm ours\n")


def test_the_report_shows_what_was_spent_and_what_is_left(plan: Plan) -> None:
    write_slices(plan)
    train(plan, "main", 100.0, 2)
    train(plan, "branch-v1", 100.0, 2)
    assert main(["report", str(plan.path), "--paradigm", "ours"]) == 0
    text = (Path(plan.output) / "report/report.md").read_text()
    assert "6.7 process hours" in text
    assert "36 steps left to train" in text
    assert "2.0 process hours, 1 h 00 min" in text
    train(plan, "branch-v2", 100.0, 2)
    assert main(["report", str(plan.path), "--paradigm", "ours"]) == 0
    assert "Left to train" not in (Path(plan.output) / "report/report.md").read_text()


def test_a_submission_prints_it_at_the_measured_pace(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    train(plan, "scratch-v1", 100.0, 2, 0.4)
    argv = [
        "submit",
        str(plan.path),
        "--paradigm",
        "ours",
        "--nodes",
        "1",
        "--gpus-per-node",
        "8",
        "--dry-run",
    ]
    main(argv)
    said = capsys.readouterr().out
    assert "made-up: 156 steps left to train, 1.28M tokens" in said
    assert "8.7 GPU hours (3 h 20 min when no job waits)" in said
    assert "at 100 s a step, as ptfs/scratch-v1 was trained on 2 GPUs" in said
    assert "H100" not in said
    main([*argv, "--json"])
    (cost,) = json.loads(capsys.readouterr().out)["cost"]
    assert (cost["wall_seconds"], cost["pace"]["unit"]) == ({"measured": 12000.0}, "GPU")

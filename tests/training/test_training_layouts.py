"""Training at every parallel layout: losses of one process, and resumed runs equal uninterrupted ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_lrpath.runs.checkpoints import complete_steps
from tests.support.states import states
from tests.support.training_fixtures import MODEL, Outcome, history, make_plan, run_words, train

pytestmark = pytest.mark.slow

TP2 = ("--tensor-model-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2")
LAYOUTS = {
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "tp2-pp2": (4, (*TP2, *PP2)),
    "dp2": (2, ()),
    "tp2-sp": (2, (*TP2, "--sequence-parallel")),
}
EVALUATION = ("--eval-iters", "1", "--eval-interval", "3")
STOP = 3  # the first branch point, of the 9 steps of the main path of two versions


def plan_in(folder: Path, **changes: Any) -> Path:
    """Write a plan of two versions; return its path."""
    return make_plan(folder, (6, 6), **changes)


def steps(folder: Path) -> list[tuple[float, float]]:
    """Return (loss, gradient norm) of every step of the main path below a plan's folder."""
    lines = history(folder / "runs/ours/main")
    assert [line["step"] for line in lines] == list(range(1, 10))
    return [(line["loss"], line["grad_norm"]) for line in lines]


def validation_losses(output: str) -> list[float]:
    """Return the validation losses in Megatron's log."""
    lines = [line for line in output.splitlines() if "validation loss at iteration" in line]
    return [float(line.split("lm loss value: ")[1].split(" ")[0]) for line in lines]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a plan's folder with the main path trained and evaluated by one process; its log in `log`."""
    folder = tmp_path_factory.mktemp("single")
    outcome = train(run_words(plan_in(folder), "ours", "main", *EVALUATION)).ok()
    (folder / "log").write_text(outcome.output)
    return folder


def assert_same(ours: list[tuple[float, float]], alone: list[tuple[float, float]]) -> None:
    """Assert that losses and gradient norms agree to rounding, which accumulates from step to step."""
    assert len(ours) == len(alone)
    for (loss, norm), (loss_alone, norm_alone) in zip(ours, alone, strict=True):
        assert loss == pytest.approx(loss_alone, rel=1e-5)
        assert norm == pytest.approx(norm_alone, rel=1e-3)


def rewind(folder: Path) -> None:
    """Reset the main path below a plan's folder to its first branch point, as if killed later."""
    checkpoints = folder / "runs/ours/main/checkpoints"
    for step in complete_steps(checkpoints):
        if step > STOP:
            shutil.rmtree(checkpoints / f"iter_{step:07}")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(STOP))


def resume(folder: Path, argv: list[str], nproc: int) -> Outcome:
    """Resume training from the first branch point; return the outcome."""
    rewind(folder)
    outcome = train(argv, nproc).ok()
    lineage = json.loads((folder / "runs/ours/main/lineage.json").read_text())
    assert lineage["starts"][-1]["step"] == STOP
    assert [start.get("first_weights") for start in lineage["starts"]] == [{"device": "cpu"}, None]
    return outcome


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_evaluates_saves_and_resumes_exactly(
    tmp_path: Path, single: Path, layout: str
) -> None:
    nproc, flags = LAYOUTS[layout]
    argv = run_words(plan_in(tmp_path), "ours", "main", *flags, *EVALUATION)
    outcome = train(argv, nproc).ok()
    evaluated = validation_losses(outcome.output)
    assert len(evaluated) == len(validation_losses((single / "log").read_text()))
    assert_same(steps(tmp_path), steps(single))
    assert evaluated == pytest.approx(validation_losses((single / "log").read_text()), rel=1e-5)
    uninterrupted = steps(tmp_path)
    resume(tmp_path, argv, nproc)
    assert steps(tmp_path) == uninterrupted


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_resumes_from_one_processs_checkpoint_as_that_process_does(
    tmp_path: Path, single: Path, layout: str
) -> None:
    nproc, flags = LAYOUTS[layout]
    plan = plan_in(tmp_path)
    shutil.copytree(single / "runs", tmp_path / "runs")
    outcome = resume(tmp_path, run_words(plan, "ours", "main", *flags, *EVALUATION), nproc)
    assert_same(steps(tmp_path), steps(single))
    alone = validation_losses((single / "log").read_text())
    evaluated = validation_losses(outcome.output)
    assert evaluated == pytest.approx(alone[-len(evaluated) :], rel=1e-5)


@pytest.mark.parametrize(("before", "after"), [("tp2-pp2", "dp2"), ("dp2", "tp2-sp")])
def test_a_run_resumes_at_another_layout(tmp_path: Path, before: str, after: str) -> None:
    """Killed and started at another layout, the run has the losses of the run that kept its layout."""
    argv = run_words(plan_in(tmp_path), "ours", "main")
    nproc, flags = LAYOUTS[before]
    train([*argv, *flags], nproc).ok()
    stayed = steps(tmp_path)
    nproc, flags = LAYOUTS[after]
    resume(tmp_path, [*argv, *flags], nproc)
    assert steps(tmp_path)[:STOP] == stayed[:STOP]
    assert_same(steps(tmp_path), stayed)


@pytest.mark.parametrize("layout", ["single", "tp2", "dp2"])
def test_bfloat16_trains_and_resumes_exactly(tmp_path: Path, single: Path, layout: str) -> None:
    nproc, flags = LAYOUTS.get(layout, (1, ()))
    argv = run_words(plan_in(tmp_path, megatron={"bf16": True}), "ours", "main", *flags)
    train(argv, nproc).ok()
    losses = [loss for loss, _ in steps(tmp_path)]
    alone = [loss for loss, _ in steps(single)]
    assert losses == pytest.approx(alone, rel=5e-3)
    assert losses != alone
    uninterrupted = steps(tmp_path)
    resume(tmp_path, argv, nproc)
    assert steps(tmp_path) == uninterrupted


VIRTUAL = ("--num-layers-per-virtual-pipeline-stage", "1")
UNEVEN = ("--decoder-first-pipeline-num-layers", "1")


@pytest.mark.parametrize("layout", [(), VIRTUAL, UNEVEN], ids=["even", "virtual", "uneven"])
def test_first_weights_with_shared_embeddings_are_those_of_one_stage(
    tmp_path: Path, layout: tuple[str, ...]
) -> None:
    """The first stage shares its embeddings with the last, which draws its weights last."""
    model = {**MODEL, "num_layers": 4, "untie_embeddings_and_output_weights": False}
    losses = []
    for name, nproc, flags in (("single", 1, ()), ("stages", 2, (*PP2, *layout))):
        plan = plan_in(tmp_path / name, model=model)
        train(run_words(plan, "ours", "main", *flags, "--exit-interval", "2"), nproc).ok()
        lines = history(tmp_path / name / "runs/ours/main")
        losses.append([(line["loss"], line["grad_norm"]) for line in lines])
    assert_same(*losses)


@pytest.mark.parametrize("layout", [("--expert-model-parallel-size", "2"), PP2], ids=["experts", "stages"])
def test_first_weights_of_experts_are_those_of_one_process(tmp_path: Path, layout: tuple[str, ...]) -> None:
    model = {**MODEL, "num_experts": 4, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.01}
    losses = []
    for name, nproc, flags in (("single", 1, ()), ("spread", 2, layout)):
        plan = plan_in(tmp_path / name, model=model)
        train(run_words(plan, "ours", "main", *flags, "--exit-interval", "2"), nproc).ok()
        losses.append([line["loss"] for line in history(tmp_path / name / "runs/ours/main")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_experts_are_in_the_layers_that_the_frequency_names(tmp_path: Path) -> None:
    model = {**MODEL, "num_layers": 4, "num_experts": 2, "moe_layer_freq": "[0,1,1,0]"}
    losses = []
    for name, nproc, flags in (("single", 1, ()), ("stages", 2, PP2)):
        plan = plan_in(tmp_path / name, model=model)
        train(run_words(plan, "ours", "main", *flags, "--exit-interval", "2"), nproc).ok()
        (checkpoint,) = (tmp_path / name / "runs/ours/main/checkpoints").glob("iter_*")
        routers = {key.split("layers.")[1].split(".")[0] for key in states(checkpoint)[0] if "router" in key}
        assert routers == {"1", "2"}
        losses.append([line["loss"] for line in history(tmp_path / name / "runs/ours/main")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)

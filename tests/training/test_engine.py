"""Transformer Engine's layers, by a stand-in on the CPU, train like local layers and on their checkpoints.

docs/gpus.md lists what the stand-in cannot test.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_lrpath.cli import main as lrpath
from megatron_lrpath.plan import load_plan
from tests.support.engine_fixtures import Engine, engine_process
from tests.support.training_fixtures import Outcome, history, launch, make_plan, run_words

pytestmark = pytest.mark.slow

EVALUATION = "megatron_lrpath.evaluate.worker:main"
WAYS = ("local", "engine", "engine_bytes")
LAYERS = {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention", "RMSNorm"}
CLOSE = 1e-5  # tolerance of losses: other kernels, fp32


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Yield the process whose trainings find the stand-in."""
    with engine_process(tmp_path_factory.mktemp("trap")) as process:
        yield process


Trained = dict[str, Path]
Start = Callable[..., Outcome]


@pytest.fixture(scope="module")
def start(engine: Engine) -> Start:
    """Return a function that starts an entry point `by` one of `WAYS`."""

    def entry(
        by: str, argv: list[str], module: str = "megatron_lrpath.training.pretrain:main", nproc: int = 1
    ) -> Outcome:
        return launch(module, argv, nproc) if by == "local" else engine.launch(argv, module, nproc, probe=by)

    return entry


@pytest.fixture(scope="module")
def trained(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return the plan of each way, with its main path and first branch trained."""
    plans = {}
    for by in WAYS:
        plans[by] = make_plan(tmp_path_factory.mktemp(by), (6, 6))
        for run in ("main", "branch-v1"):
            outcome = start(by, run_words(plans[by], "ours", run)).ok()
            assert layers(outcome) == (set() if by == "local" else LAYERS)
    return plans


@pytest.fixture
def copy(trained: Trained, tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that copies the plan with the runs of one of `WAYS`, which a test may change."""

    def made(by: str, *kept: str) -> Path:
        plan = yaml.safe_load(trained[by].read_text())
        for run in kept or ("main", "branch-v1"):
            shutil.copytree(trained[by].parent / "runs/ours" / run, tmp_path / "runs/ours" / run)
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan | {"output": str(tmp_path / "runs")}))
        return tmp_path / "plan.yaml"

    return made


def layers(outcome: Outcome) -> set[str]:
    """Return the kinds of the stand-in's modules that were made."""
    return set(outcome.probed[0] or ())


def losses(plan: Path, run: str) -> list[float]:
    return [line["loss"] for line in history(plan.parent / "runs/ours" / run)]


def test_losses_are_those_of_the_local_layers(trained: Trained) -> None:
    for run in ("main", "branch-v1"):
        wanted = losses(trained["local"], run)
        assert len(wanted) >= 3
        for by in WAYS[1:]:
            assert losses(trained[by], run) == pytest.approx(wanted, rel=CLOSE)


CROSSINGS = [(a, b) for a in WAYS for b in WAYS if a != b]


@pytest.mark.parametrize(("first", "then"), CROSSINGS, ids=[f"{a}-{b}" for a, b in CROSSINGS])
def test_a_branch_starts_from_the_others_main_path(
    first: str, then: str, copy: Callable[..., Path], trained: Trained, start: Start
) -> None:
    plan = copy(first, "main")
    start(then, run_words(plan, "ours", "branch-v1")).ok()
    assert losses(plan, "branch-v1") == pytest.approx(losses(trained[first], "branch-v1"), rel=CLOSE)


def test_two_tensor_parallel_ranks_train_as_one_rank_of_local_layers(
    tmp_path: Path, copy: Callable[..., Path], trained: Trained, start: Start
) -> None:
    """This holds from the first step, and for a branch off the local layers' checkpoint at another layout."""
    layout = ("--tensor-model-parallel-size", "2")
    plans = {"main": make_plan(tmp_path / "two", (6, 6)), "branch-v1": copy("local", "main")}
    for run, plan in plans.items():
        outcome = start("engine", run_words(plan, "ours", run, *layout), nproc=2).ok()
        assert [set(seen) for seen in outcome.probed] == [LAYERS, LAYERS]
        assert losses(plan, run) == pytest.approx(losses(trained["local"], run), rel=CLOSE)


@pytest.mark.parametrize(("first", "then"), [("local", "engine"), ("engine", "local")])
def test_a_run_resumes_from_the_others_checkpoint_and_both_are_merged(
    first: str, then: str, tmp_path: Path, trained: Trained, start: Start
) -> None:
    plan = make_plan(tmp_path, (6, 6), megatron={"save_interval": 1})
    argv = run_words(plan, "ours", "main")
    start(first, [*argv, "--exit-interval", "4"])
    assert len(losses(plan, "main")) == 4
    start(then, argv).ok()
    assert losses(plan, "main") == pytest.approx(losses(trained["local"], "main"), rel=CLOSE)
    assert lrpath(["merge", str(plan), "--version", "v1", "--decay", "linear", "--min-lr-share", "0"]) == 0
    merged = load_plan(next((tmp_path / "runs/merged").iterdir()) / "plan.yaml")
    branch = merged.folder(merged.run("ours", "branch-v1"))
    assert list(json.loads((branch / "merged.json").read_text())["weights"]) == ["3", "4", "5", "6"]
    start(first, ["--plan", str(merged.path), "--device", "cpu", "--runs", "ours/branch-v1"], EVALUATION).ok()
    assert 1 < json.loads((branch / "eval.json").read_text())["perplexity"] < 1000


@pytest.mark.parametrize(("first", "then"), [("local", "engine"), ("engine", "local")])
def test_the_others_version_is_evaluated_alike(
    first: str, then: str, copy: Callable[..., Path], start: Start
) -> None:
    plan = copy(first)
    argv = ["--plan", str(plan), "--device", "cpu", "--runs", "ours/branch-v1"]
    found = []
    for by in (first, then):
        assert layers(start(by, argv, EVALUATION).ok()) == (set() if by == "local" else LAYERS)
        result = plan.parent / "runs/ours/branch-v1/eval.json"
        found.append(json.loads(result.read_text())["perplexity"])
        result.unlink()
    assert found[1] == pytest.approx(found[0], rel=CLOSE)


def test_exports_are_the_same_for_all_layer_implementations(
    copy: Callable[..., Path], tmp_path: Path
) -> None:
    weights = []
    for by in WAYS:
        folder = tmp_path / f"export-{by}"
        assert lrpath(["export", str(copy(by)), "--run", "branch-v1", "--output", str(folder)]) == 0
        weights.append(load_file(folder / "model.safetensors"))
        shutil.rmtree(tmp_path / "runs")
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        assert all(torch.allclose(other[name], weights[0][name], atol=1e-4) for name in other)


def test_an_extra_state_with_a_command_is_refused_and_not_run(
    engine: Engine, start: Start, tmp_path: Path
) -> None:
    trap, plan = engine.trap, make_plan(tmp_path, (6, 6))
    start("engine_poisoned", run_words(plan, "ours", "main")).ok()
    assert not trap.exists()
    refused = start("engine", run_words(plan, "ours", "branch-v1"))
    assert refused.status == [2]
    assert "final_layernorm._extra_state" in refused.output
    assert "holds more than data" in refused.output
    start("local", run_words(plan, "ours", "branch-v1")).ok()  # its last norm has and needs no state
    assert not trap.exists()

"""Optimizers and precisions: main path, branch and resume with the rates and the state of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_lrpath.plan import load_plan
from megatron_lrpath.plan import optimizers as packages
from megatron_lrpath.plan.optimizers import PACKAGE, is_installed
from megatron_lrpath.readiness.machine import optimizer_checks
from megatron_lrpath.runs.checkpoints import complete_steps
from megatron_lrpath.schedule import LRPath, Schedule
from tests.support.training_fixtures import make_plan, run_words, train
from tests.training.test_training_rates import OPTIMIZER, words_without_plan

RATES = ["--lr", "0.01", "--min-lr", "0.001"]
needs_package = pytest.mark.skipif(not is_installed(), reason=f"needs {PACKAGE}")


@pytest.fixture(scope="module")
def argv(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return model, data and batch arguments, without those that distribute the optimizer."""
    folder = tmp_path_factory.mktemp("optimizers")
    make_plan(folder, (12,))
    argv = words_without_plan(folder / "plan.yaml", folder)
    return [word for word in argv if word not in OPTIMIZER] + RATES


def main(folder: Path, *others: str) -> list[str]:
    """Return the command line of a main path of 6 steps that keeps step 3."""
    return [
        "--lr-path",
        "main",
        "--train-iters",
        "6",
        "--lr-path-keep-steps",
        "3",
        "--save",
        str(folder / "main"),
        *others,
    ]


def branch(folder: Path, *others: str, parent: int = 3) -> list[str]:
    """Return the command line of a branch of 4 steps."""
    start = [
        "--lr-path-parent",
        str(folder / "main"),
        "--lr-path-parent-step",
        str(parent),
        "--lr-path-decay-iters",
        "4",
    ]
    return ["--lr-path", "branch", *start, "--save", str(folder / "branch"), *others]


def refused(argv: list[str], ranks: int = 1) -> str:
    """Return the only message of a start that is refused."""
    outcome = train(argv, ranks)
    assert outcome.status == [2] * ranks, outcome.output[-3000:]
    assert outcome.output.count("lrpath: error: ") == 1
    assert "Traceback" not in outcome.output
    return outcome.output.partition("lrpath: error: ")[2]


def rates(max_lr: float = 0.01, min_lr: float = 0.001, first: int = 3) -> list[float]:
    """Return the rates of a branch."""
    path = LRPath(
        Schedule(style="cosine", max_lr=max_lr, min_lr=min_lr, warmup=0), "branch", first, first + 4
    )
    return [path.lr_at(step) for step in range(first, first + 4)]


@pytest.mark.parametrize("distributed", [OPTIMIZER, []], ids=["distributed", "not distributed"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_fp16_saves_before_the_first_update_and_resumes(
    argv: list[str], tmp_path: Path, distributed: list[str], ranks: int
) -> None:
    """The loss scale of 2^32 halves at each step; until it fits there is no update."""
    half = [*argv, *distributed, "--fp16", "--hysteresis", "1"]
    length = ["--train-iters", "16", "--lr-path", "main", "--save"]
    whole = train([*half, *length, str(tmp_path / "whole")], ranks, probe="state_at_end").ok()
    own = [*half, *length, str(tmp_path / "own")]
    train([*own, "--exit-interval", "2"], ranks).ok()
    again = train(own, ranks, probe="state_at_end").ok()
    assert complete_steps(tmp_path / "own") == [2, 16]
    assert again.probed == whole.probed
    start = [
        "--lr-path-parent",
        str(tmp_path / "own"),
        "--lr-path-parent-step",
        "2",
        "--lr-path-decay-iters",
        "14",
    ]
    train([*half, "--lr-path", "branch", *start, "--save", str(tmp_path / "branch")], ranks).ok()


DECOUPLED = ["--decoupled-lr", "0.02", "--decoupled-min-lr", "0.002"]
OTHER = ["--decoupled-lr", "0.04", "--decoupled-min-lr", "0.004"]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (DECOUPLED, DECOUPLED, (0.02, 0.002)),
        (DECOUPLED, OTHER, (0.04, 0.004)),
        ([], OTHER, (0.04, 0.004)),
        (DECOUPLED, [], (0.01, 0.001)),
        (DECOUPLED, [*OTHER, "--lr", "0.02"], (0.04, 0.004)),
    ],
    ids=["same", "other", "new", "gone", "both others"],
)
@pytest.mark.parametrize("distributed", [OPTIMIZER, []], ids=["distributed", "not distributed"])
def test_a_branch_has_its_own_rates_of_the_embeddings(
    argv: list[str],
    tmp_path: Path,
    distributed: list[str],
    before: list[str],
    after: list[str],
    expected: tuple[float, float],
) -> None:
    train([*argv, *distributed, *main(tmp_path, *before)]).ok()
    start = [*argv, *distributed, *branch(tmp_path, *after)]
    if not distributed and bool(before) != bool(after):
        assert "--decoupled-lr" in refused(start)
        return
    first = train([*start, "--exit-interval", "5"], probe="rates").ok().probed[0]
    seen = first + train(start, probe="rates").ok().probed[0]
    others = rates(0.02, 0.001) if "--lr" in after else rates()
    assert [set(groups) for groups in seen] == [
        set(pair) for pair in zip(others, rates(*expected), strict=True)
    ]


def test_a_branch_has_its_own_betas(argv: list[str], tmp_path: Path) -> None:
    """Megatron takes the checkpoint's values instead of the command line's."""
    train([*argv, *OPTIMIZER, *main(tmp_path)]).ok()
    start = [*argv, *OPTIMIZER, *branch(tmp_path, "--adam-beta2", "0.9")]
    outcome = train(start, probe="betas").ok()
    assert set(outcome.probed[0]) == {(0.9, 0.9)}


@needs_package
@pytest.mark.parametrize("name", ["muon", "lion", "soap", "dist_muon"])
def test_an_optimizer_of_the_package_resumes_as_if_never_stopped(
    argv: list[str], tmp_path: Path, name: str
) -> None:
    """The main path resumes on two ranks, a branch of other rates on one; SOAP's states have own shapes."""
    chosen = [*argv, "--optimizer", name, *(["--bf16"] if name == "dist_muon" else [])]
    whole = train([*chosen, *main(tmp_path)], 2, probe="state_at_end").ok()
    own = [*chosen, *main(tmp_path / "stopped")]
    train([*own, "--exit-interval", "4"], 2).ok()
    assert train(own, 2, probe="state_at_end").ok().probed == whole.probed
    seen = train([*chosen, *branch(tmp_path, "--lr", "0.02")], probe="rates").ok().probed[0]
    inner = len(seen) // 4  # Megatron chains one optimizer for matrices and one for the rest
    assert [set(groups) for groups in seen] == [{rate} for rate in rates(0.02) for _ in range(inner)]


@needs_package
def test_a_plan_trains_with_an_optimizer_of_the_package(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, (4, 4), megatron={"optimizer": "muon", "bf16": True})
    for run in ("main", "branch-v2"):
        train(run_words(plan, "ours", run)).ok()


@needs_package
@pytest.mark.slow
def test_muon_resumes_at_another_layout(argv: list[str], tmp_path: Path) -> None:
    """The middle stage has no embeddings, which have their own settings (NVIDIA/Megatron-LM#2625)."""
    chosen = [*argv, "--num-layers", "3", "--optimizer", "muon"]
    stages = [*chosen, "--pipeline-model-parallel-size", "3", *main(tmp_path)]
    train([*stages, "--exit-interval", "4"], 3).ok()
    train(stages, 3).ok()
    whole = ["--tensor-model-parallel-size", "2", "--muon-tp-mode", "duplicated"]
    seen = train([*chosen, *whole, *branch(tmp_path)], 2, probe="rates").ok().probed
    assert all(sorted({rate for step in rank for rate in step}, reverse=True) == rates() for rank in seen)


REFUSED = [
    (["--optimizer", "sgd"], ["--optimizer sgd"]),
    (["--optimizer", "adaptive_muon"], ["--optimizer adaptive_muon", "scale_mode", "`optimizers`"]),
    (["--optimizer", "dist_muon"], ["in bf16 alone", "--optimizer muon"]),
    (["--optimizer", "soap", "--use-distributed-optimizer"], ["in bf16 alone", "leave --use-distributed-"]),
    (["--optimizer", "lion", "--fp16"], ["--bf16"]),
    (["--optimizer", "muon", "--tensor-model-parallel-size", "2"], ["--muon-tp-mode duplicated"]),
    (["--optimizer", "soap", "--tensor-model-parallel-size", "2"], ["pipeline parallelism"]),
]


@pytest.mark.parametrize(("flags", "said"), REFUSED, ids=["-".join(flags[1:]) for flags, _ in REFUSED])
def test_a_run_that_cannot_resume_from_its_checkpoints_is_refused_at_the_start(
    argv: list[str], tmp_path: Path, flags: list[str], said: list[str]
) -> None:
    message = refused([*argv, *main(tmp_path, *flags)], ranks=2 if "2" in flags else 1)
    assert all(word in message for word in said)
    assert not (tmp_path / "main").exists()


@pytest.mark.parametrize("with_path", [True, False])
def test_a_missing_package_is_one_line_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, with_path: bool
) -> None:
    monkeypatch.setattr(packages, "PACKAGE", "a-package-that-nobody-has")
    for name, is_there in (("muon", False), ("lion", False), ("adam", True)):
        found = packages.optimizer_problems({"optimizer": name}, with_path)
        assert not found if is_there else "megatron-lrpath[optimizers]" in found[0] and "\n" not in found[0]


@needs_package
def test_doctor_looks_for_the_package_of_a_plans_optimizer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = load_plan(make_plan(tmp_path, (4, 4), megatron={"optimizer": "muon"}))
    assert [one.status for one in optimizer_checks(plan)] == ["ok"]
    monkeypatch.setattr(packages, "PACKAGE", "a-package-that-nobody-has")
    (found,) = optimizer_checks(plan)
    assert found.status == "failed"
    assert "megatron-lrpath[optimizers]" in found.found


@needs_package
@pytest.mark.parametrize(
    ("megatron", "said"),
    [
        ({"optimizer": "dist_muon"}, "in bf16 alone"),
        ({"optimizer": "soap", "bf16": True, "tensor-model-parallel-size": 2}, "pipeline parallelism"),
        ({"optimizer": "muon", "fp16": True}, "not for --fp16"),
    ],
)
def test_doctor_finds_what_an_optimizer_cannot_do(
    tmp_path: Path, megatron: dict[str, Any], said: str
) -> None:
    plan = load_plan(make_plan(tmp_path, (4, 4), megatron=megatron))
    for is_here in (True, False):
        (found,) = optimizer_checks(plan, is_here)
        assert found.status == "failed"
        assert said in found.found

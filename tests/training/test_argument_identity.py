"""A run by --lr-path goes on only as the run that it was started as."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_lrpath.runs.folder import RunFolder
from tests.support.training_fixtures import make_plan, train
from tests.training.test_training_rates import words_without_plan


def scratch(plan: Path, folder: Path, *extra: str) -> list[str]:
    """A run from random weights of 8 steps; later arguments override earlier ones."""
    words = ["--lr-path", "scratch", "--lr", "0.01", "--min-lr", "0.001", "--train-iters", "8"]
    return [*words, "--save", str(folder / "own"), *words_without_plan(plan, folder), *extra]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A plan (for model and data), and the folder with a run by --lr-path that stopped after step 4."""
    folder = tmp_path_factory.mktemp("begun")
    plan = make_plan(folder, (6, 6))
    train(scratch(plan, folder, "--exit-interval", "4")).ok()
    return plan, folder


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["--train-iters", "16"], "end"),
        (["--lr", "0.02"], "max_lr"),
        (["--min-lr", "0.002"], "min_lr"),
        (["--lr-path-style", "linear"], "style"),
        (["--lr-path-cycle-iters", "12"], "cycle"),
        (["--lr-warmup-iters", "2"], "warmup"),
        (["--lr-path", "main"], "kind"),
        (["--weight-decay", "0.2"], "weight decay"),
        (["--global-batch-size", "8"], "global_batch_size"),
        (["--seed", "8"], "seed"),
        (["--split", "2,1,0"], "split"),
        (["--clip-grad", "0.5"], "clip_grad"),
        (["--adam-beta2", "0.9"], "adam_beta2"),
    ],
)
def test_another_run_is_refused_before_it_trains(
    begun: tuple[Path, Path], extra: list[str], named: str
) -> None:
    plan, folder = begun
    before = RunFolder(folder / "own").lineage.read_bytes()
    outcome = train(scratch(plan, folder, *extra))
    assert outcome.status == [2], outcome.output[-3000:]
    assert "was started under other settings" in outcome.output
    assert named in outcome.output
    assert RunFolder(folder / "own").lineage.read_bytes() == before


def test_the_same_run_goes_on_and_neutral_arguments_may_change(
    begun: tuple[Path, Path], tmp_path: Path
) -> None:
    plan, folder = begun
    shutil.copytree(folder / "own", tmp_path / "own")
    words = scratch(
        plan, folder, "--save", str(tmp_path / "own"), "--log-interval", "2", "--clip-grad", "1.0"
    )
    rates = train(words, probe="rates").ok().probed[0]
    assert len(rates) == 4


def test_a_run_without_a_record_is_compared_with_its_checkpoint(
    begun: tuple[Path, Path], tmp_path: Path
) -> None:
    plan, folder = begun
    shutil.copytree(folder / "own", tmp_path / "own")
    RunFolder(tmp_path / "own").lineage.unlink()
    own = ["--save", str(tmp_path / "own")]
    refused = train(scratch(plan, folder, *own, "--train-iters", "16"))
    assert refused.status == [2], refused.output[-3000:]
    outcome = train(scratch(plan, folder, *own)).ok()
    assert "have no record of the run" in outcome.output
    assert RunFolder(tmp_path / "own").lineage.is_file()


def test_a_main_path_may_be_extended(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, (6, 6))
    train(scratch(plan, tmp_path, "--lr-path", "main")).ok()
    rates = (
        train(scratch(plan, tmp_path, "--lr-path", "main", "--train-iters", "12"), probe="rates")
        .ok()
        .probed[0]
    )
    assert [groups[0] for groups in rates] == [0.01] * 4


def test_a_main_path_has_no_ramp_of_the_weight_decay(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, (6, 6))
    ramp = [
        "--weight-decay-incr-style",
        "linear",
        "--start-weight-decay",
        "0.01",
        "--end-weight-decay",
        "0.1",
    ]
    outcome = train(scratch(plan, tmp_path, "--lr-path", "main", *ramp))
    assert outcome.status == [2], outcome.output[-3000:]
    assert "may be extended" in outcome.output

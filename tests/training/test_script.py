"""A team's own pretrain script, built like Megatron-LM's, with the guide's three lines changed.

With MEGATRON_LM=/path/to/Megatron-LM (a checkout of core_v0.19.0) it is Megatron-LM's own pretrain_gpt.py.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from megatron_lrpath.plan import load_plan
from megatron_lrpath.runs.checkpoints import complete_steps
from megatron_lrpath.schedule import LRPath, Schedule
from tests.support import ROOT
from tests.support.team import changed_script, guide_hunks
from tests.support.training_fixtures import Outcome, history, launch, make_plan, run_words, train
from tests.training.test_training_rates import words_without_plan

MEGATRON_LM = os.environ.get("MEGATRON_LM")
SCHEDULE = Schedule(style="cosine", max_lr=0.01, min_lr=0.001, warmup=2)
RATES = ["--lr", "0.01", "--min-lr", "0.001"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the changed script, the modules it imports, data and a plan."""
    folder = tmp_path_factory.mktemp("team")
    stock = Path(MEGATRON_LM) if MEGATRON_LM else ROOT / "tests/support/team"
    for neighbour in ("gpt_builders.py", "model_provider.py") if MEGATRON_LM else ():
        shutil.copy(stock / neighbour, folder)
    (folder / "stock.py").write_text((stock / "pretrain_gpt.py").read_text())
    (folder / "pretrain_gpt.py").write_text(changed_script(stock / "pretrain_gpt.py"))
    make_plan(folder, (6, 6))
    return folder


@pytest.fixture(scope="module")
def argv(folder: Path) -> list[str]:
    """Return the arguments of the team's launch script for model, data, batch and optimizer."""
    return words_without_plan(folder / "plan.yaml", folder)


def run(folder: Path, argv: list[str], nproc: int = 1, probe: str | None = None) -> Outcome:
    """Run the changed script."""
    return launch("tests.support.team:main", [str(folder / "pretrain_gpt.py"), *argv], nproc, probe)


@pytest.fixture(scope="module")
def main(folder: Path, argv: list[str]) -> Outcome:
    """Return the outcome of a main path by arguments only."""
    path = ["--lr-path", "main", "--lr-warmup-iters", "2", "--train-iters", "8", "--lr-path-keep-steps", "4"]
    return run(folder, [*argv, *RATES, *path, "--save", str(folder / "main")], probe="rates").ok()


def used(outcome: Outcome) -> list[float]:
    """Return the rates in the optimizer."""
    return [groups[0] for groups in outcome.ok().probed[0]]


def expected(path: LRPath) -> list[float]:
    return [path.lr_at(step) for step in range(path.start, path.end)]


def test_three_lines_change() -> None:
    changed = [
        set(old.split("\n")) ^ set(new.split("\n")) for old, new in guide_hunks()
    ]  # an added line, a removed one, an old and a new form of one
    assert [len(lines) for lines in changed] == [1, 1, 2]


def test_a_main_path_and_a_branch_by_arguments(folder: Path, argv: list[str], main: Outcome) -> None:
    assert used(main) == expected(LRPath(SCHEDULE, "plateau", 0, 8, warmup=2))
    assert complete_steps(folder / "main") == [4, 8]
    before = sorted((path, path.stat().st_mtime_ns) for path in (folder / "main").rglob("*"))
    branch = ["--lr-path", "branch", "--lr-path-parent", str(folder / "main"), "--lr-path-parent-step", "4"]
    outcome = run(
        folder,
        [*argv, *RATES, *branch, "--lr-path-decay-iters", "4", "--save", str(folder / "branch")],
        probe="rates",
    )
    assert used(outcome) == expected(LRPath(SCHEDULE, "branch", 4, 8))
    assert complete_steps(folder / "branch") == [8]
    assert before == sorted((path, path.stat().st_mtime_ns) for path in (folder / "main").rglob("*"))


def test_runs_of_a_plan_equal_those_of_the_projects_own_entry(folder: Path, tmp_path: Path) -> None:
    plan = make_plan(tmp_path, (6, 6), output=str(tmp_path / "own"))
    layout = ["--tensor-model-parallel-size", "2"]
    train(run_words(plan, "ours", "main", *layout), nproc=2).ok()
    plan = make_plan(tmp_path, (6, 6), output=str(tmp_path / "team"))
    run(folder, run_words(plan, "ours", "main", *layout), nproc=2).ok()
    keys = ("step", "lr", "loss", "grad_norm", "consumed_samples")
    own, team = (
        [[line[key] for key in keys] for line in history(tmp_path / output / "ours/main")]
        for output in ("own", "team")
    )
    assert own == team
    assert len(team) == load_plan(plan).run("ours", "main").last_step
    again = run(folder, run_words(plan, "ours", "main", *layout), nproc=2).ok()
    assert "nothing to train" in again.output


def test_a_branch_off_what_plain_megatron_trained(folder: Path, argv: list[str]) -> None:
    plain = ["--lr-decay-style", "constant", "--lr-warmup-iters", "2", "--train-iters", "5"]
    saved = ["--save", str(folder / "plain"), "--save-interval", "5"]
    main = run(folder, [*argv, *RATES, *plain, *saved], probe="rates")
    assert used(main) == [0.0, 0.005, 0.01, 0.01, 0.01]
    branch = ["--lr-path", "branch", "--lr-path-parent", str(folder / "plain"), "--lr-path-parent-step", "5"]
    outcome = run(
        folder,
        [*argv, *RATES, *branch, "--lr-path-decay-iters", "3", "--save", str(folder / "off-plain")],
        probe="rates",
    )
    assert used(outcome) == expected(LRPath(SCHEDULE, "branch", 5, 8))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--lr-path", "main", "--lr-decay-style", "WSD"], "--lr-decay-style cannot be given with --lr-path"),
        (["--lr-path-parent-step", "4"], "has no effect without --lr-path"),
        (["--lr-path", "main", "--use-checkpoint-args"], "--use-checkpoint-args cannot be given with"),
    ],
)
def test_a_contradiction_gives_one_message(
    folder: Path, argv: list[str], main: Outcome, extra: list[str], message: str
) -> None:
    outcome = run(folder, [*argv, *RATES, "--train-iters", "4", *extra, "--save", str(folder / "none")])
    assert outcome.status == [2]
    assert message in outcome.output
    assert "Traceback" not in outcome.output


@pytest.mark.skipif(bool(MEGATRON_LM), reason="the team's own argument is not Megatron-LM's")
def test_the_scripts_own_arguments_count(folder: Path, argv: list[str], main: Outcome) -> None:
    path = ["--lr-path", "main", "--lr-warmup-iters", "2", "--train-iters", "9", "--z-loss", "0.1"]
    assert run(folder, [*argv, *RATES, *path, "--save", str(folder / "z")]).ok()


def test_a_loss_that_is_not_finite_stops_before_the_update(folder: Path, argv: list[str]) -> None:
    path = ["--lr-path", "main", "--lr-warmup-iters", "0", "--train-iters", "6"]
    rates = ["--lr", "1e30", "--min-lr", "1e29"]
    outcome = run(folder, [*argv, *rates, *path, "--clip-grad", "0", "--save", str(folder / "nan")])
    assert outcome.status == [1], outcome.output[-3000:]
    assert "Last good checkpoint: none" in outcome.output
    assert not complete_steps(folder / "nan")

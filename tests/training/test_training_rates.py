"""The rate in the optimizer at every step of every run is the pure function's, after every kind of load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_lrpath.plan import load_plan
from tests.support.training_fixtures import history, make_plan, run_words, train

OPTIMIZER = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
STYLES = ("cosine", "knee", "multi-step", "wsd")


def planned(plan_path: Path, paradigm: str, name: str) -> list[float]:
    """Return the pure function's rate of every step of a run."""
    run = load_plan(plan_path).run(paradigm, name)
    return [run.path.lr_at(step - 1) for step in range(run.first_step + 1, run.last_step + 1)]


def used(plan_path: Path, paradigm: str, name: str, *extra: str) -> list[float]:
    """Return the rate of every update that a start of the run made; all parameter groups must agree."""
    outcome = train(run_words(plan_path, paradigm, name, *extra), probe="rates").ok()
    assert all(len(set(groups)) == 1 for groups in outcome.probed[0])
    return [groups[0] for groups in outcome.probed[0]]


@pytest.mark.parametrize("style", STYLES)
def test_every_run_of_ours_uses_the_planned_rates(tmp_path: Path, style: str) -> None:
    schedule = {"style": style, "max_lr": 0.01, "min_lr": 0.001, "warmup_steps": 2}
    plan = make_plan(tmp_path, (6, 8), schedule=schedule)
    for name in ("main", "branch-v1", "branch-v2"):
        assert used(plan, "ours", name) == planned(plan, "ours", name), name


@pytest.mark.parametrize("variant", ["reset-max", "rewarm-max", "keep-min"])
def test_a_cpt_chain_uses_the_planned_rates(tmp_path: Path, variant: str) -> None:
    plan = make_plan(tmp_path, (6, 6), cpt_variant=variant)
    for name in ("continual-v1", "continual-v2"):
        assert used(plan, "cpt", name) == planned(plan, "cpt", name), name


def test_a_run_from_scratch_uses_the_planned_rates_also_when_it_ends_part_way_down(tmp_path: Path) -> None:
    schedule = {"style": "cosine", "max_lr": 0.01, "min_lr": 0.0, "warmup_steps": 2, "cycle_steps": 40}
    plan = make_plan(tmp_path, (6, 6), schedule=schedule)
    rates = used(plan, "ptfs", "scratch-v2")
    assert rates == planned(plan, "ptfs", "scratch-v2")
    assert rates[-1] > 0.005


@pytest.mark.parametrize(("paradigm", "name", "stop"), [("ours", "main", 5), ("ours", "branch-v2", 10)])
def test_a_resumed_run_trains_at_the_planned_rates(
    tmp_path: Path, paradigm: str, name: str, stop: int
) -> None:
    plan = make_plan(tmp_path, (6, 6))
    if name != "main":
        train(run_words(plan, "ours", "main")).ok()
    first = used(plan, paradigm, name, "--exit-interval", str(stop))
    second = used(plan, paradigm, name)
    assert len(first) > 0
    assert len(second) > 0
    assert first + second == planned(plan, paradigm, name)


RATES = {
    "versions": {
        "versions": [
            {"name": "v1", "steps": 6},
            {"name": "v2", "steps": 8, "max_lr": 0.004, "rate_steps": 3},
            {"name": "v3", "steps": 6, "max_lr": 0.02, "rate_steps": 0},
        ]
    },
    "falling": {
        "schedule": {
            "style": "cosine",
            "max_lr": 0.01,
            "min_lr": 0.001,
            "warmup_steps": 2,
            "main": {"power": 0.7, "from": 4},
        }
    },
}


def with_rates(folder: Path, case: str, **changes: Any) -> Path:
    """Write a plan whose main path changes its rate; return its path."""
    plan = make_plan(folder, (6, 8, 6))
    plan.write_text(yaml.safe_dump(yaml.safe_load(plan.read_text()) | RATES[case] | changes, sort_keys=False))
    return plan


@pytest.mark.parametrize("case", RATES)
def test_a_main_path_that_changes_its_rate_and_its_branches_use_the_planned_rates(
    tmp_path: Path, case: str
) -> None:
    """The run is interrupted during a change, branched from there, and trained from scratch and continued."""
    plan = with_rates(tmp_path, case)
    begun = used(plan, "ours", "main", "--exit-interval", "7")
    rates = begun + used(plan, "ours", "main")
    assert rates == planned(plan, "ours", "main")
    assert len(begun) == 7
    assert len(set(rates[6:10])) == 4
    for name in ("branch-v1", "branch-v2", "branch-v3"):
        own = used(plan, "ours", name)
        assert own == planned(plan, "ours", name), name
        run = load_plan(plan).run("ours", name)
        assert own[0] == load_plan(plan).main.path.lr_at(run.first_step), name
    assert used(plan, "ptfs", "scratch-v2") == planned(plan, "ptfs", "scratch-v2")


def test_groups_of_another_rate_follow_the_main_path_in_proportion(tmp_path: Path) -> None:
    plan = with_rates(tmp_path, "versions", megatron={"decoupled_lr": 0.005})
    main = load_plan(plan).main
    for name in ("main", "branch-v2"):
        outcome = train(run_words(plan, "ours", name), probe="rates").ok()
        wanted = planned(plan, "ours", name)
        if name == "main":
            pairs = [sorted(set(groups)) for groups in outcome.probed[0]]
            assert pairs == [sorted({rate / 2, rate}) for rate in wanted]
        else:
            assert max(outcome.probed[0][0]) == wanted[0] == main.path.lr_at(10)
            assert min(outcome.probed[0][0]) == wanted[0] / 2


def test_the_history_holds_the_rates_and_losses_of_each_step_once(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, (6, 6))
    train(run_words(plan, "ours", "main", "--exit-interval", "4")).ok()
    train(run_words(plan, "ours", "main")).ok()
    lines = history(tmp_path / "runs/ours/main")
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["lr"] for line in lines] == planned(plan, "ours", "main")
    assert [line["consumed_samples"] for line in lines] == [4 * step for step in range(1, 10)]
    undisturbed = make_plan(tmp_path / "again", (6, 6))
    train(run_words(undisturbed, "ours", "main")).ok()
    again = history(tmp_path / "again/runs/ours/main")
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]


def test_another_maximal_rate_than_the_checkpoints_is_used(tmp_path: Path) -> None:
    """Megatron 0.19 leaves the checkpoint's max_lr in the parameter groups, and its scheduler reads it first."""
    plan = make_plan(tmp_path, (6, 6))
    train(run_words(plan, "ours", "main")).ok()
    model = words_without_plan(plan, tmp_path)
    argv = ["--lr-path", "branch", "--lr-path-parent", str(tmp_path / "runs/ours/main/checkpoints")]
    argv += ["--lr-path-parent-step", "9", "--lr-path-decay-iters", "4", "--lr", "0.5", "--min-lr", "0.25"]
    argv += ["--lr-path-style", "linear", "--save", str(tmp_path / "own"), *model]
    outcome = train(argv, probe="rates").ok()
    assert [groups[0] for groups in outcome.probed[0]] == [0.5, 0.4375, 0.375, 0.3125]


def words_without_plan(plan_path: Path, folder: Path) -> list[str]:
    """Return the Megatron arguments of a plan's model and batch, on Megatron's own dataset."""
    from megatron_lrpath.training.options.from_plan import plan_flags

    plan = load_plan(plan_path)
    parts = plan_flags(plan, plan.run("ours", "main"))
    argv = [word for key in ("model", "batch", "tokenizer", "seed") for word in parts[key]]
    data = ["--data-path", str(folder / "data/v1_text_document"), "--split", "1,0,0"]
    return [
        *argv,
        *data,
        "--eval-iters",
        "0",
        "--eval-interval",
        "100",
        "--save-interval",
        "100",
        "--device",
        "cpu",
        *OPTIMIZER,
    ]

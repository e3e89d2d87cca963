"""Batch sizes of versions: steps to samples and back, costs, identities, refusals, divisibility."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from megatron_lrpath.cli import main
from megatron_lrpath.errors import PlanError, UserError
from megatron_lrpath.launch.layouts import allocate
from megatron_lrpath.launch.resources import check_batch, micro_batch_arguments
from megatron_lrpath.plan import PARADIGMS, Plan, differences, run_identity
from megatron_lrpath.plan.identity import reached
from megatron_lrpath.plan.wording import step_tokens_text
from megatron_lrpath.schedule import BatchSizes
from megatron_lrpath.upkeep.rewind import require_versions
from tests.support.plan_text import plan_with

V1 = {"name": "v1", "steps": 100}
V2 = {"name": "v2", "steps": 100, "global_batch_size": 64}
V3 = {"name": "v3", "steps": 100}
V4 = {"name": "v4", "steps": 50, "global_batch_size": 96}


def identities(plan: Plan) -> dict[str, dict[str, Any]]:
    runs = [run for paradigm in PARADIGMS for run in plan.runs(paradigm)]
    return {run.key: json.loads(json.dumps(run_identity(plan, run))) for run in runs}


def test_steps_and_samples_follow_from_each_other() -> None:
    sizes = BatchSizes.of([(10, 4), (20, 4), (30, 6)], samples=1000)
    assert sizes.changes == ((10, 4), (30, 6))
    assert [sizes.samples_at(step) for step in (10, 11, 30, 31, 40)] == [1000, 1004, 1080, 1086, 1140]
    for step in range(10, 60):
        assert sizes.steps_at(sizes.samples_at(step)) == step
        assert sizes.samples_at(step + 1) - sizes.samples_at(step) == sizes.size_of(step + 1)
    assert sizes.steps_at(1083) == 30 + Fraction(1, 2)
    assert (sizes.sizes(10, 30), sizes.sizes(29, 31), sizes.sizes(30, 31), sizes.sizes(30, 30)) == (
        [4],
        [4, 6],
        [6],
        [],
    )
    assert sizes.thresholds() == [(1000, 4), (1080, 6)]
    with pytest.raises(ValueError, match="step 9 is before"):
        sizes.samples_at(9)
    with pytest.raises(ValueError, match="ascending"):
        BatchSizes(((5, 4), (5, 6)))


def test_every_paradigm_counts_the_samples_of_its_steps(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, versions=[V1, V2, V3, V4])
    assert plan.batch_sizes.changes == ((0, 32), (100, 64), (300, 96))
    assert [plan.samples_of(index) for index in range(4)] == [3200, 6400, 6400, 4800]
    assert step_tokens_text(plan) == "8,192, 16,384 from v2 on, 24,576 from v4 on"
    runs = {run.key: run for paradigm in PARADIGMS for run in plan.runs(paradigm)}
    tokens = {key: plan.tokens_of(run) // 256 for key, run in runs.items()}
    assert tokens["ptfs/scratch-v4"] == 3200 + 6400 + 6400 + 4800
    assert tokens["cpt/continual-v3"] == 6400
    assert tokens["ours/branch-v1"] == 60 * 32
    assert tokens["ours/branch-v4"] == 30 * 96
    last = max(plan.timeline.branch_points)  # 320
    ours = plan.batch_sizes.between(0, last) + sum(
        tokens[f"ours/branch-v{number}"] for number in (1, 2, 3, 4)
    )
    scratch = sum(tokens[f"ptfs/scratch-v{number}"] for number in (1, 2, 3, 4))
    assert plan.cost("ours").tokens == ours * 256
    assert plan.cost("ours").relative == ours / scratch
    assert plan.cost("ptfs").relative == 1


def test_an_appended_size_keeps_every_identity_and_another_size_is_another_run(tmp_path: Path) -> None:
    before = identities(plan_with(tmp_path, versions=[V1, V3]))
    after = identities(plan_with(tmp_path, versions=[V1, V3, V4]))
    assert all(differences(identity, after[key]) == [] for key, identity in before.items())
    grown = identities(plan_with(tmp_path, versions=[V1, V3 | {"global_batch_size": 64}]))
    said = ["version 2: was v3 with 100 steps, is v3 with 100 steps of 64 samples each"]
    for run in ("ours/main", "ours/branch-v3", "ptfs/scratch-v3", "cpt/continual-v3"):
        assert differences(before[run], grown[run]) == said
    assert differences(before["ours/branch-v1"], grown["ours/branch-v1"]) == []
    stored, now = before["ours/main"], grown["ours/main"]
    assert differences(reached(stored, now, 100), now) == [], "no step of v3 has been trained"
    assert differences(reached(stored, now, 101), now) == said
    same = identities(plan_with(tmp_path, versions=[V1, V3 | {"global_batch_size": 32}]))
    assert same == before


@pytest.mark.parametrize(
    ("versions", "changes", "message"),
    [
        ([V1 | {"global_batch_size": 64}], {}, "first version's batch size is batch.global_batch_size"),
        (
            [V1, V2, V3 | {"global_batch_size": 32}],
            {},
            "32 samples are fewer than the 64 of the version before",
        ),
        ([V1, V2 | {"global_batch_size": 36}], {}, "36 is not a multiple of micro_batch_size 8"),
        (
            [V1, V2 | {"alpha": 1.2}],
            {"branch_mix": {"slices": {"other": 0.5}}},
            "branch-v2 would begin at a batch of 32 samples and end at one of 64",
        ),
    ],
)
def test_sizes_that_cannot_be_trained_are_refused(
    tmp_path: Path, versions: list[dict[str, Any]], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        plan_with(tmp_path, versions=versions, **changes)


def test_a_layout_must_divide_all_batches_or_those_that_are_left(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, versions=[V1, V2, V3, V4])
    assert micro_batch_arguments(plan, 8) == ("--micro-batch-size", "4")
    with pytest.raises(UserError, match="the batch of 64 samples does not divide by 3"):
        micro_batch_arguments(plan, 3, left=[64, 96])
    assert micro_batch_arguments(plan, 3, left=[96]) == ()
    check_batch(plan, 12, left=[96])
    with pytest.raises(UserError, match="32 samples cannot be shared out among 12"):
        check_batch(plan, 12)
    assert allocate(plan, 1, 12, "cpu", left=[96]).layout.micro_batch_size == 8
    with pytest.raises(UserError, match="the batch of 32 samples does not divide by 12 model copies"):
        allocate(plan, 1, 12, "cpu")


def test_a_version_whose_batch_a_later_one_keeps_is_not_dropped(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, versions=[V1, V2, V3, V4])
    with pytest.raises(UserError, match="v3 keeps the global_batch_size of v2; write it at v3"):
        require_versions(plan, ["v2"])
    require_versions(plan, ["v3"])
    require_versions(plan, ["v2", "v3"])


def test_plan_shows_sizes_and_advise_refuses_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = plan_with(tmp_path, versions=[V1, V2]).path
    assert main(["advise", str(path)]) == 2
    assert "a step has 8,192, 16,384 from v2 on tokens" in capsys.readouterr().err
    main(["plan", str(path), "--json", "--paradigm", "ptfs"])
    shown = json.loads(capsys.readouterr().out)
    assert [one["global_batch_size"] for one in shown["versions"]] == [32, 64]
    assert [run["tokens"] for run in shown["paradigms"]["ptfs"]["runs"]] == [3200 * 256, 9600 * 256]

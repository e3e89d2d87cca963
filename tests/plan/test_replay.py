"""Replay in a plan: counts and costs, the samples of each run, identities, and refusals."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from megatron_lrpath.errors import PlanError
from megatron_lrpath.plan import PARADIGMS, Plan, differences, run_identity
from megatron_lrpath.plan.identity import reached
from megatron_lrpath.plan.mix import Replay
from megatron_lrpath.plan.wording import replays_text
from tests.support.plan_text import plan_with

V1 = {"name": "v1", "steps": 100}
V2 = {"name": "v2", "steps": 100, "replay": 0.2}
V3 = {"name": "v3", "steps": 50, "replay": {"share": 0.25, "weights": {"v2": 2, "v1": 1}}}
V4 = {"name": "v4", "steps": 70}


def identities(plan: Plan) -> dict[str, dict[str, Any]]:
    runs = [run for paradigm in PARADIGMS for run in plan.runs(paradigm)]
    return {run.key: json.loads(json.dumps(run_identity(plan, run))) for run in runs}


def test_every_prefix_has_its_share_and_every_weight_its_part() -> None:
    replay = Replay(Fraction(3, 7), (("v1", 5), ("v2", 2), ("v3", 1)))
    assert [replay.replayed(samples) for samples in (1, 2, 3, 7, 700)] == [0, 0, 1, 3, 300]
    for samples in range(200):
        counts, replayed = replay.by_version(samples), replay.replayed(samples)
        assert sum(counts.values()) == replayed == samples - replay.new(samples)
        exact = [replayed * Fraction(weight, 8) for weight in (5, 2, 1)]
        assert all(abs(count - part) <= 1 for count, part in zip(counts.values(), exact, strict=True))
    for available in range(60, 90):  # the most steps for which this many new samples suffice
        steps = replay.steps(available, 4)
        assert replay.new(steps * 4) <= available < replay.new((steps + 1) * 4)


def test_ptfs_reads_the_new_samples_once_and_costs_are_relative_to_it(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, versions=[V1, V2, V3, V4])
    line = plan.timeline
    assert line.ends == [100, 200, 250, 320]
    assert line.scratch_ends == [100, 180, 217, 287]  # 100, + 80, + 37.5, + 70
    assert [run.last_step for run in plan.runs("ptfs")] == line.scratch_ends
    assert [run.steps for run in plan.runs("cpt")] == [100, 100, 50, 70]
    assert plan.cost("ptfs").relative == 1.0
    assert plan.cost("cpt").relative == 320 / sum(line.scratch_ends)
    new = [plan.samples_of(index) for index in range(4)]
    assert new == [3200, 2560, 1200, 2240]
    third = plan.run("ptfs", "scratch-v3")
    assert plan.scratch_samples(third) == [3200, 2560, 217 * 32 - 3200 - 2560]  # 16 samples are no full step


def test_runs_name_the_versions_that_they_read_again(tmp_path: Path) -> None:
    only_v1 = V3 | {"replay": {"share": 0.25, "weights": {"v1": 1}}}
    plan = plan_with(tmp_path, versions=[V1, V2, only_v1, V4])
    reads = {run.name: run.slices for paradigm in PARADIGMS for run in plan.runs(paradigm)}
    assert reads["continual-v2"] == reads["branch-v2"] == ("v1", "v2")
    assert reads["continual-v3"] == reads["branch-v3"] == ("v1", "v3")
    assert reads["continual-v4"] == reads["branch-v4"] == ("v4",)
    assert reads["scratch-v4"] == ("v1", "v2", "v3", "v4")
    assert replays_text(plan) == "v2: 20% replayed; v3: 25% replayed (v1 1)"


def test_an_appended_replay_changes_nothing_before_and_a_different_replay_is_a_different_run(
    tmp_path: Path,
) -> None:
    plain = identities(plan_with(tmp_path, versions=[V1, V4 | {"name": "v2"}]))
    before = identities(plan_with(tmp_path, versions=[V1, V2]))
    after = identities(plan_with(tmp_path, versions=[V1, V2, V3]))
    assert "replay" not in json.dumps(plain)
    for key, identity in before.items():
        assert differences(identity, after[key]) == [], key
    assert before["ours/branch-v1"] == after["ours/branch-v1"]
    weighted = V2 | {"replay": {"share": 0.2, "weights": {"v1": 1}}}
    other = identities(plan_with(tmp_path, versions=[V1, weighted]))
    for key in ("ours/main", "ours/branch-v2", "cpt/continual-v2"):
        assert "a replay of 1/5 (v1: 1)" in differences(before[key], other[key])[0], key
    assert differences(before["ptfs/scratch-v2"], other["ptfs/scratch-v2"]) == []  # reads the same samples
    none = identities(plan_with(tmp_path, versions=[V1, {"name": "v2", "steps": 100}]))
    assert all(differences(before[key], none[key]) for key in before if key[-1] == "2" or key == "ours/main")
    longer = identities(plan_with(tmp_path, versions=[V1, V2 | {"steps": 150}]))["ours/main"]
    assert differences(reached(before["ours/main"], longer, 120), longer) == []  # v2 may become longer
    assert differences(reached(before["ours/main"], other["ours/main"], 100), other["ours/main"]) == []
    assert differences(reached(before["ours/main"], other["ours/main"], 101), other["ours/main"])


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ([V1 | {"replay": 0.1}], "versions[0].replay: the first version has no earlier data"),
        ([V1, V1 | {"name": "v2", "replay": 1.0}], "versions[1].replay: must be above 0 and below 1"),
        ([V1, V1 | {"name": "v2", "replay": 0.0001}], "less than one sample"),
        ([V1, {"name": "v2", "steps": 500, "replay": 0.5}], "would draw 8,000 samples again from earlier"),
        ([V1, V2, V3 | {"replay": {"share": 0.2, "weights": {"v4": 1}}}], "'v4' is no version before v3"),
        ([V1, V2 | {"replay": {"share": 0.2, "weights": {"v1": 0}}}], "weights.v1: must be at least 1"),
        ([V1, V2 | {"replay": {"share": 0.2, "weights": {}}}], "weights: names no version"),
        ([V1, V2 | {"replay": {"weights": {"v1": 1}}}], "the key 'share' is missing"),
        (
            [{"name": "v1", "steps": 50}, V2, V1 | {"name": "v3", "replay": {"share": 0.6, "weights": {"v1": 9}}}],
            "a smaller weight",
        ),
    ],
)  # fmt: skip
def test_a_replay_that_cannot_be_is_refused(tmp_path: Path, versions: list[Any], said: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan_with(tmp_path, versions=versions)
    assert said in str(caught.value)

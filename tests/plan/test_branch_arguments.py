"""`branch_megatron`: arguments of branches only, in their identity; unclassified arguments are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_lrpath.errors import PlanError
from megatron_lrpath.plan import PARADIGMS, Plan, differences, run_identity
from megatron_lrpath.plan.arguments import IDENTITY, table
from megatron_lrpath.plan.wording import branch_arguments_text
from tests.support.plan_text import plan_with

OWN = {"branch_megatron": {"adam-beta2": 0.999}}


def identities(plan: Plan) -> dict[str, dict[str, Any]]:
    return {run.key: run_identity(plan, run) for paradigm in PARADIGMS for run in plan.runs(paradigm)}


def test_only_branches_have_another_identity(tmp_path: Path) -> None:
    before = identities(plan_with(tmp_path, megatron={"adam_beta2": 0.95}))
    after = identities(plan_with(tmp_path, megatron={"adam_beta2": 0.95}, **OWN))
    assert {name for name in before if before[name] != after[name]} == {"ours/branch-v1", "ours/branch-v2"}
    said = differences(before["ours/branch-v1"], after["ours/branch-v1"])
    assert said == ["branch_megatron: was not given, is {'adam_beta2': 0.999}"]
    other = identities(
        plan_with(tmp_path, megatron={"adam_beta2": 0.95}, branch_megatron={"adam_beta2": 0.99})
    )
    assert differences(after["ours/branch-v1"], other["ours/branch-v1"]) == [
        "branch_megatron.adam_beta2: was 0.999, is 0.99"
    ]
    alike = identities(
        plan_with(tmp_path, megatron={"adam_beta2": 0.95}, branch_megatron={"adam_beta2": 0.95})
    )
    assert alike == before


def test_a_fine_tuning_depends_on_its_branchs(tmp_path: Path) -> None:
    sft = {"sft": {"data": "chat.jsonl", "max_lr": 1e-5, "steps": 10}}
    before, after = (plan_with(tmp_path, **sft, **own) for own in ({}, OWN))
    for paradigm, same in (("ours", False), ("ptfs", True)):
        pair = [run_identity(plan, plan.run(paradigm, "sft-v1")) for plan in (before, after)]
        assert (pair[0] == pair[1]) == same


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("bf16", True, "cannot be set for branches alone"),
        ("init_method_std", 0.1, "cannot be set for branches alone"),
        ("optimizer", "lion", "cannot be set for branches alone"),
        ("save_interval", 5, "cannot be set for branches alone"),
        ("num_layers", 3, "cannot be set for branches alone"),
        ("global_batch_size", 3, "set `batch.global_batch_size`"),
        ("lr", 3, "set `schedule.max_lr`"),
        ("adam_beta3", 0.9, "did you mean 'adam_beta"),
        ("adam_beta2", "much", "must be a number"),
    ],
)
def test_what_is_not_for_branches_is_refused(tmp_path: Path, name: str, value: Any, said: str) -> None:
    with pytest.raises(PlanError, match=rf"branch_megatron\.{name}: .*{said}"):
        plan_with(tmp_path, branch_megatron={name: value})


def test_arguments_for_branches_belong_to_the_identity() -> None:
    rows = [argument for argument in table().values() if argument.branch]
    assert rows
    assert {argument.plan for argument in rows} == {IDENTITY}


def test_a_version_has_its_own(tmp_path: Path) -> None:
    """An appended version's branch may differ while the trained branches keep their identity."""
    one, two = {"name": "v1", "steps": 100}, {"name": "v2", "steps": 100}
    three = {"name": "v3", "steps": 100, "branch_megatron": {"adam_beta2": 0.99}}
    megatron = {"adam_beta2": 0.95}
    before = identities(plan_with(tmp_path, megatron=megatron, versions=[one, two]))
    plan = plan_with(tmp_path, megatron=megatron, versions=[one, two, three])
    after = identities(plan)
    assert all(differences(before[name], after[name]) == [] for name in before)
    assert after["ours/branch-v3"]["branch_megatron"] == {"adam_beta2": 0.99}
    assert branch_arguments_text(plan) == "v3: adam_beta2 0.99"
    taken = plan_with(
        tmp_path, megatron=megatron, versions=[one | {"branch_megatron": {}}, two, three], **OWN
    )
    assert [taken.megatron_of(run) for run in taken.runs("ours")] == [
        {},
        {},
        {"adam_beta2": 0.999},
        {"adam_beta2": 0.99},
    ]


def test_all_errors_in_versions_are_reported_at_once(tmp_path: Path) -> None:
    wrong = [
        {"name": "v1", "steps": 100, "branch_megatron": {"bf16": True}},
        {"name": "v2", "steps": 100, "branch_megatron": {"adam_beta3": 0.9}},
    ]
    with pytest.raises(PlanError) as caught:
        plan_with(tmp_path, versions=wrong)
    assert "versions[0].branch_megatron.bf16" in str(caught.value)
    assert "versions[1].branch_megatron.adam_beta3" in str(caught.value)

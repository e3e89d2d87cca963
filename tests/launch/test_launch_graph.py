"""The order of runs and the remaining time, over plans of all kinds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lrpath.errors import UserError
from megatron_lrpath.launch.graph import Advance, chains, next_task, seconds_left, width
from megatron_lrpath.plan import PARADIGMS
from megatron_lrpath.runs.tasks import Task, build_tasks, link_aliases, with_ancestors
from tests.support.launch_fixtures import write_plan


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    made = {}
    for versions in range(1, 6):
        folder = tmp_path_factory.mktemp(f"plan{versions}")
        made[versions] = write_plan(folder, versions)
    return made


def beginning(tasks: list[Task], seconds: float = 1.0) -> dict[str, Advance]:
    return {task.key: Advance(step=task.run.first_step, seconds=seconds) for task in tasks}


def always(task: Task) -> bool:
    return True


def test_a_shared_training_is_one_task_with_an_alias(plans):
    tasks = build_tasks(plans[3], PARADIGMS)
    keys = [task.key for task in tasks]
    assert len(keys) == len(set(keys)) == 4 + 3 + 2
    shared = next(task for task in tasks if task.key == "ptfs/scratch-v1")
    assert [alias.name for alias in shared.aliases] == ["continual-v1"]
    assert next(task for task in tasks if task.key == "cpt/continual-v2").parent == "ptfs/scratch-v1"


def test_cpt_alone_carries_out_the_shared_training_under_its_one_name(plans):
    assert [task.key for task in build_tasks(plans[3], ("cpt",))] == [
        "ptfs/scratch-v1",
        "cpt/continual-v2",
        "cpt/continual-v3",
    ]


def test_one_run_brings_its_ancestors_and_nothing_else(plans):
    tasks = build_tasks(plans[4], PARADIGMS)
    chosen = [task.key for task in with_ancestors(tasks, plans[4], "branch-v2")]
    assert chosen == ["ours/main", "ours/branch-v2"]
    assert [task.key for task in with_ancestors(tasks, plans[4], "continual-v1")] == ["ptfs/scratch-v1"]
    with pytest.raises(UserError, match=r"branch-v9.*main, branch-v1"):
        with_ancestors(tasks, plans[4], "branch-v9")


def test_the_longest_chain_goes_first(plans):
    tasks = build_tasks(plans[4], PARADIGMS)
    lengths = chains(tasks, beginning(tasks))
    # main to the last branch point and this branch; CPT's whole chain; PTFS's last run: 4T each
    assert lengths["ours/main"] == lengths["ptfs/scratch-v1"] == lengths["ptfs/scratch-v4"] == 40
    assert lengths["ptfs/scratch-v2"] == 20
    first = next_task(tasks, beginning(tasks), lambda task: task.parent is None)
    assert first is not None
    assert first.key == "ours/main"


def test_a_branch_is_not_chosen_before_its_checkpoint_is_there(plans):
    tasks = build_tasks(plans[3], ("ours",))
    state = beginning(tasks)
    state["ours/main"] = replace(state["ours/main"], running=True, step=24)
    assert next_task(tasks, state, lambda task: False) is None
    chosen = next_task(tasks, state, lambda task: task.key == "ours/branch-v2")
    assert chosen is not None
    assert chosen.key == "ours/branch-v2"


def test_with_one_job_the_time_left_is_the_sum_of_all_steps(plans):
    tasks = build_tasks(plans[3], PARADIGMS)
    total = sum(task.run.steps for task in tasks)
    assert seconds_left(tasks, beginning(tasks, 0.5), 1) == pytest.approx(total * 0.5)


def test_a_branch_overlaps_the_continued_main_path(plans):
    tasks = build_tasks(plans[3], ("ours",))
    # main ends at 25, branch-v3 goes from there to 30; the earlier branches fit next to main
    assert seconds_left(tasks, beginning(tasks), 2) == pytest.approx(30)


@pytest.mark.parametrize(
    ("paradigms", "expected"), [(("cpt",), 1), (("ptfs",), 4), (("ours",), 2), (("ours", "ptfs", "cpt"), 6)]
)
def test_no_more_runs_are_planned_side_by_side_than_can_be(plans, paradigms, expected):
    # ours: the main path and one branch after another (alpha 0.5); all: CPT's second runs next to PTFS's
    assert width(build_tasks(plans[4], paradigms)) == expected


@settings(max_examples=60, deadline=None)
@given(
    versions=st.integers(1, 5),
    jobs=st.integers(1, 6),
    paces=st.lists(st.floats(0.01, 3), min_size=20, max_size=20),
    shares=st.lists(st.floats(0, 1), min_size=20, max_size=20),
)
def test_time_left_is_between_the_longest_run_and_the_sum_of_all_runs(plans, versions, jobs, paces, shares):
    tasks = build_tasks(plans[versions], PARADIGMS)
    state = {}
    for task, pace, share in zip(tasks, paces, shares, strict=False):
        reached = task.run.first_step if task.parent else task.run.first_step + int(share * task.run.steps)
        state[task.key] = Advance(step=reached, done=reached >= task.run.last_step, seconds=pace)
    remaining = [(t.run.last_step - state[t.key].step) * state[t.key].seconds for t in tasks]
    left = seconds_left(tasks, state, jobs)
    assert left <= sum(remaining) + 1e-6
    assert left >= max([sum(remaining) / jobs, *remaining]) - 1e-6


def test_the_alias_is_a_relative_link_that_moves_with_the_output(plans, tmp_path):
    plan = write_plan(tmp_path, 2)
    task = next(task for task in build_tasks(plan, PARADIGMS) if task.aliases)
    task.folder.mkdir(parents=True)
    link_aliases(task)
    link_aliases(task)
    (tmp_path / "out").rename(tmp_path / "moved")
    link = tmp_path / "moved/cpt/continual-v1"
    assert link.is_symlink()
    assert link.resolve() == tmp_path / "moved/ptfs/scratch-v1"


def test_a_training_begun_under_the_other_name_is_used_in_place(tmp_path):
    task = next(task for task in build_tasks(write_plan(tmp_path, 2), PARADIGMS) if task.aliases)
    (task.aliases[0] / "checkpoints").mkdir(parents=True)
    link_aliases(task)
    assert task.folder.resolve() == task.aliases[0]


def test_two_trainings_of_the_shared_run_are_refused(tmp_path):
    task = next(task for task in build_tasks(write_plan(tmp_path, 2), PARADIGMS) if task.aliases)
    (task.aliases[0] / "checkpoints").mkdir(parents=True)
    (task.folder / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="one and the same training"):
        link_aliases(task)

"""Batch sizes that grow with a version: samples, counters and rates across the change, in every paradigm."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml

from megatron_lrpath.plan import Plan, load_plan
from tests.support.training_fixtures import history, make_plan, run_words
from tests.training.test_training_branch import refusal, tensors
from tests.training.test_training_data import checkpoint, samples, without_time

V1 = {"name": "v1", "steps": 4}
V2 = {
    "name": "v2",
    "steps": 6,
    "global_batch_size": 8,
    "alpha": 1.3,
}  # its branch leaves at step 2, before the change
V3 = {"name": "v3", "steps": 4}
SLICES = (4, 12, 8)  # steps of four samples, as many as the versions' steps need

pytestmark = pytest.mark.slow


def grown(folder: Path, *versions: dict[str, object]) -> Path:
    """Write a plan of these versions; return its path."""
    path = make_plan(folder, SLICES)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"versions": list(versions)}))
    return path


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a plan whose steps have four samples in v1 and eight from v2 on."""
    return grown(tmp_path_factory.mktemp("sizes"), V1, V2, V3)


@pytest.fixture(scope="module")
def main(plan: Path) -> list[str]:
    """Return the main path's samples; it ends at step 12."""
    return samples(plan, "ours", "main")


def recorded(plan: Plan, paradigm: str, name: str) -> list[tuple[int, int, float]]:
    """Return each step of the run's history with the consumed samples and the rate."""
    rows = history(plan.folder(plan.run(paradigm, name)))
    return [(row["step"], row["consumed_samples"], row["lr"]) for row in rows]


def planned(plan: Plan, paradigm: str, name: str) -> list[tuple[int, int, float]]:
    """Return the same by the plan: four samples up to step 4, eight afterwards."""
    run = plan.run(paradigm, name)
    steps = range(run.first_step + 1, run.last_step + 1)
    return [(step, 4 * step + 4 * max(0, step - 4), run.path.lr_at(step - 1)) for step in steps]


def test_counter_rates_and_samples_are_exact_in_every_paradigm(plan: Path, main: list[str]) -> None:
    read = load_plan(plan)
    assert len(main) == len(set(main)) == 4 * 4 + 8 * 8
    assert recorded(read, "ours", "main") == planned(read, "ours", "main")
    assert samples(plan, "ours", "branch-v2", nproc=2) == main[8:64], "across the change"
    assert recorded(read, "ours", "branch-v2") == planned(read, "ours", "branch-v2")
    scratch = samples(plan, "ptfs", "scratch-v2")
    assert Counter(scratch) == Counter(main[:64])
    assert recorded(read, "ptfs", "scratch-v2") == planned(read, "ptfs", "scratch-v2")
    samples(plan, "cpt", "continual-v1")
    assert samples(plan, "cpt", "continual-v2") == main[16:64]
    assert recorded(read, "cpt", "continual-v2") == planned(read, "cpt", "continual-v2")


def test_a_run_resumes_before_at_and_after_the_change(tmp_path: Path, plan: Path, main: list[str]) -> None:
    other = grown(tmp_path, V1, V2, V3)
    read = [sample for stop in "345" for sample in samples(other, "ours", "main", "--exit-interval", stop)]
    assert read == main[:24]
    assert read + samples(other, "ours", "main") == main
    for step in (2, 4, 12):
        assert tensors(checkpoint(tmp_path, step)) == tensors(checkpoint(plan.parent, step))


def test_an_appended_size_changes_nothing_before_it_and_may_need_more_processes(
    tmp_path: Path, plan: Path, main: list[str]
) -> None:
    first = grown(tmp_path, V1)
    assert samples(first, "ours", "main") == main[:8]
    lines = history(tmp_path / "runs/ours/main")
    three = grown(tmp_path, V1, V2, V3)
    message = refusal([*run_words(three, "ours", "main"), "--micro-batch-size", "4"], nproc=2)
    assert "a batch of 4 samples" in message
    assert "2 data-parallel ranks in micro batches of 4" in message
    samples(three, "ours", "main", "--exit-interval", "4")
    # the next batch can be divided among two ranks in micro batches of four, unlike the first ones
    assert samples(three, "ours", "main", "--micro-batch-size", "4", nproc=2) == main[16:]
    after = [without_time(line) for line in history(tmp_path / "runs/ours/main")]
    assert after[:2] == [without_time(line) for line in lines]

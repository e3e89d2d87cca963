"""The tokens that really reach the model: the samples of each run, their order, and none twice."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from megatron_lrpath.data.record import record_path
from megatron_lrpath.plan import load_plan
from megatron_lrpath.runs.checkpoints import complete_steps
from tests.support.training_fixtures import history, make_plan, run_words, train
from tests.training.test_training_branch import digests, refusal, tensors
from tests.training.test_training_rates import words_without_plan

VERSIONS = (4, 6, 4)  # steps; with α = 0.5 the branches leave the main path at steps 2, 7 and 12
BATCH = 4  # samples a step

pytestmark = pytest.mark.slow


def samples(plan: Path, paradigm: str, run: str, *extra: str, nproc: int = 1) -> list[str]:
    """Train a run; return a digest of every sample that reached the model, in the order of the batches."""
    ranks = train(run_words(plan, paradigm, run, *extra), nproc, probe="tokens").ok().probed
    return [sample for batches in zip(*ranks, strict=True) for batch in batches for sample in batch]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a plan of three versions."""
    return make_plan(tmp_path_factory.mktemp("data"), VERSIONS)


@pytest.fixture(scope="module")
def main(plan: Path) -> list[str]:
    """Return the main path's samples; it ends at the last branch point."""
    return samples(plan, "ours", "main")


@pytest.fixture(scope="module")
def stream(plan: Path, main: list[str]) -> list[str]:
    """Return all samples of the three versions in order: the main path's and the last branch's."""
    return main + samples(plan, "ours", "branch-v3")


def test_no_sample_is_used_twice(stream: list[str]) -> None:
    assert len(stream) == sum(VERSIONS) * BATCH
    assert len(set(stream)) == len(stream)


@pytest.mark.parametrize(("run", "first", "last"), [("branch-v1", 2, 4), ("branch-v2", 7, 10)])
def test_a_branchs_batches_are_the_main_paths(
    plan: Path, main: list[str], run: str, first: int, last: int
) -> None:
    assert samples(plan, "ours", run) == main[first * BATCH : last * BATCH]


def test_two_data_parallel_ranks_share_out_the_same_batches(tmp_path: Path, main: list[str]) -> None:
    plan = make_plan(tmp_path, VERSIONS)
    assert samples(plan, "ours", "main", nproc=2) == main
    assert samples(plan, "ours", "branch-v2", nproc=2) == main[7 * BATCH : 10 * BATCH]
    shutil.rmtree(tmp_path / "runs/ours/branch-v2")
    assert samples(plan, "ours", "branch-v2") == main[7 * BATCH : 10 * BATCH]


def test_another_micro_batch_size_reads_the_same_batches(plan: Path, main: list[str], tmp_path: Path) -> None:
    other = make_plan(tmp_path, VERSIONS)
    assert samples(other, "ours", "main", "--micro-batch-size", "1") == main


def test_a_resumed_run_reads_on_where_it_stopped(tmp_path: Path, main: list[str]) -> None:
    plan = make_plan(tmp_path, VERSIONS)
    first = samples(plan, "ours", "main", "--exit-interval", "5")
    assert len(first) == 5 * BATCH
    assert first + samples(plan, "ours", "main", nproc=2) == main


def test_a_continual_chain_reads_each_version_in_the_main_paths_order(
    tmp_path: Path, stream: list[str]
) -> None:
    """Version 1 is the scratch run, with its own order; later versions have the main path's order."""
    plan = make_plan(tmp_path, VERSIONS)
    ends = [4 * BATCH, 10 * BATCH, 14 * BATCH]
    assert sorted(samples(plan, "cpt", "continual-v1")) == sorted(stream[: ends[0]])
    assert samples(plan, "cpt", "continual-v2") == stream[ends[0] : ends[1]]
    assert samples(plan, "cpt", "continual-v3", nproc=2) == stream[ends[1] :]


@pytest.mark.parametrize(("run", "steps"), [("scratch-v2", 10), ("scratch-v3", 14)])
def test_a_run_from_scratch_reads_exactly_the_samples_of_its_versions_shuffled(
    plan: Path, stream: list[str], run: str, steps: int
) -> None:
    read = samples(plan, "ptfs", run)
    assert Counter(read) == Counter(stream[: steps * BATCH])
    assert read != stream[: steps * BATCH]
    assert set(read[: 4 * BATCH]) & set(stream[4 * BATCH :]), "the versions are shuffled together"


def test_an_appended_version_changes_nothing_before_it_and_the_main_path_resumes(
    plan: Path, main: list[str], tmp_path: Path
) -> None:
    """With two versions trained and a third appended, all equals the plan with three from the start."""
    two = make_plan(tmp_path, VERSIONS[:2])
    assert load_plan(two).run("ours", "main").last_step == 7
    assert samples(two, "ours", "main") == main[: 7 * BATCH]
    assert samples(two, "ours", "branch-v2") == main[7 * BATCH : 10 * BATCH]
    before = {step: digests(checkpoint(tmp_path, step)) for step in (2, 4, 7)}
    three = make_plan(tmp_path, VERSIONS)
    assert samples(three, "ours", "main") == main[7 * BATCH :]
    assert {step: digests(checkpoint(tmp_path, step)) for step in (2, 4, 7)} == before
    for step in (2, 4, 7, 10, 12):
        assert tensors(checkpoint(tmp_path, step)) == tensors(checkpoint(plan.parent, step))
    assert [without_time(line) for line in history(tmp_path / "runs/ours/main")] == [
        without_time(line) for line in history(plan.parent / "runs/ours/main")
    ]
    done = train(run_words(three, "ours", "branch-v2")).ok()
    assert "nothing to train" in done.output


def checkpoint(folder: Path, step: int) -> Path:
    """Return a checkpoint of the main path below a plan's folder."""
    return folder / f"runs/ours/main/checkpoints/iter_{step:07}"


def without_time(line: dict[str, object]) -> dict[str, object]:
    """Return a step's record without its duration."""
    return {key: value for key, value in line.items() if key != "seconds"}


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_version_with_too_few_tokens_is_refused_with_both_numbers(tmp_path: Path, nproc: int) -> None:
    plan = make_plan(tmp_path, (4, 4))
    plan.write_text(plan.read_text().replace("name: v2\n  steps: 4", "name: v2\n  steps: 90"))
    message = refusal(run_words(plan, "ours", "main"), nproc)
    assert "version v2" in message
    assert "360 samples of 16 tokens (5,760 tokens)" in message, "what its steps need"
    assert "has 23 (375 tokens" in message, "what there is"
    assert not complete_steps(tmp_path / "runs/ours/main/checkpoints")


def test_data_of_another_tokenizer_are_refused_with_and_without_a_plan(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, (4, 4))
    for name in ("v1", "v2", "valid"):  # all ids would fit
        assert record_path(tmp_path / f"data/{name}_text_document").exists()
    plan.write_text(plan.read_text().replace("vocab_size: 120", "vocab_size: 128"))
    alone = ["--lr-path", "main", "--lr", "0.1", "--train-iters", "4", "--save", str(tmp_path / "own")]
    for argv in (run_words(plan, "ours", "main"), [*words_without_plan(plan, tmp_path), *alone]):
        message = refusal(argv)
        assert "v1_text_document" in message
        assert "made with NullTokenizer (vocab_size 120)" in message
        assert "NullTokenizer (vocab_size 128)" in message

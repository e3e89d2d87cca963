"""The samples of any step can be listed again: exactly the tokens that reached the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.faults import train_with
from tests.support.training_fixtures import launch, make_plan, run_words, train


def print_samples(argv: list[str]) -> None:
    """Run `lrpath samples` in a process that may import Megatron."""
    from megatron_lrpath.cli import main

    raise SystemExit(main(["samples", *argv]))


def printed(*argv: str) -> str:
    """Return the output of `lrpath samples`."""
    return launch("tests.reliability.test_reliability_samples:print_samples", list(argv)).output


def record_tokens(argv: list[str]) -> None:
    """Train, and write the tokens of each micro-batch to the file `argv[0]`."""
    from megatron_lrpath.training import forward, pretrain

    original, seen = forward.get_batch, []

    def get_batch(*args: object) -> object:
        batch = original(*args)
        seen.append(batch["tokens"].tolist())
        Path(argv[0]).write_text(json.dumps(seen))
        return batch

    forward.get_batch = get_batch
    pretrain.main(argv[1:])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a trained short main path and scratch run.

    Their tokens are in `main.json` and `scratch-v2.json`.
    """
    folder = tmp_path_factory.mktemp("trained")
    plan = make_plan(folder, (4, 4))
    for paradigm, run in (("ours", "main"), ("ptfs", "scratch-v2")):
        argv = [str(folder / f"{run}.json"), *run_words(plan, paradigm, run)]
        launch("tests.reliability.test_reliability_samples:record_tokens", argv).ok()
    return folder


@pytest.mark.parametrize(("paradigm", "run", "step"), [("ours", "main", 5), ("ptfs", "scratch-v2", 7)])
def test_the_printed_text_is_what_the_model_was_given(
    trained: Path, paradigm: str, run: str, step: int
) -> None:
    answer = printed(str(trained / "runs" / paradigm / run), "--step", str(step), "--json")
    samples = samples_in(answer)
    assert [sample["sample"] for sample in samples] == list(range(4 * step - 4, 4 * step))
    micro_batches = json.loads((trained / f"{run}.json").read_text())[2 * step - 2 : 2 * step]
    given = [tokens for batch in micro_batches for tokens in batch]
    assert [list(map(int, sample["text"].split())) for sample in samples] == given
    assert all(sum(place["tokens"] for place in sample["documents"]) == 17 for sample in samples)


def test_documents_and_the_steps_facts_are_printed(trained: Path) -> None:
    text = printed(str(trained / "runs/ours/main"), "--step", "6", "--characters", "20")
    assert "step 6: samples 20 to 23 (lr 0.01, loss " in text
    assert "sample 20, version v2" in text
    assert "v2_text_document document " in text


def test_a_skipped_batch_is_printed_as_such(tmp_path: Path) -> None:
    spikes = ("--loss-spike-window", "4", "--loss-spike-action", "skip")
    argv = run_words(make_plan(tmp_path, (8, 8)), "ours", "main", *spikes)
    outcome = train_with(["large:6:1.5"], argv).ok()
    assert "step 6: loss spike" in outcome.output
    text = printed(str(tmp_path / "runs/ours/main"), "--step", "6")
    assert "step 6: samples 20 to 23 (lr 0.01, loss " in text
    assert ", a loss spike, update skipped)" in text
    assert "v1_text_document document " in text


def test_after_a_version_was_appended_the_earlier_steps_have_the_samples_they_had(
    trained: Path, tmp_path: Path
) -> None:
    """The steps to come show the samples that they will read."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / "plan.yaml").unlink()
    plan = make_plan(tmp_path, (4, 4, 4))
    run = str(tmp_path / "runs/ours/main")
    before = printed(str(trained / "runs/ours/main"), "--step", "6", "--json")
    after = printed(run, "--step", "6", "--json", "--plan", str(plan))
    texts = [[sample["text"] for sample in samples_in(answer)] for answer in (before, after)]
    assert texts[0] == texts[1]
    train(run_words(plan, "ours", "main")).ok()
    assert "sample 36, version v3" in printed(run, "--step", "10")


def samples_in(answer: str) -> list[dict[str, Any]]:
    """Return the samples in the command's JSON."""
    return list(json.loads(answer)["samples"])


def test_a_step_that_the_run_does_not_have_is_refused(trained: Path) -> None:
    assert "--step 7: main has the steps 1 to 6" in printed(str(trained / "runs/ours/main"), "--step", "7")


def test_a_folder_that_is_no_run_is_refused(trained: Path) -> None:
    assert "not the folder of a run" in printed(str(trained), "--step", "1")

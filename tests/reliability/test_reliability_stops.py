"""How a training ends before its last step: signals, numbers not finite, a dead rank, a second launch."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest

from megatron_lrpath.exits import SAVED_AND_STOPPED
from megatron_lrpath.locks import is_held
from megatron_lrpath.runs.checkpoints import complete_steps
from tests.support.faults import train_with
from tests.support.training_fixtures import Ranks, history, make_plan, run_words, train
from tests.support.waiting import until

TP2 = ("--tensor-model-parallel-size", "2")


def main_words(folder: Path, *extra: str, **changes: object) -> list[str]:
    """Return the command line of a main path of nine steps with branch points at 3 and 9."""
    return run_words(make_plan(folder, (6, 6), **changes), "ours", "main", *extra)


def checkpoints(folder: Path) -> Path:
    """Return the folder of the main path's checkpoints."""
    return folder / "runs/ours/main/checkpoints"


def one_error(output: str) -> str:
    """Return the only error message in a log, which has no stack trace."""
    assert "Traceback" not in output, output[-3000:]
    assert "frame #0" not in output, output[-3000:]
    assert output.count("lrpath: error: ") == 1, output[-3000:]
    return output.partition("lrpath: error: ")[2].splitlines()[0]


@pytest.mark.parametrize("fault", ["term:5", "usr2:5"])
def test_a_signal_saves_at_the_next_step_boundary_and_leaves_with_its_own_code(
    tmp_path: Path, fault: str
) -> None:
    argv = main_words(tmp_path)
    outcome = train_with([fault], argv)
    assert outcome.status == [SAVED_AND_STOPPED], outcome.output[-3000:]
    assert complete_steps(checkpoints(tmp_path)) == [3, 5]
    train(argv).ok()
    assert [line["step"] for line in history(tmp_path / "runs/ours/main")] == list(range(1, 10))


def test_a_signal_is_answered_while_the_loss_scale_comes_down(tmp_path: Path) -> None:
    """The first fp16 steps make no update, and the run saves nevertheless."""
    outcome = train_with(["term:2:1"], main_words(tmp_path, megatron={"fp16": True}), nproc=2)
    assert outcome.status == [SAVED_AND_STOPPED] * 2, outcome.output[-3000:]
    assert complete_steps(checkpoints(tmp_path)) == [2]
    assert [line.get("skipped") for line in history(tmp_path / "runs/ours/main")] == [True, True]


def test_a_signal_before_the_first_step_ends_at_once(tmp_path: Path) -> None:
    argv = main_words(tmp_path)
    outcome = train_with(["early"], argv)
    assert outcome.status == [SAVED_AND_STOPPED]
    assert "SIGTERM before the first step: nothing to save, stopped" in outcome.output
    assert complete_steps(checkpoints(tmp_path)) == []


def test_a_signal_during_an_asynchronous_save_waits_for_it(tmp_path: Path) -> None:
    """The run ends within the grace period, after one step and one save."""
    argv = main_words(tmp_path, "--async-save", "--save-interval", "1")
    outcome = train_with(["usr2:5"], argv)
    assert outcome.status == [SAVED_AND_STOPPED], outcome.output[-3000:]
    assert complete_steps(checkpoints(tmp_path)) == [1, 2, 3, 4, 5]
    assert time.time() - (tmp_path / "runs/ours/main/history.jsonl").stat().st_mtime < 60


def test_a_signal_to_one_rank_stops_all_with_one_checkpoint(tmp_path: Path) -> None:
    outcome = train_with(["term:5:1"], main_words(tmp_path, *TP2), 2)
    assert outcome.status == [SAVED_AND_STOPPED] * 2, outcome.output[-3000:]
    assert complete_steps(checkpoints(tmp_path)) == [3, 5]
    assert "Traceback" not in outcome.output


def test_a_signal_at_a_step_that_is_saved_anyway_saves_it_once(tmp_path: Path) -> None:
    outcome = train_with(["term:3"], main_words(tmp_path, "--async-save"))
    assert outcome.status == [SAVED_AND_STOPPED], outcome.output[-3000:]
    assert complete_steps(checkpoints(tmp_path)) == [3]


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    """One of two ranks prints one message with step, rank, samples and resume point; weights stay."""
    argv = main_words(tmp_path, "--save-interval", "4")
    outcome = train_with(["nan:6:1"], argv, 2)
    assert outcome.status == [1, 1]
    message = one_error(outcome.output)
    assert "step 6: the loss is not finite: nan on rank 1 in samples 22 to 23" in message
    assert "the batch is samples 20 to 23" in message
    assert f"step 4 in {checkpoints(tmp_path)}" in message
    assert [line["step"] for line in history(tmp_path / "runs/ours/main")] == [1, 2, 3, 4, 5]
    assert complete_steps(checkpoints(tmp_path)) == [3, 4]


def test_a_gradient_norm_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    outcome = train_with(["large:6:1e36"], main_words(tmp_path))
    assert outcome.status == [1]
    assert "step 6: the gradient norm is inf on every rank, the loss" in one_error(outcome.output)


def test_the_check_of_numbers_can_be_turned_off(tmp_path: Path) -> None:
    outcome = train_with(["nan:6"], main_words(tmp_path, "--no-check-for-nan-in-loss-and-grad"))
    assert outcome.status == [0]


@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_rank_ends_the_others_soon_and_is_named_once(tmp_path: Path, dead: int) -> None:
    outcome = train_with([f"die:5:{dead}"], main_words(tmp_path, *TP2), 2)
    seconds = time.time() - (tmp_path / "runs/ours/main/history.jsonl").stat().st_mtime
    print(f"from the step before the death to the end of all ranks: {seconds:.1f} s")
    assert seconds < 60
    assert outcome.status[dead] == -9
    assert outcome.status[1 - dead] == 1
    assert one_error(outcome.output).startswith(f"rank {dead} died after step 4 (process ")


@pytest.mark.parametrize("dead", [0, 1])
def test_ranks_that_time_out_waiting_for_another_rank_print_where(tmp_path: Path, dead: int) -> None:
    """The other rank died before the rendezvous, and no launcher ends the ranks."""
    outcome = train_with([f"absent:{dead}:3"], main_words(tmp_path, *TP2), 2)
    assert outcome.status[dead] == -9
    assert outcome.status[1 - dead] == 1
    said = f"lrpath: error: rank {1 - dead}: not all 2 ranks joined at 127.0.0.1:"
    assert outcome.output.count(said) == outcome.output.count("lrpath: error: ") == 1
    assert "Traceback" not in outcome.output


def test_a_complete_run_is_left_as_it_is_by_all_ranks(tmp_path: Path) -> None:
    """A second call has nothing to train, and so no process group."""
    argv = main_words(tmp_path, *TP2)
    train(argv, 2).ok()
    (tmp_path / "runs/ours/main/result.json").unlink()  # as if killed before it was written
    again = train(argv, 2).ok()
    assert "step 9 is reached already, nothing to train" in again.output
    assert "lrpath: error" not in again.output
    assert (tmp_path / "runs/ours/main/result.json").exists()


def test_a_second_launch_of_the_same_run_is_refused(tmp_path: Path) -> None:
    argv = main_words(tmp_path)
    first = Ranks.start("tests.support.faults:main", ["slow:5", "--", *argv])
    try:
        until(lambda: is_held(checkpoints(tmp_path)), 60)
        second = train(argv)
        assert second.status == [2]
        owner = f"process {first.processes[0].pid} on {socket.gethostname()} is training this run already"
        assert owner in one_error(second.output)
    finally:
        first.processes[0].kill()
        first.outcome(timeout=10)


def test_a_rank_that_fails_shows_its_own_stack_trace_and_no_other(tmp_path: Path) -> None:
    outcome = train_with(["bug:5:0"], main_words(tmp_path, *TP2), 2)
    assert outcome.status == [1, 1]
    assert outcome.output.count("Traceback (most recent call last)") == 1
    assert outcome.output.count("lrpath: error: ") == 1
    assert "rank 0 ended after step 4: ArithmeticError: something is broken" in outcome.output


def test_a_spike_is_logged_with_its_samples(tmp_path: Path) -> None:
    argv = main_words(tmp_path, "--loss-spike-window", "4")
    outcome = train_with(["large:7:1.5"], argv).ok()
    assert "step 7: loss spike: " in outcome.output
    assert "samples 24 to 27; update made" in outcome.output
    lines = history(tmp_path / "runs/ours/main")
    assert [line["step"] for line in lines if "spike" in line] == [7]
    assert lines[6]["spike"]["limit"] < lines[6]["loss"]


def test_a_spike_may_be_skipped_and_a_resumed_run_skips_the_same(tmp_path: Path) -> None:
    spikes = ("--loss-spike-window", "4", "--loss-spike-action", "skip")
    argv = main_words(tmp_path, *spikes, "--save-interval", "1")
    train_with(["large:7:1.5"], argv).ok()
    whole = history(tmp_path / "runs/ours/main")
    assert [line["step"] for line in whole if line.get("skipped")] == [7]
    lineage = json.loads((tmp_path / "runs/ours/main/lineage.json").read_text())
    assert [(one["step"], one["samples"]) for one in lineage["skipped"]] == [(7, [24, 27])]
    second = tmp_path / "second"
    second.mkdir()
    argv = main_words(second, *spikes, "--save-interval", "1")
    train_with(["large:7:1.5"], [*argv, "--exit-interval", "6"]).ok()
    train_with(["large:7:1.5"], [*argv, "--exit-interval", "7"]).ok()
    train_with(["large:7:1.5"], argv).ok()
    keys = ("step", "loss", "lr", "grad_norm", "skipped")
    resumed = history(second / "runs/ours/main")
    assert [[line.get(key) for key in keys] for line in resumed] == [
        [line.get(key) for key in keys] for line in whole
    ]

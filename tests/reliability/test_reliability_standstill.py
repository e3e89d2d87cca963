"""A rank that hangs ends the run and is named; saves, evaluations and a suspended machine do not end it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest

from megatron_lrpath.training.guards import standstill
from megatron_lrpath.training.guards.standstill import Standstill, culprits, fit_collectives
from tests.support.training_fixtures import Ranks, make_plan, run_words

PATIENCE = 90.0  # seconds for a start and its end
SOON = ("--rank-timeout", "0.03")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("freeze:3:1", "rank 1 (process {} on {}) does not answer"),
        ("freeze:3:0", "rank 0 (process {} on {}) does not answer"),
        ("hang:3:1", "rank 1 (process {} on {}) is at tests.support.faults, line "),
    ],
)
def test_the_rank_that_has_not_entered_the_collective_is_named(tmp_path: Path, fault: str, said: str) -> None:
    plan = make_plan(tmp_path)
    argv = [*run_words(plan, "ours", "main"), *SOON]
    ranks = Ranks.start("tests.support.faults:main", ["impatient", fault, "--", *argv], 2)
    still = int(fault[-1])
    ranks.processes[1 - still].join(PATIENCE)
    assert ranks.processes[1 - still].exitcode == 1
    ranks.processes[still].kill()  # as a launcher does; a stopped process receives no other signal
    outcome = ranks.outcome(PATIENCE)
    start, end = said.split(" (process {} on {}) ")
    (line,) = [one for one in outcome.output.splitlines() if "has stalled" in one]
    assert f"{start} (process " in line
    assert f") {end}" in line
    assert "after step 2" in line
    assert "call again to continue" in line


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ({0: [1, True, "a"], 1: [1, True, "b"]}, {0: [2, True, "a"], 1: [2, True, "b"]}, ([], "")),
        (
            {0: [1, True, "a"], 1: [1, True, "b"]},
            {0: [2, True, "a"], 1: [1, True, "b"]},
            ([1], "does not answer"),
        ),
        ({0: [1, True, "a"], 1: None}, {0: [2, True, "a"], 1: None}, ([1], "does not answer")),
        ({0: [1, True, "a"], 1: [1, False, "b"]}, {0: [2, True, "a"], 1: [2, False, "b"]}, ([1], "is at b")),
    ],
)
def test_ranks_without_an_answer_are_named_before_ranks_outside_collectives(before, after, found):
    assert culprits(before, after) == found


def test_only_steps_after_the_first_count_and_no_time_in_which_the_process_was_stopped(monkeypatch):
    now, leaving, asked = [0.0], Event(), []
    peers = SimpleNamespace(channel=object(), step=None, leaving=leaving)
    clock = Standstill(peers, minutes=1.0)  # type: ignore[arg-type]
    monkeypatch.setattr(clock, "_find", lambda step: (asked.append(now[0]), leaving.set()))
    looks = iter(range(1000))

    def wait(seconds: float) -> bool:
        look = next(looks)
        now[0] += 3600.0 if look == 60 else seconds  # stopped for an hour, once
        if look == 40:
            clock.step_ended()  # the first step was long
            peers.step = 1
        if look == 50:
            clock.step_begins()
        return leaving.is_set()

    monkeypatch.setattr(leaving, "wait", wait)
    monkeypatch.setattr(standstill.time, "monotonic", lambda: now[0])
    clock.step_begins()
    clock._watch()
    (when,) = asked
    assert when > 3600 + 2 * 50 + 50  # look 50, and a minute of looks; the long one counts as two


@pytest.mark.parametrize(
    ("given", "minutes", "warned"),
    [
        ({}, 35, False),
        ({"distributed_timeout_minutes": 10}, 10, True),
        ({"distributed_timeout_minutes": 40}, 40, False),
    ],
)
def test_collectives_wait_longer_unless_the_user_sets_a_timeout(monkeypatch, capsys, given, minutes, warned):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    args = Namespace(rank_timeout=30.0, **{"distributed_timeout_minutes": 10, **given})
    fit_collectives(args, given)
    assert args.distributed_timeout_minutes == minutes
    said = capsys.readouterr()
    assert ("is not above --rank-timeout 30" in said.out + said.err) is warned

"""Exits of Megatron: an exit without a request is an error with one message, which gives the remedy."""

from __future__ import annotations

import os
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from megatron_lrpath.errors import TrainingStoppedError, UserError
from megatron_lrpath.launch.runner import how_to_go_on
from megatron_lrpath.runs import failure
from megatron_lrpath.training.exits import Exits, reason_of
from megatron_lrpath.training.guards import peers
from tests.support.training_fixtures import make_plan, train
from tests.training.test_training_branch import refusal
from tests.training.test_training_rates import words_without_plan


def raised_in(module: str, name: str, code: Any, exit: Any = None) -> SystemExit:
    """Return the exit that a function of a module raises."""

    def leave() -> None:
        exit(code) if exit else (_ for _ in ()).throw(SystemExit(code))

    def direct() -> None:
        raise SystemExit(code)

    template = leave if exit else direct
    called = FunctionType(
        template.__code__.replace(co_name=name), {"__name__": module, "SystemExit": SystemExit}, name, (),
        template.__closure__,
    )  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        called()
    return caught.value


@pytest.mark.parametrize(
    ("module", "name", "exit", "unasked"),
    [
        ("megatron.training.checkpointing", "load_checkpoint", None, True),
        ("megatron.training.arguments", "validate_args", exit, True),
        ("megatron.training.global_vars", "_graceful_shutdown", None, False),
        ("megatron_lrpath.training.loop", "carry_out", None, False),
        ("teams_script", "forward_step", exit, False),
    ],
)
def test_only_megatrons_own_exits_are_errors(module: str, name: str, exit: Any, unasked: bool) -> None:
    error = raised_in(module, name, 0, exit)
    exits = Exits()
    assert (exits.unasked(error) is not None) == unasked
    exits.asked = True
    assert exits.unasked(error) is None


@pytest.mark.parametrize(
    ("code", "kind", "status", "said"),
    [
        (None, UserError, 2, "no rng. Calling again without a change"),
        (0, UserError, 2, "no rng. Calling again without a change"),
        (1, UserError, 2, "no rng."),
        ("bad name", UserError, 2, "bad name. Calling again without a change"),
        (16, TrainingStoppedError, 1, "Call again to continue"),
        (17, TrainingStoppedError, 1, "Call again to continue"),
    ],
)
def test_an_exit_has_one_message_and_a_status(code: Any, kind: type, status: int, said: str) -> None:
    error, found = reason_of(
        SystemExit(code), "megatron.x, line 1", "no rng.\n".rstrip("\n.") if code != 1 else "no rng"
    )
    assert isinstance(error, kind)
    assert found == status
    assert said in str(error)


def test_a_parent_that_cannot_be_loaded_whole_is_refused_by_all_ranks(tmp_path: Path) -> None:
    make_plan(tmp_path, (6,))
    argv = [*words_without_plan(tmp_path / "plan.yaml", tmp_path), "--lr", "0.01"]
    plain = ["--train-iters", "3", "--lr-decay-style", "constant", "--save"]
    train([*argv, *plain, str(tmp_path / "whole")]).ok()
    train([*argv, *plain, str(tmp_path / "weights"), "--no-save-optim"]).ok()
    for ranks in (1, 2):
        outcome = train(branch(argv, tmp_path, "whole"), ranks, probe="no_random_states")
        assert outcome.status == [2] * ranks, outcome.output[-3000:]
        message = outcome.output.partition("lrpath: error: ")[2]
        assert "Unable to load rng state" in message
        assert "Calling again without a change" in message
        assert message.count("lrpath: error") == 0
    assert "without the optimizer's state" in refusal(branch(argv, tmp_path, "weights"))
    other = ["--optimizer", "adam", "--adam-beta2", "0.9"]
    train([*branch(argv, tmp_path, "whole"), *other]).ok()


def branch(argv: list[str], folder: Path, parent: str) -> list[str]:
    """Return the command line of a branch off a run in `folder`."""
    start = [
        "--lr-path-parent",
        str(folder / parent),
        "--lr-path-parent-step",
        "3",
        "--lr-path-decay-iters",
        "2",
    ]
    return [*argv, "--lr-path", "branch", *start, "--save", str(folder / f"off-{parent}")]


@pytest.mark.parametrize(
    ("error", "step", "helps"),
    [
        (TypeError("'NoneType' object is not callable"), None, False),
        (ImportError("no package"), None, False),
        (AssertionError(), None, False),
        (RuntimeError("CUDA error: out of memory"), None, None),
        (OSError(5, "Input/output error"), None, None),
        (KeyError("x"), 7, None),
        (TrainingStoppedError("short", calling_again_helps=True), 7, True),
        (UserError("bad"), None, False),
    ],
)
def test_a_failure_reports_whether_calling_again_can_help(
    error: Exception, step: int | None, helps: bool | None
) -> None:
    assert failure.of_error(error, step).calling_again_helps is helps


class Task:
    """Task with only what the runner's message reads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder


@pytest.mark.parametrize(
    ("helps", "status", "advice"),
    [
        (False, 1, "without a change"),
        (None, 1, "continue from"),
        (True, 1, "continue from"),
        (None, 2, "without a change"),
    ],
)
def test_the_runner_advises_what_can_help(
    tmp_path: Path, helps: bool | None, status: int, advice: str
) -> None:
    failure.write(tmp_path / "error.json", failure.here(failure.STOPPED, "x", calling_again_helps=helps))
    assert advice in how_to_go_on(Task(tmp_path), status)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "said"), [(TypeError("x"), peers.NO_USE), (RuntimeError("x"), peers.HOW_TO_GO_ON)]
)
def test_a_rank_that_ends_reports_whether_calling_again_can_help(
    error: Exception, said: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = peers.PeerWatch(peers.Ranks(0, 1, None))
    monkeypatch.setattr(peers, "leave_at_once", lambda status: (_ for _ in ()).throw(SystemExit(status)))
    with pytest.raises(SystemExit):
        watch.report_error(error)
    assert said in capfd.readouterr().err
    assert os.getpid() == watch.peers[0].pid

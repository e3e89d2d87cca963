"""How commands end: one exit status per situation, whether to call again, and the next step."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_lrpath.cli import build_parser, main
from megatron_lrpath.commands import COMMANDS
from megatron_lrpath.commands import eval as evaluation
from megatron_lrpath.commands import export as exporting
from megatron_lrpath.plan import Plan
from tests.support import report_tree, years_tree
from tests.support.training_fixtures import make_plan

PLAN = "PLAN"
CALLS: dict[str, list[str]] = {
    "adopt": [PLAN, "--checkpoint", "old", "--step", "4"],
    "archive": [PLAN],
    "audition": [PLAN, "--slices", "v2", "v3"],
    "budget": [PLAN],
    "cancel": [PLAN],
    "advise": [PLAN],
    "chat": [PLAN],
    "compare-starts": [PLAN, "--step", "4", "--steps", "2", "--start", "other"],
    "doctor": [PLAN],
    "eval": [PLAN],
    "experiment": [PLAN],
    "export": [PLAN],
    "generate": [PLAN, "a text"],
    "lr": [PLAN, "--run", "main"],
    "merge": [PLAN, "--version", "v1"],
    "plan": [PLAN],
    "probe": [PLAN],
    "prune": [PLAN],
    "report": [PLAN],
    "rewind": [PLAN],
    "run": [PLAN],
    "sft": [PLAN],
    "status": [PLAN],
    "submit": [PLAN],
    "trace": [PLAN, "--document", "data/text:1"],
    "update": [PLAN, "--source", "new"],
}
"""Calls of every command that takes a plan."""
OTHERS = {"init", "check-args", "samples", "docs", "completion"}
OTHERS |= {"trace", "archive", "adopt", "compare-starts", "probe", "audition"}


def call(name: str, plan: Path | str, argv: list[str]) -> int:
    return main([name, *(str(plan) if word == PLAN else word for word in argv)])


def test_every_command_is_in_these_tables() -> None:
    assert {*CALLS, *OTHERS} == set(COMMANDS)


@pytest.mark.parametrize("name", CALLS)
def test_a_plan_that_is_not_there(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "nowhere.yaml"
    assert call(name, missing, CALLS[name]) == 2
    heard = capsys.readouterr()
    assert f"lrpath: error: {missing}: no such plan file" in heard.err
    assert heard.out == ""


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("eval", [PLAN]),
        ("eval", [PLAN, "--run", "branch-v1"]),
        ("eval", [PLAN, "--main-path"]),
        ("export", [PLAN]),
        ("export", [PLAN, "--run", "branch-v1"]),
        ("generate", [PLAN, "a text"]),
        ("chat", [PLAN]),
        ("report", [PLAN]),
        ("prune", [PLAN]),
        ("rewind", [PLAN]),
        ("advise", [PLAN]),
    ],
)
def test_nothing_is_trained(
    name: str, argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(tmp_path, (4,))
    assert call(name, plan, argv) == 2
    said = capsys.readouterr().err
    assert "lrpath run" in said or "lrpath sft" in said


@pytest.mark.parametrize(
    "argv",
    [
        ["lr"],
        ["run"],
        ["submit"],
        ["cancel"],
        ["eval"],
        ["generate", "a text"],
        ["chat"],
        ["export"],
        ["sft"],
    ],
    ids=" ".join,
)
def test_a_run_that_the_plan_does_not_have(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(tmp_path, (4,))
    own = ["--gpus-per-node", "1"] if argv == ["submit"] else []
    assert main([argv[0], str(plan), *argv[1:], *own, "--run", "brunch-v1"]) == 2
    assert "has no run 'brunch-v1' (did you mean 'branch-v1'?)" in capsys.readouterr().err


def test_export_passes_over_what_is_exported_already(
    trained: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [run for run in trained.runs("ours") if run.makes_version]
    monkeypatch.setattr(exporting, "chosen", lambda *_: runs)
    monkeypatch.setattr(exporting, "find_checkpoint", lambda *_: (runs[0].last_step, Path("checkpoint")))
    monkeypatch.setattr("megatron_lrpath.export.folder.is_export_of", lambda *_: True)
    monkeypatch.setattr("megatron_lrpath.data.record.require_tokenizer", lambda *_: None)
    assert main(["export", str(trained.path)]) == 0
    assert capsys.readouterr().out.count("already (--force exports it again") == len(runs)


@pytest.mark.parametrize("name", ["eval", "export", "generate", "chat", "report", "prune", "rewind"])
def test_from_another_folder(
    name: str, trained: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = trained.path.parent
    text = trained.path.read_text().replace(f"{home}/", "")
    (home / "relative.yaml").write_text(text)
    (home / "elsewhere").mkdir(exist_ok=True)
    monkeypatch.chdir(home / "elsewhere")
    assert call(name, "../relative.yaml", CALLS[name]) == 2
    assert f"so call it in {home}" in capsys.readouterr().err
    assert main(["status", "../relative.yaml"]) == 0
    assert ending(capsys).endswith(f"so call it in {home}.")


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plan]:
    return years_tree.again_and_again(years_tree.make_tree, tmp_path_factory.mktemp("endings"))


@pytest.fixture
def trained(trees: Iterator[Plan]) -> Plan:
    return next(trees)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Return a plan that is trained and evaluated."""
    plan = report_tree.write_plan(tmp_path_factory.mktemp("measured"), steps=600)
    report_tree.write_tree(plan)
    return plan


def ending(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the next step from the last line of the output; the commands in it must parse."""
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("next: "), last
    text = last.removeprefix("next: ")
    for command in re.findall(r"lrpath (.+?)(?=, or |, then |   \(|\)| continues|$)", text):
        build_parser().parse_args(shlex.split(command))
    return text


@pytest.mark.parametrize(
    ("argv", "following"),
    [
        (["plan", PLAN, "--no-curves"], "lrpath eval PLAN"),
        (["status", PLAN], "lrpath eval PLAN"),
        (["status", PLAN, "--paradigm", "ptfs"], "lrpath run PLAN --paradigm ptfs   (on a cluster: "),
        (["prune", PLAN], "lrpath prune PLAN --yes"),
        (["prune", PLAN, "--keep-ends"], "lrpath prune PLAN --keep-ends --yes"),
        (["prune", PLAN, "--yes"], "lrpath eval PLAN"),
        (["rewind", PLAN], "lrpath eval PLAN"),
        (["rewind", PLAN, "--to-step", "40", "--dry-run"], "the same command without --dry-run"),
        (["budget", PLAN, "--gpus-per-node", "1"], "lrpath submit PLAN --gpu-memory 40 --nodes 1 "),
        (["submit", PLAN, "--gpus-per-node", "1", "--dry-run"], "the same command without --dry-run"),
        (["cancel", PLAN], "lrpath status PLAN"),
        (["report", PLAN], "lrpath eval PLAN"),
    ],
    ids=lambda argv: " ".join(argv) if isinstance(argv, list) else "",
)  # fmt: skip
def test_a_trained_plan(
    argv: list[str], following: str, trained: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(argv[0], trained.path, argv[1:]) == 0
    assert ending(capsys).startswith(following.replace(PLAN, str(trained.path)))


def test_a_plan_that_is_reported(measured: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    last = f"lrpath export {measured.path}, or new data: lrpath update {measured.path} --source PREFIX"
    assert main(["status", str(measured.path)]) == 0
    assert ending(capsys) == f"lrpath report {measured.path}"
    for argv in (["report"], ["status"]):
        assert main([argv[0], str(measured.path)]) == 0
        assert ending(capsys) == last, argv


@pytest.mark.parametrize(
    ("failed", "status", "again"),
    [(2, 2, "calling again without a change would fail in the same way"), (-9, 1, "call the same command again")],
)  # fmt: skip
def test_an_evaluation_that_fails_reports_whether_calling_again_helps(
    measured: Plan,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failed: int,
    status: int,
    again: str,
) -> None:
    monkeypatch.setattr(
        evaluation.subprocess, "run", lambda *_, **__: type("Ended", (), {"returncode": failed})
    )
    monkeypatch.setattr("megatron_lrpath.data.record.require_tokenizer", lambda *_: None)
    assert main(["eval", str(measured.path), "--force"]) == status
    assert again in capsys.readouterr().err

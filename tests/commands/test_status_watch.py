"""`lrpath status --watch` on a terminal and elsewhere: it follows the files and ends when all is complete."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_lrpath.cli import main
from megatron_lrpath.commands import status
from megatron_lrpath.plan import Plan
from tests.commands.test_status import trained
from tests.support.launch_fixtures import write_plan


def finish(plan: Plan) -> None:
    """Mark the main path complete."""
    result = {"step": plan.run("ours", "main").last_step}
    (Path(plan.output) / "ours/main/result.json").write_text(json.dumps(result))


@pytest.fixture
def finished_at_the_third_look(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command see the main path complete at its third look."""
    looks = []
    collect = status.collect

    def look(*args: Any) -> dict[str, Any]:
        looks.append(args)
        if len(looks) == 3:
            finish(plan)
        return collect(*args)

    monkeypatch.setattr(status, "collect", look)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Return a plan of one version; its branch is complete, and its main path lacks only the result."""
    plan = write_plan(tmp_path, 1)
    main, branch = plan.run("ours", "main"), plan.run("ours", "branch-v1")
    trained(plan, "ours/main", 0, main.last_step, mfu=0.412)
    folder = trained(plan, "ours/branch-v1", branch.first_step, branch.last_step)
    (folder / "result.json").write_text(json.dumps({"step": branch.last_step}))
    return plan


@pytest.mark.usefixtures("finished_at_the_third_look")
def test_without_a_terminal_only_changes_are_printed(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(plan.path), "--paradigm", "ours", "--watch", "0.1"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("tokens/s") == 2  # the table's heading: before the change and after it
    assert "41.2%" in shown


@pytest.mark.usefixtures("finished_at_the_third_look")
def test_as_json_a_line_for_each_change(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(plan.path), "--paradigm", "ours", "--watch", "0.1", "--json"]) == 0
    first, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert {row["state"] for row in last["runs"]} == {"done"}
    row = first["runs"][0]
    assert row["state"] in ("running", "interrupted")
    assert row["tokens_per_second"] == pytest.approx(plan.batch.tokens / 2.0)
    assert row["mfu"] == 0.412


def test_a_terminal_is_redrawn_in_place_until_all_is_done(plan: Plan) -> None:
    ours, theirs = pty.openpty()
    argv = ["status", plan.path, "--paradigm", "ours", "--watch", "0.1"]
    command = [sys.executable, "-m", "megatron_lrpath.cli", *map(str, argv)]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "150", "LINES": "30"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown, finished = b"", False

    def read() -> bytes:
        if select.select([ours], [], [], 240)[0]:
            return os.read(ours, 65536)
        process.kill()  # it redraws no more
        return b""

    try:
        while part := read():
            shown += part
            if not finished and shown.count(b"branch-v1") > 3:
                finish(plan)
                finished = True
    except OSError:  # the terminal is closed when the command ends
        pass
    assert finished
    os.close(ours)
    assert process.wait(timeout=240) == 0
    assert b"\x1b[1A" in shown  # moves up to overwrite the earlier lines
    assert shown.rstrip().count(b"interrupted") + shown.count(b"running") > 1


@pytest.mark.parametrize("word", ["0", "x", "-1"])
def test_seconds_that_make_no_sense(plan: Plan, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["status", str(plan.path), f"--watch={word}"])
    assert "not a number of seconds" in capsys.readouterr().err

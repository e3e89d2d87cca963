"""The documents as a site: every link and anchor leads somewhere, every command is in the reference."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lrpath.cli import main
from megatron_lrpath.commands import COMMANDS
from megatron_lrpath.shipped import documents
from tests.support import ROOT


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    commands = (tmp_path / "site" / "commands.html").read_text(encoding="utf-8")
    assert all(f'id="lrpath-{name}"' in commands for name in COMMANDS)


@pytest.mark.parametrize("name", documents())
def test_every_page_is_shown_in_the_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["docs", name]) == 0
    assert len(capsys.readouterr().out) > 500


def test_the_list_names_every_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["docs"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(documents())
    assert listed[0] == "index"


def test_a_page_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["docs", "plan-fiel"]) == 2
    assert "did you mean plan-file" in capsys.readouterr().err.replace("'", "")

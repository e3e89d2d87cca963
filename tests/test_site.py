"""The documents as a site: every link and anchor exists, every command is in the reference."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from megatron_lrpath.cli import main
from megatron_lrpath.commands import COMMANDS
from megatron_lrpath.shipped import documents
from tests.support import ROOT


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    argv = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
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


QUOTED = re.compile(r"^\| `(.+?)`[^|]*\|", re.MULTILINE)


def message_parts() -> Iterator[str]:
    """Yield the fixed parts of the messages in docs/failures.md: the text between the ellipses."""
    for message in QUOTED.findall((ROOT / "docs/failures.md").read_text(encoding="utf-8")):
        for part in message.split("…"):
            if len(part.split()) > 1 and "FILE" not in part:
                yield part.strip(" ,(")


@pytest.mark.parametrize("part", sorted(set(message_parts())))
def test_every_message_in_the_table_is_one_of_the_code(part: str) -> None:
    assert any(part in text for text in literals()), part


@cache
def literals() -> tuple[str, ...]:
    """Return the string literals of the package; those of an f-string in one piece, its values as `…`."""
    found: list[str] = []
    for path in sorted((ROOT / "megatron_lrpath").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(one.value if isinstance(one, ast.Constant) else "…" for one in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)

"""What commands print on a terminal of 80 columns: nothing wider, nothing cut off, tables of one style."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
OTHER_STYLES = re.compile(r"[┏┃│━]|\w…")


def require_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the output be a terminal of 80 columns."""
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "80", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)


def check_80_columns(shown: str, folder: Path, drawn: str = "") -> str:
    """The output without colours; fails at a wider line, except for lines to copy and lines with the test's `folder`.

    `drawn` are characters of lines that the output may have.
    """
    text = ESCAPES.sub("", shown)
    lines = [line.rstrip() for line in text.splitlines() if not line.startswith(("next: ", "# sbatch"))]
    assert not [line for line in lines if len(line) > 80 and str(folder) not in line]
    assert not [line for line in lines if (found := OTHER_STYLES.search(line)) and found[0] not in drawn]
    return text

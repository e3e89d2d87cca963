"""Check the output of commands on a terminal of 80 columns: width, nothing cut off, one table style."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
OTHER_STYLES = re.compile(r"[┏┃│━]|\w…")


def require_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the output a terminal of 80 columns."""
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "80", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)


def check_80_columns(shown: str, folder: Path, drawn: str = "") -> str:
    """Return the output without colors; fail at a line that is too wide or of another table style.

    Lines to copy and lines with the test's `folder` may be wider. `drawn` are the allowed line characters.
    """
    text = ESCAPES.sub("", shown)
    lines = [line.rstrip() for line in text.splitlines() if not line.startswith(("next: ", "# sbatch"))]
    assert not [line for line in lines if len(line) > 80 and str(folder) not in line]
    assert not [line for line in lines if any(found not in drawn for found in OTHER_STYLES.findall(line))]
    return text

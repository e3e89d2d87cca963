"""A team's own pretrain script, and how tests run it."""

from __future__ import annotations

import os
import re
import runpy
import sys
from pathlib import Path

from tests.support import ROOT

GUIDE = ROOT / "docs" / "coming-from-megatron.md"


def guide_hunks() -> list[tuple[str, str]]:
    """Return (old, new) text of every hunk of the guide's diff."""
    diff = re.search(r"```diff\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert diff
    hunks = [hunk.strip("\n").split("\n") for hunk in diff.group(1).split("@@\n")]
    old = ["\n".join(line[1:] for line in hunk if line[:1] != "+") for hunk in hunks]
    new = ["\n".join(line[1:] for line in hunk if line[:1] != "-") for hunk in hunks]
    return list(zip(old, new, strict=True))


def changed_script(source: Path) -> str:
    """Return the text of a stock script with the guide's diff applied; each hunk must fit exactly once."""
    text = source.read_text(encoding="utf-8")
    for old, new in guide_hunks():
        assert text.count(old + "\n") == 1, f"{source}: {old!r} stands there {text.count(old)} times"
        text = text.replace(old, new)
    return text


def main(argv: list[str]) -> None:
    """Run the script `argv[0]` with the other arguments, as `python SCRIPT …` does."""
    script, *rest = argv
    sys.argv = [script, *rest]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")

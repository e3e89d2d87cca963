"""Commands that need a trained version end with status 2 and say what to do where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lrpath.cli import main
from tests.support.training_fixtures import make_plan


@pytest.mark.parametrize(
    "words",
    [
        ["eval"],
        ["eval", "--run", "branch-v1"],
        ["eval", "--main-path"],
        ["export"],
        ["export", "--run", "branch-v1"],
        ["generate", "a text"],
        ["chat"],
    ],
    ids=" ".join,
)
def test_nothing_is_trained(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(tmp_path, (4,))
    assert main([words[0], str(plan), *words[1:]]) == 2
    said = capsys.readouterr().err
    assert "lrpath run" in said or "lrpath sft" in said

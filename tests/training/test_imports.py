"""Imports at the start of a training, and imports left to features that need them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lrpath.training.pretrain import asks_for_wandb
from tests.support import ROOT

START = """
import sys
from megatron_lrpath.training import pretrain
from megatron_lrpath.training.exits import Exits
from megatron_lrpath.training.exits import Signals
pretrain.open_session(["--device", "cpu"], Exits(), Signals())
assert "megatron.training" in sys.modules
print(*({"wandb", "transformers"} & set(sys.modules)))
import wandb
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_a_start_imports_neither_wandb_nor_transformers_and_can_import_them_later():
    answer = subprocess.run([sys.executable, "-c", START], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == ""


def test_wandb_is_asked_for_on_the_command_line_or_in_the_plan(tmp_path: Path):
    plan = tmp_path / "plan.yaml"
    assert not asks_for_wandb(["--device", "cpu"], plan)
    plan.write_text("megatron: {lr_warmup: 1}\n")
    assert not asks_for_wandb([], plan)
    assert asks_for_wandb(["--wandb-project", "x"], plan)
    plan.write_text("megatron: {wandb_project: mine}\n")
    assert asks_for_wandb([], plan)

"""torchrun starts ranks again itself (`--max-restarts`, elastic `--nnodes`): each step is trained once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ports import free_ports
from tests.support.training_fixtures import history, make_plan, run_words

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("elastic", [False, True], ids=["one host", "one to two hosts"])
def test_a_killed_rank_is_started_again_and_each_step_is_trained_once(tmp_path: Path, elastic: bool) -> None:
    plan = make_plan(tmp_path, (6, 6))
    hosts = ["--standalone"]
    if elastic:
        hosts = ["--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-conf", "last_call_timeout=1"]
        hosts += ["--rdzv-endpoint", f"127.0.0.1:{free_ports(1)[0]}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *hosts, "--max-restarts", "1"]
    argv = run_words(plan, "ours", "main", "--save-interval", "2")
    entry = ["--nproc-per-node", "2", "-m", "--", "tests.support.killed_once", str(tmp_path / "killed"), "5"]
    done = subprocess.run(
        [*launcher, *entry, *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "killed").exists()
    main = tmp_path / "runs/ours/main"
    assert [line["step"] for line in history(main)] == list(range(1, 10))
    starts = json.loads((main / "lineage.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 4]

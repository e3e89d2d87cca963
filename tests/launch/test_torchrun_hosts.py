"""Several hosts without Slurm: torchrun on two hosts with separate addresses, in network namespaces."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.states import states
from tests.support.training_fixtures import make_plan, run_words, train

pytestmark = pytest.mark.slow
ADDRESSES = ("10.213.77.1", "10.213.77.2")


@pytest.fixture
def hosts():
    """Yield the names of two network namespaces, joined by a veth pair named `cable` at both ends."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2's `ip`")
    names = [f"lrpath-{os.getpid()}-{number}" for number in (1, 2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def ip(*argv: str) -> None:
    subprocess.run(["ip", *argv], check=True, capture_output=True, text=True)


def test_two_hosts_train_as_one_machine_does(hosts, tmp_path):
    plan = make_plan(tmp_path, (8,))
    started = [start(host, rank, plan) for rank, host in enumerate(hosts)]
    outputs = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)[-4000:]
    here = make_plan(tmp_path, (8,), output=str(tmp_path / "here"))
    train(run_words(here, "ours", "main"), nproc=2).ok()
    folders = [tmp_path / output / "ours/main/checkpoints/iter_0000004" for output in ("runs", "here")]
    apart, together = states(*folders)
    assert apart == together


def start(host: str, rank: int, plan: Path) -> subprocess.Popen[str]:
    """Start torchrun as documented, on one of the hosts."""
    launcher = ["--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1"]
    launcher += ["--master-addr", ADDRESSES[0], "--master-port", "29577"]
    argv = ["--plan", str(plan), "--paradigm", "ours", "--run-name", "main", "--device", "cpu"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *launcher,
        str(ROOT / "pretrain_gpt.py"),
        *argv,
    ]
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": "cable",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

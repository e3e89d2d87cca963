"""A user of the cluster: a folder with a plan, and `lrpath` called in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from megatron_lrpath.data.record import write_record
from megatron_lrpath.tokenizers.prints import TokenizerSpec
from tests.support.data_fixtures import make_lengths_dataset, make_slice
from tests.support.slurm_cluster.cluster import Cluster, NoSlurmError, running_cluster

ROOT = Path(__file__).resolve().parents[3]
FAKE = Path(__file__).with_name("fake_python")
PLAN = """\
name: small
seed: 1
model: tiny
schedule: {{style: cosine, max_lr: 1.0e-3, min_lr: 1.0e-4, warmup_steps: 2}}
alpha: 0.5
paradigms: [ours, ptfs, cpt]
batch: {{global_batch_size: 8, micro_batch_size: 2, seq_length: 32}}
tokenizer: {{type: NullTokenizer, vocab_size: 100}}
data: {{slices: data/slices, valid: data/slices/valid}}
versions: {versions}
output: {output}
megatron: {{save-interval: {interval}}}
"""


@dataclass
class Site:
    """The folder of the plan. `variables` are in every job's environment, `options` in every submission."""

    cluster: Cluster
    folder: Path
    variables: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()

    @property
    def plan(self) -> Path:
        """Path of the plan file."""
        return self.folder / "plan.yaml"

    def write_plan(self, *steps: int, output: str = "runs", interval: int = 1000) -> None:
        """Write a plan with versions of these steps and slice files for it."""
        versions = ", ".join(
            f"{{name: v{number}, steps: {count}}}" for number, count in enumerate(steps, start=1)
        )
        text = PLAN.format(versions=f"[{versions}]", output=json.dumps(output), interval=interval)
        self.plan.write_text(text)
        for name in [*(f"v{number}" for number in range(1, len(steps) + 1)), "valid"]:
            file = self.folder / "data" / "slices" / f"{name}.slice"
            if not file.exists():
                write_slice(file)

    def lrpath(self, *argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Call the command in the folder."""
        environment = self.cluster.environment | {"PYTHONPATH": str(ROOT)} | self.variables | variables
        command = [sys.executable, "-m", "megatron_lrpath.cli", *argv]
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=240
        )

    def submit(self, *argv: str, **variables: str) -> dict[str, dict[str, Any]]:
        """Run `lrpath submit`; return its jobs by key."""
        answer = self.lrpath("submit", "plan.yaml", "--json", *self.options, *argv, **variables)
        assert answer.returncode == 0, answer.stderr
        return {job["key"]: job for job in json.loads(answer.stdout)["jobs"]}

    def all_status(self) -> dict[str, Any]:
        """Return the output of `lrpath status --json`."""
        answer = self.lrpath("status", "plan.yaml", "--json")
        assert answer.returncode == 0, answer.stderr
        found: dict[str, Any] = json.loads(answer.stdout)
        return found

    def status(self) -> dict[str, dict[str, Any]]:
        """Return the runs of `lrpath status` by `paradigm/run`."""
        return {f"{row['paradigm']}/{row['run']}": row for row in self.all_status()["runs"]}

    def run_folder(self, key: str) -> Path:
        """Return the folder of `paradigm/run`."""
        return self.folder / "runs" / key

    def steps(self, key: str) -> list[int]:
        """Return the steps in the run's history."""
        return [row["step"] for row in read_lines(self.run_folder(key) / "history.jsonl")]

    def starts(self, key: str) -> list[dict[str, Any]]:
        """Return the recorded starts of a run by the stand-in, an entry per rank."""
        return read_lines(self.run_folder(key) / "starts")

    def go_on(self, key: str) -> None:
        """Let a stand-in continue that is holding."""
        (self.run_folder(key) / "go-on").touch()

    def finish(self, number: int, seconds: float = 90) -> dict[str, str]:
        """Wait until the job is completed."""
        return self.cluster.wait(number, "COMPLETED", seconds=seconds)


def write_slice(file: Path) -> None:
    """Write a slice, and its dataset without real tokens, for ten thousand steps."""
    prefix = make_lengths_dataset(
        file.parent.with_name(f"{file.stem}_text_document"), [10_000] * 257, mark=crc32(file.stem.encode())
    )
    write_record(prefix, "tests", TokenizerSpec("NullTokenizer", vocab_size=100).facts, {})
    file.parent.mkdir(parents=True, exist_ok=True)
    make_slice(file, [(prefix, range(257), "prose")])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file, one per line; none if the file does not exist yet."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def cluster_or_skip() -> Cluster:
    """Return the cluster, or skip the test with the reason."""
    try:
        return running_cluster()
    except NoSlurmError as error:
        pytest.skip(str(error))


def fake_site(folder: Path, name: str = "work", processes: int = 1) -> Site:
    """Return a site whose trainings only pretend to train, on two nodes with `processes` each."""
    cluster = cluster_or_skip()
    home = folder / name
    if home.exists():
        shutil.rmtree(home)
    home.mkdir(parents=True)
    options = ["--gpus-per-node", "0", "--tasks-per-node", str(processes), "--nodes", "2"]
    options += ["--cpus-per-task", "1", "--preflight", "no", "--python", str(FAKE), "--paradigm", "ours"]
    variables = {"FAKE_PYTHON": sys.executable, "PATH": os.environ["PATH"]}
    return Site(cluster, home, variables, tuple(options))

"""Real trainings with the stand-in for Transformer Engine: in another process with its own fork server.

Megatron decides at its import which libraries exist, so the tests' own fork server cannot serve both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.support import ROOT
from tests.support.training_fixtures import Outcome, launch

STAND_IN = Path(__file__).parent / "engine"
TRAINING = "megatron_lrpath.training.pretrain:main"
READY = "stand-in: "  # prefix of an answer, among the output of libraries


class Engine:
    """The process that starts trainings with the stand-in; a poisoned checkpoint creates the file `trap`."""

    def __init__(self, process: subprocess.Popen[str], trap: Path) -> None:
        self.process, self.trap = process, trap

    def launch(
        self, argv: list[str], entry: str = TRAINING, nproc: int = 1, probe: str = "engine"
    ) -> Outcome:
        """Launch in that process, as `training_fixtures.launch` does."""
        given = {"entry": entry, "argv": argv, "nproc": nproc, "probe": probe}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(given) + "\n")
        self.process.stdin.flush()
        answer = next(line for line in self.process.stdout if line.startswith(READY))
        return Outcome(**json.loads(answer.removeprefix(READY)))


@contextmanager
def engine_process(folder: Path) -> Iterator[Engine]:
    """Start the process and end it with the block; `folder` has the trap."""
    trap = folder / "executed"
    path = os.pathsep.join([str(STAND_IN), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "STAND_IN_TRAP": str(trap)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.engine_fixtures"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        yield Engine(process, trap)
        process.communicate()  # closes its input, which ends it


def serve() -> None:
    """Run the launch in each line of the input, and print its outcome."""
    for line in sys.stdin:
        outcome = launch(**json.loads(line))
        print(READY + json.dumps(asdict(outcome)), flush=True)


if __name__ == "__main__":
    serve()

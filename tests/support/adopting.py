"""Run `lrpath` commands in one forked process that has imported Megatron, and return statuses and output."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def call(folder: Path, *calls: list[str]) -> tuple[list[int], str]:
    """Call `lrpath` with each of these argument lists in one process; return the statuses and all output."""
    from tests.support.training_fixtures import launch

    asked, answer = folder / "calls.json", folder / "statuses.json"
    asked.write_text(json.dumps(calls))
    output = launch("tests.support.adopting:main", [str(asked), str(answer)]).ok().output
    return json.loads(answer.read_text()), output


def main(argv: list[str]) -> None:
    """Call `lrpath` with each argument list in the JSON file `argv[0]`; write the statuses to `argv[1]`."""
    from megatron_lrpath.cli import main as call

    statuses = []
    for one in json.loads(Path(argv[0]).read_text()):
        print(f"== {' '.join(one)}", flush=True)
        statuses.append(call(one))
        sys.stdout.flush()
        sys.stderr.flush()
    Path(argv[1]).write_text(json.dumps(statuses))

"""`lrpath` calls in one forked process that has imported Megatron: their statuses and what they print."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def call(folder: Path, *calls: list[str]) -> tuple[list[int], str]:
    """Call `lrpath` with each of these words in one process: the statuses, and all output."""
    from tests.support.training_fixtures import launch

    asked, answer = folder / "calls.json", folder / "statuses.json"
    asked.write_text(json.dumps(calls))
    output = launch("tests.support.adopting:main", [str(asked), str(answer)]).ok().output
    return json.loads(answer.read_text()), output


def main(words: list[str]) -> None:
    """Call `lrpath` with each list of words in the JSON file `words[0]`; the statuses go to `words[1]`."""
    from megatron_lrpath.cli import main as call

    statuses = []
    for one in json.loads(Path(words[0]).read_text()):
        print(f"== {' '.join(one)}", flush=True)
        statuses.append(call(one))
        sys.stdout.flush()
        sys.stderr.flush()
    Path(words[1]).write_text(json.dumps(statuses))

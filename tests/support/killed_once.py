"""The entry point, whose last rank kills itself once, after a step.

`python -m tests.support.killed_once MARKER STEP ARGUMENTS…`: the file MARKER records the kill.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from megatron_lrpath.runs.history import HistoryWriter


def main() -> None:
    """Train, and kill this rank after the step if it has not been killed before."""
    marker, last, arguments = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    append = HistoryWriter.append

    def append_and_die(self: HistoryWriter, row: dict[str, Any]) -> None:
        append(self, row)
        if row["step"] == last and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    HistoryWriter.append = append_and_die  # type: ignore[method-assign]
    from megatron_lrpath.training.pretrain import main as train  # it installs signal handlers

    sys.argv[1:] = arguments
    train(arguments)


if __name__ == "__main__":
    main()

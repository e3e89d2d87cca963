"""A rank that ends as its argument requests: `python -m tests.support.ends RANK0 RANK1 …`.

`ok`; `raise:TEXT` (RuntimeError); `complain:TEXT` (records that exception and continues); `user:TEXT` (bad
input, status 2); `exit:N`; `kill:N` (by signal N); `wait:FILE` (writes FILE, continues until SIGUSR2, records
it there, then exits with status 75). A rank whose end begins with `late ` ends last.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from megatron_lrpath.errors import UserError
from megatron_lrpath.runs import failure


def main(argv: Sequence[str]) -> None:
    """End this rank as its argument requests."""
    how = argv[int(os.environ.get("RANK", "0"))]
    if how.startswith("late "):
        time.sleep(1.0)
        how = how.removeprefix("late ")
    kind, _, value = how.partition(":")
    if kind == "raise":
        raise RuntimeError(value)
    if kind == "complain":
        failure.record_error(RuntimeError(value))
        time.sleep(100)
    if kind == "user":
        failure.record_error(UserError(value))
        os._exit(2)
    if kind == "exit":
        os._exit(int(value))
    if kind == "kill":
        os.kill(os.getpid(), int(value))
        time.sleep(10)
    if kind == "wait":
        wait(Path(value))


def wait(file: Path) -> None:
    """Wait for SIGUSR2, record it in `file` and exit with status 75."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    signal.signal(signal.SIGUSR2, note)
    file.write_text(str(os.getpid()))
    while not received:
        time.sleep(0.02)
    time.sleep(0.5)
    file.write_text(f"{len(received)} signals")
    os._exit(75)


if __name__ == "__main__":
    with failure.recorded():
        main(sys.argv[1:])

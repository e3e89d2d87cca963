"""Wait for other processes."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(
    true: Callable[[], object],
    seconds: float = 20.0,
    about: Callable[[], str] = lambda: "",
    pause: float = 0.02,
) -> None:
    """Wait until `true()` is true; fail with `about()` after `seconds` of pauses.

    Pauses are counted instead of clock time: while a machine is suspended the clock advances, and the other
    process does not.
    """
    for _ in range(round(seconds / pause)):
        if true():
            return
        time.sleep(pause)
    assert true(), f"still not so after {seconds} s of waiting: {about()}"

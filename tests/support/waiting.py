"""Waiting for what other processes do."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(
    true: Callable[[], object],
    seconds: float = 20.0,
    about: Callable[[], str] = lambda: "",
    pause: float = 0.02,
) -> None:
    """Wait until `true()` is; an assertion with `about()` after `seconds` of pauses.

    Pauses are counted instead of clock time: while a whole machine is stopped the clock advances, and the
    process that is waited for does not.
    """
    for _ in range(round(seconds / pause)):
        if true():
            return
        time.sleep(pause)
    assert true(), f"still not so after {seconds} s of waiting: {about()}"

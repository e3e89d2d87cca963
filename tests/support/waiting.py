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

    Pauses are counted, not the clock read: where a whole machine stands still for a while the clock goes on, and what
    is waited for does not.
    """
    for _ in range(round(seconds / pause)):
        if true():
            return
        time.sleep(pause)
    assert true(), f"still not so after {seconds} s of waiting: {about()}"

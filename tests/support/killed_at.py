"""A command of `lrpath` that is killed (SIGKILL) just before its n-th change on disk, in a forked process."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "shutil.copyfile")


def is_change(event: str, arguments: tuple[Any, ...]) -> bool:
    """Return whether an audit event is a change on disk."""
    return event in CHANGES


def killed_at(
    number: int, argv: Sequence[str], counts: Callable[[str, tuple[Any, ...]], bool] = is_change
) -> bool:
    """Call `lrpath`; return True if it was killed before change `number` (from 1), False if it ended with 0.

    `counts` names the audit events that are counted instead of changes.
    """
    from megatron_lrpath.cli import main

    return dies_at(number, lambda: main(list(argv)), counts)


def dies_at(
    number: int, work: Callable[[], int], counts: Callable[[str, tuple[Any, ...]], bool] = is_change
) -> bool:
    """Call any work that returns 0, and kill it in the same way."""
    child = os.fork()
    if child == 0:
        _call_and_die(number, work, counts)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def _call_and_die(
    number: int, work: Callable[[], int], counts: Callable[[str, tuple[Any, ...]], bool]
) -> None:
    seen = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if counts(event, arguments):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    signal.alarm(900)  # a fork that hangs fails its test and does not block it
    status = 70
    try:
        sys.addaudithook(count)
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)

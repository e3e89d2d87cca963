"""A command of `lrpath` that is killed (SIGKILL) just before its n-th change on disk, in a forked process."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "shutil.copyfile")


def killed_at(number: int, words: Sequence[str]) -> bool:
    """Call `lrpath WORDS`; whether it was killed before its change `number` (from 1), else it has ended with 0."""
    from megatron_lrpath.cli import main

    return dies_at(number, lambda: main(list(words)))


def dies_at(number: int, work: Callable[[], int]) -> bool:
    """The same of any work, which returns 0."""
    child = os.fork()
    if child == 0:
        _call_and_die(number, work)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def _call_and_die(number: int, work: Callable[[], int]) -> None:
    seen = 0

    def count(event: str, _: object) -> None:
        nonlocal seen
        if event in CHANGES:
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    status = 70
    try:
        sys.addaudithook(count)
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)

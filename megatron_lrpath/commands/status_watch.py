"""`lrpath status --watch`: the same view again and again, in place on a terminal, on every change elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.live import Live

from megatron_lrpath.commands.status import view

Status = dict[str, Any]


def watch(console: Console, collect: Callable[[], Status], seconds: float, as_json: bool = False) -> None:
    """Show what `collect` gives every `seconds` until all runs are done; Ctrl-C ends it, too.

    Where the output is no terminal, or as JSON (a line each), only what has changed is printed.
    """
    if as_json or not console.is_terminal:
        before = None
        for status in statuses(collect, seconds):
            if told(status) != before:
                print_one(console, status, as_json)
            before = told(status)
        return
    with Live(console=console, auto_refresh=False) as live:
        for status in statuses(collect, seconds):
            live.update(view(status), refresh=True)


def statuses(collect: Callable[[], Status], seconds: float) -> Iterator[Status]:
    """The status now and every `seconds`, the last one when all is done."""
    while True:
        status = collect()
        yield status
        if all(row["state"] == "done" for row in status["runs"]):
            return
        time.sleep(seconds)


def told(status: Status) -> list[tuple[object, ...]]:
    """What makes a status worth another print: states and steps, not paces."""
    return [(row["key"], row["state"], row["step"]) for row in status["runs"]]


def print_one(console: Console, status: Status, as_json: bool) -> None:
    """Print a status whole."""
    if as_json:
        print(json.dumps(status, allow_nan=False), flush=True)
    else:
        console.print(view(status), soft_wrap=True)

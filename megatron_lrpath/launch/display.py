"""The console output of a running plan: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Column, Table

from megatron_lrpath.errors import FULL
from megatron_lrpath.wording import clock

NARROW = 100  # columns, below which the bars are shorter to leave space for a run's numbers
PLAIN_SECONDS = 10.0  # between plain lines at first; later a hundredth of the remaining time
PLAIN_SECONDS_MOST = 600.0


@dataclass(frozen=True)
class RunLine:
    """One active run: the current step, first and last step, and loss, rate and pace as text."""

    key: str
    step: int
    first_step: int
    last_step: int
    numbers: str


@dataclass(frozen=True)
class PlanProgress:
    """The progress of the whole plan: steps of all runs, done and in total, and seconds left (None: unknown)."""

    name: str
    done: int
    total: int
    seconds_left: float | None
    runs: Sequence[RunLine]


class PlainDisplay:
    """Periodic lines without control codes, for files, pipes and CI. Events are permanent lines."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def event(self, text: str) -> None:
        """Print a line; errors of a full disk are ignored, so that they do not end trainings."""
        try:
            self._console.out(text)
        except OSError as error:
            if error.errno not in FULL:
                raise

    def update(self, snapshot: PlanProgress) -> None:
        """Print the progress of the plan, unless the last line is recent."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + min(PLAIN_SECONDS_MOST, max(PLAIN_SECONDS, (snapshot.seconds_left or 0.0) / 100))
        left = f", {clock(snapshot.seconds_left)} left" if snapshot.seconds_left is not None else ""
        runs = [f"{run.key} {run.step}/{run.last_step} {run.numbers}".rstrip() for run in snapshot.runs]
        self.event("; ".join([f"{snapshot.name}: {snapshot.done}/{snapshot.total} steps{left}", *runs]))


class LiveDisplay(PlainDisplay):
    """A bar for the whole plan and a line for every active run, redrawn in place."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._live = Live(console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.update("")
        self._live.stop()

    def event(self, text: str) -> None:
        """Print above the live view."""
        self._console.print(escape(text), soft_wrap=True)

    def update(self, snapshot: PlanProgress) -> None:
        """Redraw the bar of the plan and the lines of the runs."""
        whole = Table.grid(padding=(0, 1))
        left = f"{clock(snapshot.seconds_left)} left" if snapshot.seconds_left is not None else ""
        bar = ProgressBar(total=max(1, snapshot.total), completed=snapshot.done, width=30)
        whole.add_row(escape(snapshot.name), bar, f"{snapshot.done}/{snapshot.total} steps", left)
        lines = Table.grid(*(Column(no_wrap=True) for _ in range(4)), padding=(0, 1))
        width = 8 if self._console.width < NARROW else 16
        for run in snapshot.runs:
            length = max(1, run.last_step - run.first_step)
            bar = ProgressBar(total=length, completed=run.step - run.first_step, width=width)
            lines.add_row(f"  {escape(run.key)}", bar, f"{run.step}/{run.last_step}", run.numbers)
        self._live.update(Group(whole, lines))


def open_display() -> PlainDisplay:
    """Return a live view if the console is a terminal, else plain lines."""
    console = Console(highlight=False)
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)

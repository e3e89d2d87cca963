"""What the console shows while a plan is carried out: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from megatron_lrpath.errors import FULL
from megatron_lrpath.wording import clock

PLAIN_SECONDS = 10.0  # between plain lines at the beginning; a hundredth of the time left later on
PLAIN_SECONDS_MOST = 600.0


@dataclass(frozen=True)
class RunLine:
    """One run under way: the step reached, first and last step, and the last logged loss and rate."""

    key: str
    step: int
    first_step: int
    last_step: int
    loss: float | None = None
    lr: float | None = None
    seconds_per_step: float | None = None
    training: bool = False  # False while the process starts or loads

    def numbers(self) -> str:
        """Loss, rate and pace as text; `starting` before the first step of this process."""
        if not self.training:
            return "starting"
        parts = [f"loss {self.loss:.4f}"] if self.loss is not None else []
        parts += [f"rate {self.lr:.3e}"] if self.lr is not None else []
        parts += [f"{self.seconds_per_step:.3g} s/step"] if self.seconds_per_step else []
        return "  ".join(parts)


@dataclass(frozen=True)
class PlanProgress:
    """The whole plan at one moment: steps of all runs done and in total, seconds left (None: not known)."""

    name: str
    done: int
    total: int
    seconds_left: float | None
    runs: Sequence[RunLine]


class Display(Protocol):
    """Where progress is shown. Events are single lines that stay."""

    def event(self, text: str) -> None:
        """Show a line that stays."""

    def update(self, snapshot: PlanProgress) -> None:
        """Show how far the plan has come now."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_display(console: Console | None = None) -> Display:
    """A live view where the console is a terminal, plain lines where it is not."""
    console = console or Console(highlight=False)
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)


class LiveDisplay:
    """A bar for the whole plan and a line for every run that is under way, redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.update("")
        self._live.stop()

    def event(self, text: str) -> None:
        """Print above the live view."""
        self._console.print(escape(text), soft_wrap=True)

    def update(self, snapshot: PlanProgress) -> None:
        """Redraw."""
        whole = Table.grid(padding=(0, 1))
        left = f"{clock(snapshot.seconds_left)} left" if snapshot.seconds_left is not None else ""
        bar = ProgressBar(total=max(1, snapshot.total), completed=snapshot.done, width=30)
        whole.add_row(escape(snapshot.name), bar, f"{snapshot.done}/{snapshot.total} steps", left)
        lines = Table.grid(padding=(0, 1))
        for run in snapshot.runs:
            length = max(1, run.last_step - run.first_step)
            bar = ProgressBar(total=length, completed=run.step - run.first_step, width=16)
            lines.add_row(f"  {escape(run.key)}", bar, f"{run.step}/{run.last_step}", run.numbers())
        self._live.update(Group(whole, lines))


class PlainDisplay:
    """A line now and then, without control codes: for files, pipes and CI."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def event(self, text: str) -> None:
        """Print a line."""
        self._print(text)

    def update(self, snapshot: PlanProgress) -> None:
        """Print a line if the last one is long enough ago."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + min(PLAIN_SECONDS_MOST, max(PLAIN_SECONDS, (snapshot.seconds_left or 0.0) / 100))
        self._print(plain_line(snapshot))

    def _print(self, text: str) -> None:
        """Print, unless the output is a file on a full disk: trainings do not end for their progress line."""
        try:
            self._console.out(text)
        except OSError as error:
            if error.errno not in FULL:
                raise


def plain_line(snapshot: PlanProgress) -> str:
    """The snapshot as one line of text."""
    left = f", {clock(snapshot.seconds_left)} left" if snapshot.seconds_left is not None else ""
    runs = [f"{run.key} {run.step}/{run.last_step} {run.numbers()}".rstrip() for run in snapshot.runs]
    return "; ".join([f"{snapshot.name}: {snapshot.done}/{snapshot.total} steps{left}", *runs])

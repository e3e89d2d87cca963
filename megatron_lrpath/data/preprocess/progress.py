"""Progress in bytes with the time left on a terminal, now and then a line elsewhere, figures at the end."""

from __future__ import annotations

import sys
import time
from typing import Any

LINE_SECONDS = 10.0


class Progress:
    """Shows how far a run is, on standard error.

    `total`: bytes of input, None when unknown; `log_interval`: documents between two lines where standard
    error is no terminal (and at most one line in ten seconds).
    """

    def __init__(self, total: int | None, log_interval: int) -> None:
        self.total = total
        self.log_interval = log_interval
        self.started = time.monotonic()
        self._last_line = self.started
        self._last_documents = 0
        self._bar: Any = _terminal_bar(total) if sys.stderr.isatty() else None

    def note(self, text: str) -> None:
        """Say something that the user should know."""
        if self._bar:
            self._bar.console.print(text, style="yellow")
        else:
            print(text, file=sys.stderr)

    def update(self, position: int, documents: int, tokens: int) -> None:
        """`position`: bytes of input done; `documents` and `tokens` so far."""
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=position, tokens=f"{tokens:,} tokens")
            return
        now = time.monotonic()
        if now - self._last_line < LINE_SECONDS or documents - self._last_documents < self.log_interval:
            return
        self._last_line, self._last_documents = now, documents
        elapsed = now - self.started
        left = ""
        if self.total and position:
            left = (
                f", {100 * position / self.total:.0f} %, {elapsed * (self.total / position - 1):.0f} s left"
            )
        rate = position / elapsed / 1e6
        print(f"{documents:,} documents, {tokens:,} tokens, {rate:.1f} MB/s{left}", file=sys.stderr)

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def finish(self, documents: int, tokens: int, text_bytes: int, rejected: int) -> None:
        """The closing figures."""
        self.stop()
        seconds = time.monotonic() - self.started
        print(
            f"{documents:,} documents, {tokens:,} tokens, {text_bytes / max(tokens, 1):.2f} bytes per token, "
            f"{text_bytes / 1e6 / max(seconds, 1e-9):.1f} MB/s, {seconds:.1f} s"
            + (f"; {rejected:,} rejected" if rejected else ""),
            file=sys.stderr,
        )


def _terminal_bar(total: int | None) -> Any:
    from rich import progress
    from rich.console import Console

    bar = progress.Progress(
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[tokens]}"),
        console=Console(stderr=True),
        transient=True,
    )
    bar.add_task("", total=total, tokens="")
    bar.start()
    return bar

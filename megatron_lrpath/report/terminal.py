"""The report's main points in the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from megatron_lrpath.report.page import Report
from megatron_lrpath.report.tables import Table

COLOURS = {"good": "green", "bad": "bold red", "none": "yellow"}


def show(report: Report, page: Path, console: Console) -> None:
    """Print the main table, the check of the learning rates, what is missing and where the page lies."""
    console.print(rich_table(report.results))
    for note in report.results.notes[1:]:
        console.print(Text(note, style="dim"))
    if report.downstream:
        console.print(rich_table(report.downstream))
    if report.result:
        console.print(Text(report.result))
    check = report.rate_check
    console.print(Text(check.headline, style=COLOURS[check.level]))
    if check.level == "bad":
        for line in check.details:
            console.print(Text(line, style="red"))
    for gap in report.gaps:
        console.print(Text(gap.text + (f" Next: {gap.command}" if gap.command else ""), style="yellow"))
    console.print(Text(f"Report: {page}"), soft_wrap=True)


def rich_table(table: Table) -> RichTable:
    """The table for a terminal; cells are plain text, never markup."""
    drawn = RichTable(header_style="bold", pad_edge=False)
    for index, title in enumerate(table.header):
        drawn.add_column(Text(title), justify="left" if index < table.left else "right")
    for row in table.rows:
        drawn.add_row(*(Text(cell.text, style="bold" if cell.best else "") for cell in row))
    return drawn

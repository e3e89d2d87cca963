"""What processes print: messages on the error stream, tables, a script's error as one line; no library warnings."""

from __future__ import annotations

import logging
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from megatron_lrpath.errors import UserError, may_pass, told
from megatron_lrpath.exits import BAD_INPUT, FAILED, INTERRUPTED

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def say(text: str) -> None:
    """Print `text`."""
    print(text, file=sys.stderr, flush=True)


def say_next(text: str) -> None:
    """Print the command that comes next: the last line on the standard output of a command that is done."""
    print(f"next: {text}", flush=True)


def warn(text: object) -> None:
    """Print `text` as a warning: the training goes on."""
    say(f"lrpath: WARNING: {text}")


def say_error(text: object) -> None:
    """Print `text` as what ended the run."""
    say(f"lrpath: error: {text}")


def quiet() -> None:
    """Silence warnings of imports (what is not installed) and Megatron's account of what it opens."""
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    logging.getLogger("megatron").setLevel(logging.WARNING)


def terminal_table(
    titles: Sequence[str], align: str, rows: Iterable[Sequence[str | Text]] = (), **look: Any
) -> Table:
    """A table for a terminal; strings are shown as they are, never read as rich's markup.

    `align` has a letter for each column: `l` or `r`, a capital where its cells must not be wrapped. `look` are
    options of `rich.table.Table`; without them all tables look alike: bold titles, no lines.
    """
    from rich.table import Table
    from rich.text import Text

    options: dict[str, Any] = {
        "box": None,
        "header_style": "bold",
        "pad_edge": False,
        "title_style": "bold",
    } | look
    drawn = Table(**options)
    for title, letter in zip(titles, align, strict=True):
        justify: Any = "right" if letter in "rR" else "left"
        drawn.add_column(Text(title), justify=justify, no_wrap=letter.isupper())
    for row in rows:
        drawn.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return drawn


def run_script(main: Callable[[], int]) -> int:
    """The exit status of `main`, with user errors and interruptions turned into one line each."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left under a final name", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return FAILED if may_pass(error) else BAD_INPUT


def run_tool(parser: ArgumentParser, action: Callable[[Namespace], int], argv: Sequence[str] | None) -> int:
    """The exit status of `action` with the arguments `argv` (None: the command line's), see `run_script`."""
    args = parser.parse_args(argv)
    return run_script(lambda: action(args))

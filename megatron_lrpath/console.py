"""Output of the processes: messages on the error stream, tables, one-line errors of scripts; no library
warnings.
"""

from __future__ import annotations

import logging
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_lrpath.errors import UserError, is_transient, message_of
from megatron_lrpath.exits import BAD_INPUT, FAILED, INTERRUPTED
from megatron_lrpath.wording import nearest

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

TABLE_WIDTH = 160  # columns of a table in a file or a pipe


def say(text: str) -> None:
    """Print `text`."""
    print(text, file=sys.stderr, flush=True)


def say_next(text: str) -> None:
    """Print the next command: the last line on the standard output of a completed command."""
    print(f"next: {text}", flush=True)


def warn(text: object) -> None:
    """Print `text` as a warning; the training continues."""
    say(f"lrpath: WARNING: {text}")


def say_error(text: object) -> None:
    """Print `text` as the reason why the run ended."""
    say(f"lrpath: error: {text}")


def quiet() -> None:
    """Silence import warnings about packages that are not installed, and Megatron's messages about opened
    files.
    """
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    logging.getLogger("megatron").setLevel(logging.WARNING)


def table_console(stderr: bool = False) -> Console:
    """Return a console for tables: as wide as the terminal; in a file or a pipe, `TABLE_WIDTH`, or COLUMNS if more."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, TABLE_WIDTH)
    return console


def terminal_table(
    titles: Sequence[str], align: str, rows: Iterable[Sequence[str | Text]] = (), **look: Any
) -> Table:
    """Return a table for a terminal; strings are printed unchanged, without rich's markup.

    `align` has a letter for each column: `l` or `r`, in upper case if its cells must not be wrapped.
    `look` are options of `rich.table.Table`; the default is bold titles without lines.
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
    """Return the exit status of `main`; report user errors and interrupts in one line each."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left under a final name", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        return FAILED if is_transient(error) else BAD_INPUT


class ToolParser(ArgumentParser):
    """The arguments of a script in `tools/`: an error is one line, without the list of all options."""

    def error(self, message: str) -> NoReturn:
        """Print the message and the call that lists the arguments, and exit with 2."""
        self.exit(BAD_INPUT, f"error: {message}; python {sys.argv[0]} --help lists the arguments\n")


def unknown_arguments(parser: ArgumentParser, words: Sequence[str]) -> str:
    """Return the message about arguments that a parser does not have; the first has a hint."""
    options = [option for action in parser._actions for option in action.option_strings]
    hint = nearest(words[0].partition("=")[0], options) if words[0].startswith("-") else ""
    return f"unrecognized arguments: {' '.join(words)}{hint}"


def run_tool(parser: ArgumentParser, action: Callable[[Namespace], int], argv: Sequence[str] | None) -> int:
    """Return the exit status of `action` with the arguments `argv` (None: the command line's), see
    `run_script`.
    """
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(unknown_arguments(parser, unknown))
    return run_script(lambda: action(args))

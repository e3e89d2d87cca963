"""What processes print: messages on the error stream, library warnings silenced, a script's error as one line."""

from __future__ import annotations

import logging
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence

from megatron_lrpath.errors import UserError


def say(text: str) -> None:
    """Print `text`."""
    print(text, file=sys.stderr, flush=True)


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


def run_script(main: Callable[[], int]) -> int:
    """The exit status of `main`, with user errors and interruptions turned into one line each."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left under a final name", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"error: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        return 2


def run_tool(parser: ArgumentParser, action: Callable[[Namespace], int], argv: Sequence[str] | None) -> int:
    """The exit status of `action` with the arguments `argv` (None: the command line's), see `run_script`."""
    args = parser.parse_args(argv)
    return run_script(lambda: action(args))

"""The command `lrpath`: find the subcommand, run it, and report errors in one line."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from megatron_lrpath import __version__
from megatron_lrpath.commands import COMMANDS, completion
from megatron_lrpath.console import say_error, unknown_arguments
from megatron_lrpath.errors import UserError, is_transient, message_of
from megatron_lrpath.exits import BAD_INPUT, FAILED, INTERRUPTED, PIPE_CLOSED
from megatron_lrpath.wording import nearest


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lrpath` with these arguments (default: the process's own) and return the exit status.

    The status is 0 or the status that the command returns; 2 for bad input (`lrpath: error: …` on stderr);
    130 after an interrupt.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # replace what the encoding lacks, do not raise
            stream.reconfigure(errors="replace")
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:
        completion.complete(parser)
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)  # argparse confuses the two sides of `--`
    command = next((word for word in argv[:cut] if not word.startswith("-")), None)
    if command is not None and command not in COMMANDS:
        parser.error(
            f"there is no command {command!r}{nearest(command, COMMANDS)}; `lrpath --help` lists them"
        )
    args, unknown = parser.parse_known_args(argv[:cut])
    if unknown:
        asked = getattr(args, "parser", parser)
        asked.error(unknown_arguments(asked, unknown))
    args.extra = argv[cut + 1 :]
    if args.extra and not getattr(args, "takes_extra", False):
        parser.error(f"unrecognized arguments: {' '.join(argv[cut:])}")
    if args.command is None:
        parser.print_help()
        return BAD_INPUT
    try:
        status = int(args.execute(args))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader (`| head`) closed the pipe; without this the interpreter prints another error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except UserError as error:
        say_error(error)
        return BAD_INPUT
    except OSError as error:
        say_error(message_of(error))
        return FAILED if is_transient(error) else BAD_INPUT
    except KeyboardInterrupt:
        print("lrpath: interrupted", file=sys.stderr)
        return INTERRUPTED


class Parser(argparse.ArgumentParser):
    """An argument parser whose error messages do not repeat secrets."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit with 2."""
        from megatron_lrpath.plan.secrets import hide_message  # imported here to shorten the start-up

        super().error(hide_message(message))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every command of `COMMANDS`."""
    parser = Parser(
        prog="lrpath",
        description="Version updates of language models by learning-rate path switching, on Megatron-Core.",
        epilog="`lrpath COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"lrpath {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name in COMMANDS:
        module = importlib.import_module(f"megatron_lrpath.commands.{name.replace('-', '_')}")
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP[0].upper() + module.HELP[1:] + ".",
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(
            execute=module.execute, takes_extra=getattr(module, "TAKES_EXTRA", False), parser=command
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""`lrpath completion`: shell completion of commands, files, runs and versions."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lrpath.errors import UserError
from megatron_lrpath.paradigms import PARADIGMS

if TYPE_CHECKING:
    from megatron_lrpath.plan import Plan

Completer = Callable[..., list[str]]


def complete(parser: argparse.ArgumentParser) -> None:
    """Print the completions of the shell's current word, and end the process (see
    `argcomplete.autocomplete`).
    """
    import argcomplete
    from argcomplete.completers import FilesCompleter

    completers: dict[str, Completer] = {"run": run_names, "version": version_names}
    holders = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    commands = [command for holder in holders for command in holder.choices.values()]
    for action in (action for command in commands for action in command._actions):
        if action.dest in completers and action.option_strings:
            action.completer = completers[action.dest]  # type: ignore[attr-defined]
        elif action.dest in ("plan", "others", "experiment", "source"):
            action.completer = FilesCompleter(("yaml", "yml"))  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options=False)


def run_names(parsed_args: argparse.Namespace, **_: object) -> list[str]:
    """Return the runs of the plan on the command line, of its --paradigm if given."""
    paradigm = getattr(parsed_args, "paradigm", None)
    paradigms = (paradigm,) if paradigm in PARADIGMS else PARADIGMS
    return names_in(parsed_args, lambda plan: [run.name for name in paradigms for run in plan.runs(name)])


def version_names(parsed_args: argparse.Namespace, **_: object) -> list[str]:
    """Return the versions of that plan."""
    return names_in(parsed_args, lambda plan: [version.name for version in plan.versions])


def names_in(parsed_args: argparse.Namespace, names: Callable[[Plan], list[str]]) -> list[str]:
    """Return the `names` of the plan on the command line without duplicates; none if it cannot be read."""
    from megatron_lrpath.plan import load_plan

    path = getattr(parsed_args, "plan", None) or getattr(parsed_args, "source", None) or "."
    try:
        return list(dict.fromkeys(names(load_plan(Path(path)))))
    except (UserError, OSError):
        return []


HELP = "print the shell code that completes commands, options, files and names of runs"
EXAMPLE = """lrpath completion bash >> ~/.bash_completion      (then open a new shell)
  lrpath completion zsh  >> ~/.zshrc
  lrpath completion fish  > ~/.config/fish/completions/lrpath.fish"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the shell."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell to complete in")


def execute(args: argparse.Namespace) -> int:
    """Print the code; return 0."""
    import argcomplete

    print(argcomplete.shellcode(["lrpath"], shell=args.shell))
    return 0

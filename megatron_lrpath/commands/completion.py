"""`lrpath completion`: shell completion of commands, files, runs and versions."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

Completer = Callable[..., list[str]]


def complete(parser: argparse.ArgumentParser) -> None:
    """Print what completes the shell's word, and end the process (see `argcomplete.autocomplete`)."""
    import argcomplete
    from argcomplete.completers import FilesCompleter

    completers: dict[str, Completer] = {"run": run_names, "version": version_names}
    for command in commands(parser):
        for action in command._actions:
            if action.dest in completers and action.option_strings:
                action.completer = completers[action.dest]  # type: ignore[attr-defined]
            elif action.dest in ("plan", "others", "experiment", "source"):
                action.completer = FilesCompleter(("yaml", "yml"))  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options=False)


def commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of the subcommands."""
    holders = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return [command for holder in holders for command in holder.choices.values()]


def run_names(parsed_args: argparse.Namespace, **_: object) -> list[str]:
    """The runs of the plan that stands on the line already; none where it cannot be read."""
    from megatron_lrpath.errors import UserError
    from megatron_lrpath.plan import PARADIGMS, load_plan

    paradigm = getattr(parsed_args, "paradigm", None)
    try:
        plan = load_plan(named_plan(parsed_args))
    except (UserError, OSError):
        return []
    paradigms = (paradigm,) if paradigm in PARADIGMS else PARADIGMS
    return list(dict.fromkeys(run.name for name in paradigms for run in plan.runs(name)))


def version_names(parsed_args: argparse.Namespace, **_: object) -> list[str]:
    """The versions of that plan."""
    from megatron_lrpath.errors import UserError
    from megatron_lrpath.plan import load_plan

    try:
        return [version.name for version in load_plan(named_plan(parsed_args)).versions]
    except (UserError, OSError):
        return []


def named_plan(parsed_args: argparse.Namespace) -> Path:
    """The plan file among the words so far."""
    return Path(getattr(parsed_args, "plan", None) or getattr(parsed_args, "source", None) or ".")


HELP = "print the shell code that completes commands, options, files and names of runs"
EXAMPLE = """lrpath completion bash >> ~/.bash_completion      (then open a new shell)
  lrpath completion zsh  >> ~/.zshrc
  lrpath completion fish  > ~/.config/fish/completions/lrpath.fish"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shell."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell to complete in")


def execute(args: argparse.Namespace) -> int:
    """Print the code; 0."""
    import argcomplete

    print(argcomplete.shellcode(["lrpath"], shell=args.shell))
    return 0

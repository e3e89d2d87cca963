"""`lrpath completion`: what a shell needs to complete lrpath's words."""

from __future__ import annotations

import argparse

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

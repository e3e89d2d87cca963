"""`lrpath chat`: a conversation with a fine-tuned version, or with several of them at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_lrpath.commands.generate import (
    add_models,
    add_sampling,
    ignore,
    opened,
    sampling_of,
    show_piece,
    side_by_side,
)
from megatron_lrpath.commands.options import add_plan
from megatron_lrpath.console import say, say_error
from megatron_lrpath.errors import UserError

if TYPE_CHECKING:
    from megatron_lrpath.evaluate.generation import Conversation, Sampling

HELP = "chat with a fine-tuned version; input from a pipe is read line by line"
EXAMPLE = "lrpath chat plan.yaml --run sft-v3 --temperature 0"
ANEW = "/new"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plan, the model, and the sampling settings."""
    add_plan(parser)
    add_models(parser, "default: the newest fine-tuned version", "the fine-tuned versions")
    parser.add_argument("--system", default="", metavar="TEXT", help="the system message (default: none)")
    add_sampling(parser, 300)


def execute(args: argparse.Namespace) -> int:
    """Answer until the input ends (Ctrl-D); return 0."""
    from megatron_lrpath.evaluate.generation import Conversation

    models, sampling = opened(args, tuned=True), sampling_of(args)
    talks = {name: Conversation(writer, args.system) for name, writer in models}
    say(f"{', '.join(talks)}: {ANEW} starts a new conversation, Ctrl-D ends")
    for line in lines():
        if line == ANEW:
            for talk in talks.values():
                talk.messages.clear()
            continue
        try:
            answer(talks, line, sampling)
        except UserError as error:  # refuses this message; the conversation continues
            say_error(error)
    return 0


def answer(talks: dict[str, Conversation], line: str, sampling: Sampling) -> None:
    """Print the answer to one message as it is generated, or the answers of several models side by side."""
    if len(talks) > 1:
        side_by_side({name: talk.answer(line, sampling, ignore) for name, talk in talks.items()})
        return
    (talk,) = talks.values()
    talk.answer(line, sampling, show_piece)
    print()


def lines() -> Iterator[str]:
    """Yield the user's messages, without empty lines."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            print(file=sys.stderr)
            return
        if line:
            yield line

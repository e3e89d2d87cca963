"""`lrpath check-args`: how the arguments of a Megatron launch line map to a plan or to --lr-path."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lrpath.console import terminal_table
from megatron_lrpath.errors import UserError, cause
from megatron_lrpath.exits import BAD_INPUT

if TYPE_CHECKING:
    from megatron_lrpath.plan.launch_line import Given

HELP = "check the Megatron arguments of a launch line: which stay, which map to a plan key, which are refused"
EXAMPLE = "lrpath check-args -- torchrun --nproc-per-node 8 pretrain_gpt.py --num-layers 24 --lr 3e-4"
TAKES_EXTRA = True
WAYS = {"plan": "plan", "lr-path": "path"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the source of the arguments, and the way to describe a run."""
    parser.add_argument(
        "--script", type=Path, metavar="FILE", help="a launch script that has them, instead of words after --"
    )
    parser.add_argument(
        "--for", dest="way", choices=WAYS, default="plan", help="under a plan (default), or under --lr-path"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def execute(args: argparse.Namespace) -> int:
    """Print the treatment of each argument; return 2 if some are refused, else 0."""
    from megatron_lrpath.plan.companions import missing_companions

    given, way = read(args), WAYS[args.way]
    values = {one.argument.name: " ".join(one.values) or True for one in given if one.argument is not None}
    idle = missing_companions(values)
    entries = [entry(one, way, idle) for one in given]
    if args.json:
        print(json.dumps(entries, indent=2, ensure_ascii=False))
    else:
        show(entries)
    return BAD_INPUT if any(one["class"] == "refused" for one in entries) else 0


def read(args: argparse.Namespace) -> list[Given]:
    """Return the options after `--`, or in the script.

    Raises:
        UserError: neither is given, or the script cannot be read.
    """
    from megatron_lrpath.plan.launch_line import read_script, read_words

    if args.script is None and not args.extra:
        raise UserError("which arguments? lrpath check-args -- ARGUMENTS, or --script FILE")
    if args.script is None:
        return read_words(args.extra)
    try:
        return read_script(args.script.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise UserError(f"{args.script}: cannot be read: {cause(error)}") from None


def entry(one: Given, way: str, idle: Mapping[str, str]) -> dict[str, str]:
    """Return an argument as an entry of the list; a value that the parser rejects, and an argument without
    effect (`idle`), count as refused.
    """
    wrong = one.problem() or (idle.get(one.argument.name) if one.argument else None)
    if wrong:
        return {"argument": one.text, "class": "refused", "meaning": wrong}
    return {"argument": one.text, "class": one.class_for(way), "meaning": one.meaning(way)}


def show(entries: list[dict[str, str]]) -> None:
    """Print the entries as a table, those that need a change first."""
    from rich.console import Console

    order = ("refused", "unknown", "set", "identity", "neutral", "start")
    rows = sorted(entries, key=lambda one: order.index(one["class"]))
    columns = (tuple(one[name] for name in ("class", "argument", "meaning")) for one in rows)
    Console().print(terminal_table(("", "argument", "what becomes of it"), "Lll", columns))

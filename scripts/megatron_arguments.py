"""Write what the installed Megatron's parser and ours take, for checks without torch; list what has no class yet.

    .venv/bin/python scripts/megatron_arguments.py [--check]

writes megatron_lrpath/plan/megatron_parser.json (one line for each argument); with --check its exit status only
reports whether the file is up to date. The classes are in
megatron_lrpath/plan/megatron_arguments.toml and are written by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from enum import Enum
from typing import Any

from megatron_lrpath.plan.arguments import PARSER_FILE, parser_facts, table
from megatron_lrpath.training import machine
from megatron_lrpath.training.options.arguments import full_parser

TYPES = {int: "int", float: "float"}


def fact(action: argparse.Action) -> dict[str, Any]:
    """Return the parser's properties of an argument; types of Megatron's own are `text`."""
    found: dict[str, Any] = {
        "name": action.dest,
        "options": [option.removeprefix("--") for option in action.option_strings],
    }
    if action.nargs == 0:
        return found | {"type": "flag"}
    choices = list(action.choices or [])
    kind = TYPES.get(action.type, "text")  # type: ignore[call-overload]
    found |= {"type": kind}
    if action.nargs is not None:
        found["nargs"] = action.nargs
    if choices:
        found["choices"] = [one.name if isinstance(one, Enum) else one for one in choices]
    return found


def facts() -> list[dict[str, Any]]:
    """Return the properties of each argument of `pretrain_gpt.py`, by name, without --help."""
    machine.activate("cpu")
    found = [fact(action) for action in full_parser()._actions if action.dest != "help"]
    return sorted(found, key=lambda one: (one["name"], one["options"]))


def text() -> str:
    """Return the file's content."""
    return "[\n" + ",\n".join(json.dumps(one) for one in facts()) + "\n]\n"


def main() -> int:
    """Write the file and print arguments that the table lacks or has too many; with --check only compare."""
    parser = argparse.ArgumentParser(description="Write what the installed Megatron's parser and ours take.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; status 1 where the file is out of date"
    )
    if parser.parse_args().check:
        current = PARSER_FILE.read_text(encoding="utf-8") == text()
        print(f"{PARSER_FILE}: {'up to date' if current else 'out of date; run this script without --check'}")
        return 0 if current else 1
    PARSER_FILE.write_text(text(), encoding="utf-8")
    known, classes = {one["name"] for one in parser_facts()}, table()
    for name in sorted(known - classes.keys()):
        print(f"without a class: {name}")
    for name in sorted(classes.keys() - known):
        print(f"unknown to the parser: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

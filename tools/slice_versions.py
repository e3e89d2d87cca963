#!/usr/bin/env python3
"""Draw version slices out of indexed datasets: by tokens, without replacement, in a mixture's proportions.

Existing slices of the output folder are read, never changed, and never drawn from again.

  slice_versions.py --source data/web_text_document:0.7:web --source data/books_text_document:0.3:books \\
      --versions 4 --tokens-per-version 10.5e9 --valid-tokens 20e6 --seed 1234 --output data/slices
  slice_versions.py --source data/web-2025_text_document --append --output data/slices    # all that is new, as v5
  slice_versions.py --documents v1=data/web_text_document:0-50000 \\
      --documents valid=data/web_text_document:50000- --output data/slices
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

LIST: dict[str, Any] = {"action": "append", "default": []}
OPTIONS: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    (
        "--source",
        "PREFIX[:WEIGHT[:DOMAIN]]",
        LIST,
        "an indexed dataset (without .bin), its weight in the mixture (none: in proportion to the tokens not "
        "yet drawn; left empty in PREFIX::DOMAIN) and the domain it counts as (none: its name); may be "
        "repeated. Read from the right; a dataset whose name itself holds colons is found if it is there",
    ),
    ("--versions", "N", {"type": int}, "how many versions to draw"),
    (
        "--tokens-per-version",
        "TOKENS",
        {"nargs": "+", "default": []},
        "tokens of every version, or one number each: 10500000000, 10.5e9 or 10.5B",
    ),
    ("--valid-tokens", "TOKENS", {}, "also draw a validation slice, called valid, before the versions"),
    ("--names", "NAME,NAME,...", {}, "the versions' names (default: v1, v2, ...)"),
    (
        "--documents",
        "VERSION=PREFIX:FROM-TO",
        LIST,
        "put these documents (from 0; TO not included, or empty for all) into a version; may be repeated",
    ),
    (
        "--seq-length",
        "TOKENS",
        {"type": int},
        "draw up to a sample more per source, so that a version yields as many samples of this length as its "
        "tokens stand for (samples do not cross from one source into another)",
    ),
    ("--seed", "SEED", {"type": int, "default": 1234}, "what decides the draw (default: 1234)"),
    ("--output", "FOLDER", {"type": Path, "required": True}, "folder of the slices"),
)
APPEND = """go on behind the versions that exist; without --tokens-per-version the new version (or
--versions N equal ones) takes everything of the sources that no slice has"""


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, metavar, options, explanation in OPTIONS:
        parser.add_argument(name, metavar=metavar, help=explanation, **options)
    parser.add_argument("--append", action="store_true", help=APPEND)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main() -> int:
    """Run the tool; 0, or 2 for bad input."""
    args = build_parser().parse_args()
    from megatron_lrpath.console import run_script
    from megatron_lrpath.data.slice_tools import slice_versions

    return run_script(lambda: slice_versions(args))


if __name__ == "__main__":
    sys.exit(main())

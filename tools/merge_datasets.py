#!/usr/bin/env python3
"""Put indexed datasets (.bin and .idx) of one type together into one, in the order given.

A folder stands for all datasets in it by name. Every part is checked before anything is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_lrpath.console import run_tool


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PREFIX|FOLDER",
        help="datasets by their path without .bin and .idx, or folders of datasets",
    )
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX.bin and PREFIX.idx")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


def merge(args: argparse.Namespace) -> int:
    """Merge and report."""
    from megatron_lrpath.data.preprocess.writer import merge_datasets

    pair = merge_datasets(args.input, args.output_prefix, args.overwrite)
    print(
        f"{args.output_prefix}: {pair.documents:,} documents, {pair.tokens:,} tokens of "
        f"{pair.dtype.itemsize} bytes",
        file=sys.stderr,
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; 0, or 2 for bad input."""
    return run_tool(build_parser(), merge, argv)


if __name__ == "__main__":
    sys.exit(main())

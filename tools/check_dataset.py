#!/usr/bin/env python3
"""Check indexed datasets (.bin and .idx): format, lengths, offsets, sizes, token ids; print their figures.

Exits with 2 when one of them is missing, truncated, swapped, foreign or damaged, and says which and how.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from megatron_lrpath.console import run_tool
from megatron_lrpath.data.indexed import PairReport, check_pair, strip_ending
from megatron_lrpath.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prefix", nargs="+", help="a dataset, by its path without .bin or .idx (or with)")
    parser.add_argument("--vocab-size", type=int, help="every id must be below this")
    parser.add_argument(
        "--tokenizer-model", metavar="PATH", help="a SentencePiece model, for the size of its vocabulary"
    )
    parser.add_argument("--index-only", action="store_true", help="do not read the tokens themselves")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser


def vocabulary(args: argparse.Namespace) -> int | None:
    """The size to hold ids against, if one was given."""
    if not args.tokenizer_model:
        return args.vocab_size
    from megatron_lrpath.tokenizers.sentencepiece_model import open_model

    return open_model(args.tokenizer_model, "--tokenizer-model")[1].get_piece_size()


def check(args: argparse.Namespace) -> int:
    """Check every dataset, report all that is wrong; 2 if anything is."""
    size, reports, failed = vocabulary(args), [], 0
    for prefix in map(strip_ending, args.prefix):
        try:
            report = figures(check_pair(prefix, size, ids=not args.index_only), not args.index_only)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = 2
            continue
        reports.append(report)
        if not args.json:
            rest = ", ".join(f"{value} {name}" for name, value in report.items() if name != "prefix")
            print(f"{prefix}: whole; {rest}")
    if args.json:
        print(json.dumps(reports, indent=2))
    return failed


def figures(report: PairReport, with_ids: bool = True) -> dict[str, Any]:
    """A report as plain values, for printing."""
    header = report.header
    values: dict[str, Any] = {
        "prefix": header.prefix,
        "type": header.dtype,
        "documents": header.documents,
        "sequences": header.sequences,
        "tokens": report.tokens,
        "empty_documents": report.empty_documents,
        "shortest": report.shortest,
        "longest": report.longest,
    }
    if with_ids:
        values |= {"smallest_id": report.smallest_id, "largest_id": report.largest_id}
    return values


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; 0, or 2 for bad input."""
    return run_tool(build_parser(), check, argv)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Check indexed datasets (.bin and .idx): format, lengths, offsets, sizes, token ids; print their figures.

Exits with 2 when one of them is missing, truncated, swapped, foreign or damaged, or of another tokenizer
than the given one, and prints which dataset and what is wrong.

  check_dataset.py data/web_text_document --tokenizer-model data/tokenizer.model --record   # of Megatron-LM's own tool
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lrpath.console import ToolParser, run_tool
from megatron_lrpath.data import document_hashes
from megatron_lrpath.data.document_hashes import hashes_path, write_hashes
from megatron_lrpath.data.indexed import PairReport, check_pair, fingerprint_source, strip_ending
from megatron_lrpath.data.record import (
    path_in,
    read_content,
    read_record,
    record_path,
    recorded_hashes,
    write_record,
)
from megatron_lrpath.errors import UserError, cause
from megatron_lrpath.tokenizers.files import HUGGING_FACE, NO_TOKENIZER
from megatron_lrpath.tokenizers.prints import Facts, TokenizerSpec, label
from megatron_lrpath.tokenizers.sentencepiece_model import SENTENCEPIECE

TOOL = "check_dataset.py --record"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the tool's arguments."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", nargs="+", help="a dataset, by its path without .bin or .idx (or with)")
    parser.add_argument("--vocab-size", type=int, help="every id must be below this")
    parser.add_argument(
        "--tokenizer-model",
        metavar="PATH",
        help="the tokenizer that made the data: its vocabulary is compared with the ids, and it with the record",
    )
    parser.add_argument(
        "--tokenizer-type",
        choices=(*SENTENCEPIECE, HUGGING_FACE, NO_TOKENIZER),
        metavar="TYPE",
        help=f"default: {HUGGING_FACE} for a folder or tokenizer.json, else {SENTENCEPIECE[0]}; {NO_TOKENIZER} "
        "without a model",
    )
    parser.add_argument("--null-tokenizer-eod-id", type=int, metavar="ID", help=f"of {NO_TOKENIZER}")
    parser.add_argument(
        "--record",
        action="store_true",
        help="when all ids are within its vocabulary, record the tokenizer in PREFIX.tokens.json, which plans are "
        "compared with, and write a hash of each document to PREFIX.hashes, by which the same text is found again",
    )
    parser.add_argument(
        "--record-in",
        type=Path,
        metavar="FOLDER",
        help="write the record there: the folder of the slices, where the data's own is read-only",
    )
    parser.add_argument("--index-only", action="store_true", help="do not read the tokens themselves")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser


def tokenizer_of(args: argparse.Namespace) -> TokenizerSpec | None:
    """Return the tokenizer that the options name, None if they name none.

    Raises:
        UserError: it does not exist or cannot be opened, or --record is given without a tokenizer.
    """
    model, kind = args.tokenizer_model, args.tokenizer_type
    if model and not Path(model).exists():
        raise UserError(f"--tokenizer-model {model}: there is no such file")
    if model and kind is None:
        kind = HUGGING_FACE if Path(model).is_dir() or model.endswith(".json") else SENTENCEPIECE[0]
    if kind is None and args.record and args.vocab_size:
        kind = NO_TOKENIZER
    if kind == NO_TOKENIZER and not args.vocab_size:
        raise UserError(f"--tokenizer-type {NO_TOKENIZER} needs --vocab-size")
    if kind is None or (kind != NO_TOKENIZER and not model):
        if args.record or kind is not None:
            raise UserError("name the tokenizer that made the data: --tokenizer-model PATH")
        return None
    return TokenizerSpec(kind, model, args.vocab_size, args.null_tokenizer_eod_id)


def check(args: argparse.Namespace) -> int:
    """Check every dataset and report each that is wrong; return 2 if there is one, else 0."""
    args.record = args.record or args.record_in is not None
    if args.record and args.index_only:
        raise UserError("--record reads all ids; leave --index-only out")
    spec = tokenizer_of(args)
    size = args.vocab_size if spec is None else spec.size
    reports, failed = [], 0
    for prefix in map(strip_ending, args.prefix):
        try:
            report = figures(check_pair(prefix, size, ids=not args.index_only), not args.index_only)
            if spec is not None:
                compare(prefix, spec, args)
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


def compare(prefix: str, spec: TokenizerSpec, args: argparse.Namespace) -> None:
    """Compare a dataset's record with the tokenizer; with --record write a missing record or missing hashes.

    Raises:
        UserError: another tokenizer is recorded, or the record cannot be written.
    """
    fingerprint = fingerprint_source(prefix)
    made = read_record(prefix, fingerprint, args.record_in)
    if made is not None and (difference := spec.difference(made)):
        raise UserError(
            f"{record_path(prefix)}: says that {prefix} was made with {label(made)}, not with {spec.label}: "
            f"{difference}. If the record is wrong, remove it"
        )
    if not args.record:
        return
    if made is None or recorded_hashes(prefix, fingerprint, args.record_in) is None:
        record(prefix, fingerprint, spec, made, args.record_in)


def record(
    prefix: str, fingerprint: str, spec: TokenizerSpec, made: Facts | None, folder: Path | None
) -> None:
    """Write the record with the hashes of the documents; keep the options and inputs of an earlier record.

    Raises:
        UserError: a file cannot be written.
    """
    beside, aside = record_path(prefix), path_in(folder, prefix, fingerprint) if folder else None
    path = beside if aside is None else aside
    before = read_content(beside) or (read_content(aside) if aside else None) or {}
    details = {name: value for name, value in before.items() if name in ("options", "inputs")}
    facts = spec.facts if made is None else made
    try:
        write_hashes(hashes_path(path), prefix, facts.get("eod"))
        known = {document_hashes.KEY: document_hashes.describe(hashes_path(path), facts.get("eod"))}
        written = write_record(prefix, TOOL, facts, {"options": {}, "inputs": None} | details | known, folder)
    except OSError as error:
        raise UserError(
            f"{path}: {cause(error)}; where the data are read-only, write it into the slices' folder: "
            "--record-in FOLDER"
        ) from None
    hashed = "hashes of all documents"
    print(f"{written}: {hashed if made else f'made with {spec.label}; {hashed}'}", file=sys.stderr)


def figures(report: PairReport, with_ids: bool = True) -> dict[str, Any]:
    """Return a report as plain values, for printing."""
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
    """Run the tool; return 0, or 2 for bad input."""
    return run_tool(build_parser(), check, argv)


if __name__ == "__main__":
    sys.exit(main())

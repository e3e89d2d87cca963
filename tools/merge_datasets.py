#!/usr/bin/env python3
"""Put indexed datasets (.bin and .idx) of one type together into one, in the order given.

A folder means all datasets in it by name. Every part is checked before anything is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megatron_lrpath.console import ToolParser, run_tool
from megatron_lrpath.data.document_hashes import HashFile
from megatron_lrpath.data.indexed import (
    PairReport,
    blocks,
    check_pair,
    fingerprint_source,
    map_bounds,
    map_lengths,
    strip_ending,
)
from megatron_lrpath.data.preprocess.writer import PairWriter, publish_all, refuse_existing
from megatron_lrpath.data.record import (
    hashes_of,
    inputs_of,
    one_tokenizer,
    read_record,
    recorded_hashes,
    write_record,
)
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import check_prefix, named_twice
from megatron_lrpath.tokenizers.prints import Facts
from megatron_lrpath.wording import plural


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the tool's arguments."""
    parser = ToolParser(description=__doc__)
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
    """Merge the datasets and print the result; return 0."""
    pair = merge_datasets(args.input, args.output_prefix, args.overwrite)
    print(
        f"{args.output_prefix}: {pair.documents:,} documents, {pair.tokens:,} tokens of "
        f"{pair.dtype.itemsize} bytes",
        file=sys.stderr,
    )
    return 0


def merge_datasets(inputs: Sequence[str], output: str, overwrite: bool = False) -> PairWriter:
    """Merge the datasets `inputs` (prefixes, or folders of datasets) into `output`, in order.

    Returns the finished writer, whose counts are the result's.

    Raises:
        UserError: a part is damaged or of another type, is the output itself, or the output exists.
    """
    check_prefix(output)
    prefixes = _expand(inputs)
    if Path(output).resolve() in [Path(prefix).resolve() for prefix in prefixes]:
        raise UserError(f"{output} is one of the datasets to merge; write to another name")
    marker = Path(output).parent / f".{Path(output).name}.publishing"
    refuse_existing([output], marker, overwrite)
    reports = [check_pair(prefix, ids=False) for prefix in prefixes]
    _check_types(reports)
    prints = [fingerprint_source(prefix) for prefix in prefixes]
    records = [read_record(*one) for one in zip(prefixes, prints, strict=True)]
    facts = one_tokenizer(
        [*zip(prefixes, records, strict=True)], "Datasets of different tokenizers do not go together"
    )
    hashes = hash_files(prefixes, prints) if facts is not None and None not in records else []
    record = recorder(prefixes, records, facts, hashes)
    pair = PairWriter(output, np.dtype(reports[0].header.dtype))
    try:
        refuse_existing([output], marker, overwrite)
        for report in reports:
            pair.append_file(f"{report.header.prefix}.bin")
            bounds = blocks(map_bounds(report.header), overlap=1)
            pair.append_index(
                (lengths for _, lengths in blocks(map_lengths(report.header))),
                (np.diff(block) for _, block in bounds),  # sequences per document
            )
        for one in hashes:
            pair.append_hashes(block for _, block in one.blocks())
        publish_all([pair], marker, record)
    finally:
        pair.discard()
    return pair


def hash_files(prefixes: Sequence[str], prints: Sequence[str]) -> list[HashFile]:
    """Return the hashes of the documents of all parts; if a part has none, print a note and return none.

    Raises:
        UserError: a file of hashes is damaged.
    """
    found = [recorded_hashes(*one) for one in zip(prefixes, prints, strict=True)]
    known = [one for one in found if one is not None]
    if len(known) < len(found) or len({one.eod for one in known}) > 1:
        without = next((name for name, one in zip(prefixes, found, strict=True) if one is None), prefixes[-1])
        print(
            f"note: {without} has no hashes of its documents like those of the other parts, so the merged dataset has "
            "none: tools/check_dataset.py PREFIX --tokenizer-model MODEL --record",
            file=sys.stderr,
        )
        return []
    for one in known:
        one.verify()
    return known


def recorder(
    prefixes: Sequence[str],
    records: Sequence[Facts | None],
    facts: Facts | None,
    hashes: Sequence[HashFile],
) -> Callable[[str], object] | None:
    """Return the function that writes the merged dataset's record.

    If a part has no record, print a note and return None.
    """
    without = [prefix for prefix, one in zip(prefixes, records, strict=True) if one is None]
    if facts is None or without:
        print(
            f"note: nothing records the tokenizer of {plural(len(without), 'part')} ({without[0]}), so the merged "
            f"dataset has no record: tools/check_dataset.py PREFIX --tokenizer-model MODEL --record",
            file=sys.stderr,
        )
        return None
    ends = {one.get("append_eod") for one in records if one is not None}
    merged = facts | {"append_eod": ends.pop() if len(ends) == 1 else None}
    details = {"inputs": inputs_of(f"{prefix}.bin" for prefix in prefixes)}

    def write(prefix: str) -> Path:
        known = hashes_of(prefix, hashes[0].eod) if hashes else {}
        return write_record(prefix, "merge_datasets.py", merged, details | known)

    return write


def _expand(inputs: Sequence[str]) -> list[str]:
    prefixes: list[str] = []
    for name in inputs:
        found = find_pairs(Path(name)) if Path(name).is_dir() else [strip_ending(name)]
        if not found:
            raise UserError(f"{name}: no indexed dataset in this folder")
        prefixes += found
    if twice := named_twice(f"{prefix}.idx" for prefix in prefixes):
        raise UserError(f"{strip_ending(twice[1])} is named twice; its documents would be there twice")
    return prefixes


def _check_types(reports: Sequence[PairReport]) -> None:
    first = reports[0].header
    for report in reports:
        header = report.header
        if header.dtype != first.dtype:
            raise UserError(
                f"{header.prefix} holds {header.dtype} tokens, {first.prefix} {first.dtype}; datasets of "
                f"different tokenizers do not go together"
            )
        if header.modes:
            raise UserError(f"{header.prefix} is multimodal; Megatron-LM's own tool merges those")


def find_pairs(folder: Path) -> list[str]:
    """Return the prefixes of the complete pairs in `folder`, sorted by name.

    Raises:
        UserError: an index or a token file there lacks its other half.
    """
    index = {path.stem for path in folder.glob("*.idx")}
    tokens = {path.stem for path in folder.glob("*.bin")}
    if index != tokens:
        half = sorted(index ^ tokens)[0]
        missing = ".bin" if half in index else ".idx"
        raise UserError(f"{folder / half}{missing}: missing; the pair in {folder} is not whole")
    return [str(folder / name) for name in sorted(index)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return 0, or 2 for bad input."""
    return run_tool(build_parser(), merge, argv)


if __name__ == "__main__":
    sys.exit(main())

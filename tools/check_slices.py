#!/usr/bin/env python3
"""Prove what slices claim: files whole, sources there and unchanged, tokens as counted, no document in two.

  check_slices.py data/slices
  check_slices.py data/slices --full   # reads all of every .bin, and compares it with the record that was made with it

Exit status: 0 if all of it holds, 1 if anything does not (every failure is named), 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lrpath.console import ToolParser, run_tool, table_console

# --help and a wrong option load no library: modules that load one are imported in functions that need them.
if TYPE_CHECKING:
    from megatron_lrpath.data.slice import Slice, SliceSource


def check_slices(args: argparse.Namespace) -> int:
    """Check the slices that the options name and print the result; return 0 if all checks pass, else 1.

    Raises:
        UserError: there is nothing to check.
    """
    from megatron_lrpath.data.slice_tools import describe, tokens_table

    checked = check_files(slice_files(args.slices), args.full)
    if args.json:
        slices = [describe(one) for one in checked.slices]
        print(
            json.dumps({"ok": not checked.failures, "failures": checked.failures, "slices": slices}, indent=2)
        )
        return int(bool(checked.failures))
    table_console().print(tokens_table(checked.slices))
    for failure in checked.failures:
        print(f"FAILED: {failure}")
    if not checked.failures:
        print(f"{len(checked.slices)} slices: whole, disjoint, and their sources exist and are unchanged")
    return int(bool(checked.failures))


def slice_files(paths: list[Path]) -> list[Path]:
    """Return the slice files that `paths` names, and those in the folders that it names; endings may be left out.

    Raises:
        UserError: a folder has no slice, or a slice does not exist.
    """
    from megatron_lrpath.data.slice import ENDING
    from megatron_lrpath.errors import UserError

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.glob(f"*{ENDING}"))
            if not inside:
                raise UserError(f"{path}: there is no slice in this folder")
            files += inside
        else:
            files.append(path if path.name.endswith(ENDING) else path.with_name(path.name + ENDING))
    for path in files:
        if not path.is_file():
            raise UserError(f"{path}: there is no such slice")
    return list(dict.fromkeys(path.resolve() for path in files))


@dataclass(frozen=True)
class CheckedSlices:
    """Slices that could be read, and every check that failed."""

    slices: list[Slice]
    failures: list[str]


def check_files(files: list[Path], full: bool = False) -> CheckedSlices:
    """Check all files; sources: present and unchanged; documents and tokens: as counted; slices: disjoint."""
    from megatron_lrpath.data.slice import Slice, check_disjoint, verify_slices
    from megatron_lrpath.errors import UserError

    slices: list[Slice] = []
    failures: list[str] = []

    def attempt(proof: Callable[[], None]) -> None:
        try:
            proof()
        except UserError as error:
            failures.append(str(error))

    for path in files:
        attempt(lambda path=path: slices.append(Slice.load(path)))  # type: ignore[misc]
    for one in slices:
        attempt(partial(verify_slices, [one]))
        for source in one.sources:
            attempt(partial(check_counts, one, source))
    attempt(partial(check_disjoint, slices))
    if full:
        attempt(partial(check_content, slices))
    return CheckedSlices(slices, failures)


def check_content(slices: list[Slice]) -> None:
    """Compare every byte of the sources with their records; print a note on records without checksums.

    Raises:
        UserError: bytes differ from those that were written.
    """
    from megatron_lrpath.console import say
    from megatron_lrpath.data.record import verify_content
    from megatron_lrpath.wording import plural

    unverified = verify_content(slices, whole=True)
    if unverified:
        say(
            f"note: {plural(len(unverified), 'dataset')} without checksums of the content, not compared "
            f"({unverified[0]}{', …' if unverified[1:] else ''}); tools/check_dataset.py PREFIX --tokenizer-model "
            "MODEL --record writes them"
        )


def check_counts(one: Slice, source: SliceSource) -> None:
    """Prove that a source's documents exist and have the number of tokens in the slice.

    Raises:
        UserError: they do not.
    """
    from megatron_lrpath.data.indexed import document_lengths
    from megatron_lrpath.errors import UserError

    lengths = document_lengths(source.prefix)
    where = f"{one.path or one.name}: {source.prefix}"
    if len(source.documents) and int(source.documents[-1]) >= len(lengths):
        raise UserError(
            f"{where}: names document {source.documents[-1]}, but the dataset has {len(lengths):,} documents"
        )
    tokens = int(lengths[source.documents].sum(dtype="int64"))
    if tokens != source.tokens:
        raise UserError(f"{where}: says {source.tokens:,} tokens, but its documents have {tokens:,}")


def main() -> int:
    """Run the tool."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "slices", nargs="+", type=Path, metavar="PATH", help="slice files, or folders of them"
    )
    parser.add_argument(
        "--full", action="store_true", help="compare every byte of the datasets with their records"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return run_tool(parser, check_slices, None)


if __name__ == "__main__":
    sys.exit(main())

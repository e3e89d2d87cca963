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
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lrpath.console import ToolParser, run_tool, table_console

# --help and a wrong option load no library: modules that load one are imported in functions that need them.
if TYPE_CHECKING:
    from rich.table import Table

    from megatron_lrpath.data.draw import ShortageError
    from megatron_lrpath.data.draw_request import DrawRequest
    from megatron_lrpath.data.slice import Slice

LIST: dict[str, Any] = {"action": "append", "default": []}
OPTIONS: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    (
        "--source",
        "PREFIX[:WEIGHT[:DOMAIN]]",
        LIST,
        "an indexed dataset (without .bin), its weight in the mixture (none: in proportion to the tokens not "
        "yet drawn; left empty in PREFIX::DOMAIN) and the domain it counts as (none: its name); may be "
        "repeated. Read from the right; a dataset whose name itself holds colons is found if it exists",
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
APPEND = """append to the versions that exist; without --tokens-per-version the new version (or
--versions N equal ones) takes everything of the sources that no slice has"""

DROP = """leave out the documents whose text is in a slice of the folder, or in the sources before (validation
slices are always drawn without them)"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the tool's options."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, metavar, options, explanation in OPTIONS:
        parser.add_argument(name, metavar=metavar, help=explanation, **options)
    parser.add_argument("--append", action="store_true", help=APPEND)
    parser.add_argument("--drop-duplicates", action="store_true", help=DROP)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def slice_versions(args: argparse.Namespace) -> int:
    """Draw the slices, write them and print the result; return 0.

    Raises:
        UserError: nothing was written.
    """
    from megatron_lrpath.data.draw import (
        ShortageError,
        draw,
        existing_slices,
        remove_unfinished,
        write_slices,
    )
    from megatron_lrpath.data.slice import Slice
    from megatron_lrpath.data.slice_tools import describe, tokens_table
    from megatron_lrpath.errors import UserError
    from megatron_lrpath.locks import FolderLock, LockHeldError

    console = table_console(stderr=True)
    try:
        lock = FolderLock.acquire(args.output)
    except LockHeldError as owner:  # this draw cannot see the documents that the other draw takes
        raise UserError(
            f"{args.output}: {owner} is drawing slices there now; try again when it is done"
        ) from None
    try:
        remove_unfinished(args.output)
        existing = existing_slices(args.output)
        request = request_of(args, [one.name for one in existing])
        with console.status("reading") as status:
            drawn = draw(request, existing, lambda text: status.update(text), args.output)
        paths = write_slices(drawn.slices, args.output)
    except ShortageError as error:
        console.print(shortage_table(error))
        raise
    finally:
        lock.close()
    written = [Slice.load(path) for path in paths]
    tell_unrecorded(written)
    for line in drawn.duplicates.lines(args.drop_duplicates):
        print(line, file=sys.stderr)
    if args.json:
        made = {"output": str(args.output), "slices": [describe(one) for one in written], "left": drawn.left}
        made["duplicates"] = drawn.duplicates.as_json()
        print(json.dumps(made, indent=2, ensure_ascii=False))
    else:
        table_console().print(tokens_table([*existing, *written], drawn.left))
        for one in written:
            print(f"{one.path}  {one.fingerprint[:12]}")
        print(f"next, without a plan: lrpath init --slices {shlex.quote(str(args.output))} --tokenizer PATH")
    return 0


def tell_unrecorded(slices: Sequence[Slice]) -> None:
    """Print a note on the sources that have no record of their tokenizer."""
    from megatron_lrpath.wording import listing

    sources = [source for one in slices for source in one.sources if source.tokenizer is None]
    names = [str(prefix) for prefix in dict.fromkeys(source.prefix for source in sources)]
    if names:
        more = [f"{len(names) - 3:,} more"] if len(names) > 3 else []
        print(
            f"note: nothing records which tokenizer made {listing([*names[:3], *more])}, so plans cannot be compared "
            "with it; tools/check_dataset.py PREFIX --tokenizer-model MODEL --record writes it down",
            file=sys.stderr,
        )


def shortage_table(error: ShortageError) -> Table:
    """Return a table of the tokens asked of every source and the tokens it has."""
    from megatron_lrpath.console import terminal_table

    titles = ("source", "domain", "free documents", "free tokens", "asked for", "missing")
    table = terminal_table(titles, "llrRRR", title="too few tokens", title_justify="left")
    table.columns[0].overflow = "fold"
    for row in error.table:
        cells = (f"{number:,}" for number in (row.free_documents, row.free_tokens, row.asked, row.missing))
        table.add_row(str(row.prefix), row.domain, *cells, style="bold" if row.missing else None)
    return table


def request_of(args: argparse.Namespace, taken: Sequence[str]) -> DrawRequest:
    """Return the request that the options define; `taken` are the names of existing slices.

    Raises:
        UserError: an option cannot be understood.
    """
    from megatron_lrpath.data import draw_request
    from megatron_lrpath.errors import UserError

    if args.seq_length is not None and args.seq_length < 1:
        raise UserError(f"--seq-length {args.seq_length}: must be at least 1")
    tokens = [text for argument in args.tokens_per_version for text in argument.split(",")]
    names = args.names.split(",") if args.names else None
    at_random = tokens or args.versions is not None or names or (args.append and not args.documents)
    return draw_request.DrawRequest(
        sources=tuple(draw_request.parse_source(text) for text in args.source),
        versions=draw_request.version_requests(tokens, args.versions, names, taken, args.append)
        if at_random
        else (),
        valid_tokens=None if args.valid_tokens is None else draw_request.parse_tokens(args.valid_tokens),
        ranges=tuple(draw_request.parse_range(text) for text in args.documents),
        seed=args.seed,
        seq_length=args.seq_length,
        drop_duplicates=args.drop_duplicates,
    )


def main() -> int:
    """Run the tool; return 0, or 2 for bad input."""
    return run_tool(build_parser(), slice_versions, None)


if __name__ == "__main__":
    sys.exit(main())

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
import re
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_lrpath.console import run_tool
from megatron_lrpath.data.draw import ShortageError, draw
from megatron_lrpath.data.draw_request import (
    VALIDATION,
    DrawRequest,
    RangeRequest,
    SourceRequest,
    default_domain,
)
from megatron_lrpath.data.indexed import strip_ending
from megatron_lrpath.data.slice import ENDING, Slice, slice_path
from megatron_lrpath.data.slice_tools import describe, tokens_table, wide_console
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_write_bytes
from megatron_lrpath.locks import FolderLock, LockHeldError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
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


def slice_versions(args: argparse.Namespace) -> int:
    """Draw, write and show; 0.

    Raises:
        UserError: nothing was written.
    """
    console = wide_console(stderr=True)
    try:
        lock = FolderLock.acquire(args.output)
    except LockHeldError as owner:  # this draw could not know what that one takes
        raise UserError(
            f"{args.output}: {owner} is drawing slices there now; try again when it is done"
        ) from None
    try:
        existing = existing_slices(args.output)
        request = request_of(args, [one.name for one in existing])
        with console.status("reading") as status:
            drawn = draw(request, existing, lambda text: status.update(text))
        paths = write_slices(drawn.slices, args.output)
    except ShortageError as error:
        console.print(shortage_table(error))
        raise
    finally:
        lock.close()
    written = [Slice.load(path) for path in paths]
    if args.json:
        made = {"output": str(args.output), "slices": [describe(one) for one in written], "left": drawn.left}
        print(json.dumps(made, indent=2, ensure_ascii=False))
    else:
        wide_console().print(tokens_table([*existing, *written], drawn.left))
        for one in written:
            print(f"{one.path}  {one.fingerprint[:12]}")
    return 0


def existing_slices(folder: Path | str) -> list[Slice]:
    """All slices of a folder (none if it is not there yet), by name.

    Raises:
        UserError: one of them is damaged.
    """
    return [Slice.load(path) for path in sorted(Path(folder).glob(f"*{ENDING}"))]


def write_slices(slices: Sequence[Slice], folder: Path | str) -> list[Path]:
    """Write new slices into `folder` (each file atomically) and return their paths.

    Raises:
        UserError: one of the files is there already; then nothing is written.
    """
    paths = [slice_path(folder, one.name) for one in slices]
    for path in paths:
        if path.exists():
            raise UserError(
                f"{path}: is there already, and slices are never changed; use another name or folder"
            )
    contents = [one.to_bytes(path.parent) for one, path in zip(slices, paths, strict=True)]
    for path, content in zip(paths, contents, strict=True):  # nothing slow between the first and the last
        atomic_write_bytes(path, content)
    return paths


def shortage_table(error: ShortageError) -> Table:
    """What is asked of every source and what it has."""
    table = Table(title="too few tokens", title_justify="left")
    table.add_column("source", overflow="fold")
    table.add_column("domain")
    for heading in ("free documents", "free tokens", "asked for", "missing"):
        table.add_column(heading, justify="right")
        table.columns[-1].no_wrap = heading != "free documents"
    for row in error.table:
        cells = (f"{number:,}" for number in (row.free_documents, row.free_tokens, row.asked, row.missing))
        table.add_row(str(row.prefix), row.domain, *cells, style="bold" if row.missing else None)
    return table


def request_of(args: argparse.Namespace, taken: Sequence[str]) -> DrawRequest:
    """The request that the options stand for; `taken` are the names of existing slices.

    Raises:
        UserError: an option cannot be understood.
    """
    if args.seq_length is not None and args.seq_length < 1:
        raise UserError(f"--seq-length {args.seq_length}: must be at least 1")
    tokens = [text for argument in args.tokens_per_version for text in argument.split(",")]
    names = args.names.split(",") if args.names else None
    at_random = tokens or args.versions is not None or names or (args.append and not args.documents)
    return DrawRequest(
        sources=tuple(parse_source(text) for text in args.source),
        versions=version_requests(tokens, args.versions, names, taken, args.append) if at_random else (),
        valid_tokens=None if args.valid_tokens is None else parse_tokens(args.valid_tokens),
        ranges=tuple(parse_range(text) for text in args.documents),
        seed=args.seed,
        seq_length=args.seq_length,
    )


def parse_source(text: str) -> SourceRequest:
    """`PREFIX[:WEIGHT[:DOMAIN]]`, read from the right, since a prefix may itself hold colons.

    Of the readings that make sense, the longest prefix that is there on disk wins: a dataset that is really
    called `crawl:2` is found as such. An empty weight (`PREFIX::DOMAIN`) is none.
    """
    parts = text.split(":")
    readings: list[tuple[str, str | None, str | None]] = [(text, None, None)]
    if len(parts) >= 2 and _weight(parts[-1]) is not None:
        readings.append((":".join(parts[:-1]), parts[-1], None))
    if len(parts) >= 3 and (parts[-2] == "" or _weight(parts[-2]) is not None) and parts[-1]:
        readings.append((":".join(parts[:-2]), parts[-2], parts[-1]))
    there = [reading for reading in readings if Path(f"{strip_ending(reading[0])}.idx").exists()]
    prefix, weight, domain = there[0] if there else readings[-1]
    path = Path(strip_ending(prefix))
    number = _weight(weight) if weight else None
    return SourceRequest(path, number, domain or default_domain(path))


def parse_range(text: str) -> RangeRequest:
    """`VERSION=PREFIX:FROM-TO` or `VERSION=PREFIX:FROM-`: documents counted from 0, TO not included.

    Raises:
        UserError: not of that form, or empty.
    """
    match = re.fullmatch(r"([^=]+)=(.+):(\d+)-(\d*)", text)
    if not match:
        raise UserError(
            f"--documents {text}: not of the form VERSION=PREFIX:FROM-TO, as in v2=data/web:100-2000"
        )
    version, prefix, first, end = match.groups()
    found = RangeRequest(version, Path(strip_ending(prefix)), int(first), int(end) if end else None)
    if found.end is not None and found.end <= found.first:
        raise UserError(f"--documents {text}: holds no document (TO is not included)")
    return found


def parse_tokens(text: str) -> int:
    """A number of tokens: `10500000000`, `10_500_000_000`, `10.5e9` or `10.5B` (K, M, B or G, T).

    Raises:
        UserError: not a number, not whole, or not positive.
    """
    match = re.fullmatch(r"([0-9_.]+(?:[eE][+-]?[0-9]+)?)([kKmMbBgGtT]?)", text.strip())
    try:
        number = Fraction(match[1]) * UNITS[match[2].lower()] if match else None
    except ValueError:
        number = None
    if number is None or number <= 0 or number.denominator != 1:
        raise UserError(f"{text!r} is not a number of tokens; write it as 10500000000, 10.5e9 or 10.5B")
    return int(number)


def version_requests(
    tokens: Sequence[str], count: int | None, names: Sequence[str] | None, taken: Sequence[str], append: bool
) -> tuple[tuple[str, int | None], ...]:
    """Names and tokens of the versions to draw at random.

    `tokens` as typed (one for all, or one each), `count` of --versions, `names` of --names, `taken` the names
    of existing slices. Unnamed versions are v1, v2, …, going on behind those that exist with `append`.

    Raises:
        UserError: the numbers do not agree, or there is no telling how many tokens are wanted.
    """
    amounts: list[int | None] = [parse_tokens(text) for text in tokens]
    if not amounts and not append:
        raise UserError("--tokens-per-version is missing (with --append it is then everything not yet drawn)")
    number = count if count is not None else len(names) if names else max(len(amounts), 1)
    if number < 1 or len(amounts) not in (0, 1, number):
        raise UserError(
            f"--tokens-per-version: {len(amounts)} numbers for {number} versions; give one, or one each"
        )
    if names and len(names) != number:
        raise UserError(f"--names: {len(names)} names for {number} versions")
    amounts = amounts * number if len(amounts) == 1 else amounts or [None] * number
    first = _next_number(taken) if append else 1
    return tuple(zip(names or [f"v{first + i}" for i in range(number)], amounts, strict=True))


def _next_number(taken: Sequence[str]) -> int:
    """The first k such that v<k> and everything after it is free, and that counts the versions there are."""
    versions = [name for name in taken if name != VALIDATION]
    numbers = [int(name[1:]) for name in versions if re.fullmatch(r"v[0-9]+", name)]
    return max([len(versions), *numbers]) + 1


def _weight(text: str) -> Fraction | None:
    """A weight (not negative), or None if the text is none."""
    try:
        number = Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None
    return number if number >= 0 else None


def main() -> int:
    """Run the tool; 0, or 2 for bad input."""
    return run_tool(build_parser(), slice_versions, None)


if __name__ == "__main__":
    sys.exit(main())

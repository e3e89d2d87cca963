"""The work of tools/slice_versions.py and tools/check_slices.py: options, and results as tables and JSON."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_lrpath.data.draw import ShortageError, draw, existing_slices, write_slices
from megatron_lrpath.data.draw_request import (
    DrawRequest,
    parse_range,
    parse_source,
    parse_tokens,
    version_requests,
)
from megatron_lrpath.data.slice import ENDING, Slice
from megatron_lrpath.data.slice_check import check_files
from megatron_lrpath.errors import UserError
from megatron_lrpath.locks import FolderLock, LockHeldError


def wide_console(stderr: bool = False) -> Console:
    """A console that does not cram tables into 80 columns where its output goes into a file."""
    console = Console(stderr=stderr)
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(stderr=stderr, width=160)


def tokens_table(slices: Sequence[Slice], left: dict[str, int] | None = None) -> Table:
    """Tokens and shares by domain (rows) and version (columns); `left` are tokens in no slice, by domain."""
    domains = list(dict.fromkeys(domain for one in slices for domain in one.tokens_by_domain))
    domains += [domain for domain in left or {} if domain not in domains]
    table = Table(title="tokens by domain and version", title_justify="left")
    table.add_column("domain")
    for one in slices:
        table.add_column(one.name, justify="right", no_wrap=True)
    if left is not None:
        table.add_column("not drawn", justify="right", no_wrap=True)
    for domain in domains:
        cells = [_amount(one.tokens_by_domain.get(domain, 0), one.tokens) for one in slices]
        table.add_row(domain, *cells, *([_amount(left.get(domain, 0))] if left is not None else []))
    table.add_section()
    rest = [_amount(sum(left.values()))] if left is not None else []
    table.add_row("tokens", *[_amount(one.tokens) for one in slices], *rest)
    table.add_row("documents", *[_amount(one.documents) for one in slices])
    return table


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


def describe(one: Slice) -> dict[str, Any]:
    """A slice as JSON-able values."""
    return {
        "name": one.name,
        "path": None if one.path is None else str(one.path),
        "seed": one.seed,
        "fingerprint": one.fingerprint,
        "documents": one.documents,
        "tokens": one.tokens,
        "tokens_by_domain": one.tokens_by_domain,
        "sources": [
            {
                "prefix": str(source.prefix),
                "domain": source.domain,
                "fingerprint": source.fingerprint,
                "documents": len(source.documents),
                "tokens": source.tokens,
            }
            for source in one.sources
        ],
    }


def _amount(number: int, whole: int | None = None) -> str:
    """`9,999,999`, `10.500B`; with `whole` also the share of it: `1,234 12.3%`."""
    text = f"{number:,}"
    for limit, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if number >= max(limit, 10**7):
            text = f"{number / limit:,.3f}{unit}"
            break
    return text if whole is None or not number else f"{text} {number / whole:6.1%}"


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


def check_slices(args: argparse.Namespace) -> int:
    """Check what the options name and print the result; 0 if all holds, else 1.

    Raises:
        UserError: there is nothing to check.
    """
    checked = check_files(slice_files(args.slices))
    if args.json:
        slices = [describe(one) for one in checked.slices]
        print(
            json.dumps({"ok": not checked.failures, "failures": checked.failures, "slices": slices}, indent=2)
        )
        return int(bool(checked.failures))
    wide_console().print(tokens_table(checked.slices))
    for failure in checked.failures:
        print(f"FAILED: {failure}")
    if not checked.failures:
        print(f"{len(checked.slices)} slices: whole, disjoint, and their sources are there and unchanged")
    return int(bool(checked.failures))


def slice_files(paths: list[Path]) -> list[Path]:
    """The slice files that are named, or lie in a folder that is named; endings may be left out.

    Raises:
        UserError: there are none.
    """
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

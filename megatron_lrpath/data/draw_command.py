"""The work of tools/slice_versions.py, given its parsed options."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_lrpath.data.draw import ShortageError, draw, existing_slices, write_slices
from megatron_lrpath.data.draw_report import describe, shortage_table, tokens_table, wide_console
from megatron_lrpath.data.draw_request import (
    DrawRequest,
    parse_range,
    parse_source,
    parse_tokens,
    version_requests,
)
from megatron_lrpath.data.slice import Slice
from megatron_lrpath.errors import UserError
from megatron_lrpath.locks import FolderLock, LockHeldError


def slice_versions(args: argparse.Namespace) -> int:
    """Draw, write and show; 0.

    Raises:
        UserError: nothing was written.
    """
    console = wide_console(stderr=True)
    lock = _lock(args.output)
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
    tokens = [text for word in args.tokens_per_version for text in word.split(",")]
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


def _lock(folder: Path) -> FolderLock:
    """Keep a second draw into the same folder out: it could not know what this one takes."""
    try:
        return FolderLock.acquire(folder)
    except LockHeldError as owner:
        raise UserError(f"{folder}: {owner} is drawing slices there now; try again when it is done") from None

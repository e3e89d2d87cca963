"""Compute checksums of a dataset's `.bin` by block, for its record, and compare them with the file."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

SMALLEST_BLOCK = 1 << 20  # bytes
MOST_BLOCKS = 1 << 16  # per file at most, so that a record stays small and a block is read quickly
AT_A_START = 4  # blocks, different ones each time
AT_A_START_IF_NEWER = 64  # blocks, if the file's time differs from its record
KEY = "content"


def content_sums(path: Path) -> dict[str, Any]:
    """Return the size in bytes of a file, its modification time, the size of a block, and the XXH3-64 of each
    block.
    """
    about = path.stat()
    block = SMALLEST_BLOCK
    while about.st_size > block * MOST_BLOCKS:
        block *= 2
    found = [_sum_block(path, block, number) for number in range(-(-about.st_size // block))]
    return {"bytes": about.st_size, "mtime_ns": about.st_mtime_ns, "block": block, "xxh3_64": found}


def check_form(sums: Any) -> Mapping[str, Any]:
    """Return the same object if its form is valid. Raise ValueError otherwise."""
    if not isinstance(sums, dict):
        raise ValueError(f"`{KEY}` is no object")
    numbers = [sums.get(name) for name in ("bytes", "mtime_ns", "block")]
    found = sums.get("xxh3_64")
    if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in numbers):
        raise ValueError(f"`{KEY}` lacks a size")
    if sums["block"] < 1 or not isinstance(found, list) or len(found) != -(-sums["bytes"] // sums["block"]):
        raise ValueError(f"`{KEY}` does not list the blocks of the file")
    return sums


def wrong_blocks(path: Path, sums: Mapping[str, Any], numbers: Iterable[int] | None = None) -> list[str]:
    """Return the differences of a file from its recorded checksums, a text for each.

    Args:
        path: the file.
        sums: the result of `content_sums`.
        numbers: the numbers of the blocks to compare; None: all.

    Raises:
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    if size != sums["bytes"]:
        return [f"{path}: has {size:,} bytes instead of {sums['bytes']:,}"]
    block, recorded = sums["block"], sums["xxh3_64"]
    wanted = range(len(recorded)) if numbers is None else sorted(set(numbers))
    wrong = [number for number in wanted if _sum_block(path, block, number) != recorded[number]]
    if not wrong:
        return []
    more = f", and {len(wrong) - 1:,} more of {block:,} bytes" if wrong[1:] else ""
    first = wrong[0] * block
    return [f"{path}: bytes {first:,} to {min(first + block, size):,} are not what was written{more}"]


def sampled(path: Path, sums: Mapping[str, Any], least: int = AT_A_START) -> list[int]:
    """Return the blocks that a start compares: `least`, different ones each time, and more if the file's time
    has changed.
    """
    count = least if path.stat().st_mtime_ns == sums["mtime_ns"] else AT_A_START_IF_NEWER
    blocks = len(sums["xxh3_64"])
    return random.Random(os.urandom(8)).sample(range(blocks), min(count, blocks))


def _sum_block(path: Path, block: int, number: int) -> str:
    digest = xxhash.xxh3_64()
    left = block
    with path.open("rb", buffering=0) as stream:
        stream.seek(number * block)
        while left and (part := stream.read(min(left, SMALLEST_BLOCK))):
            digest.update(part)
            left -= len(part)
    return digest.hexdigest()

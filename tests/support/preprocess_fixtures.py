"""Helpers of the preprocessing tests: call a tool in this process or as a command, read pairs back."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lrpath.data.indexed import check_pair, map_bounds, map_lengths
from tests.support import GOLDEN, ROOT
from tools import preprocess_data

SP = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(GOLDEN / "sp.model")]
NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "1000"]


def preprocess(source: Path | str | Sequence[Path | str], prefix: Path, *more: str) -> int:
    """Call the tool in this process; return its exit status."""
    inputs = [source] if isinstance(source, str | Path) else source
    return preprocess_data.main(
        ["--input", *map(str, inputs), "--output-prefix", str(prefix), "--workers", "1", *more]
    )


def command(tool: str, *arguments: Any) -> list[str]:
    """Return the command line of a tool of this project."""
    return [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments)]


def environment() -> dict[str, str]:
    """Return the environment in which a tool finds the package, installed or not."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def call(tool: str, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a tool as a command of its own; return the completed process."""
    return subprocess.run(
        command(tool, *arguments), env=environment(), capture_output=True, text=True, check=False, **options
    )


def write_lines(path: Path, texts: Iterable[Any], key: str = "text") -> Path:
    """Write JSON lines, one object with one key each; return `path`."""
    with path.open("w", encoding="utf-8") as out:
        for text in texts:
            out.write(json.dumps({key: text}, ensure_ascii=False) + "\n")
    return path


def pair(prefix: Path | str) -> tuple[bytes, bytes]:
    """Return the bytes of a pair's two files."""
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def documents(prefix: Path | str) -> list[list[int]]:
    """Return the token ids of every document of a pair, read by the format's description and checked."""
    header = check_pair(str(prefix)).header
    tokens = np.fromfile(f"{prefix}.bin", dtype=header.dtype).tolist()
    lengths, bounds = map_lengths(header), map_bounds(header)
    ends = [0, *np.cumsum(lengths).tolist()]
    return [tokens[ends[first] : ends[last]] for first, last in itertools.pairwise(bounds)]


def left_behind(folder: Path) -> list[str]:
    """Return the names of temporary files in a folder."""
    return sorted(path.name for path in folder.iterdir() if "partial" in path.name or "tmp" in path.name)

"""From JSON lines to tokenizer, indexed datasets and version slices, with the tools of this project."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = Path("data/reproduction")
"""Folder of the corpora, in the current folder."""
VOCABULARY = 512
VALID_TOKENS = 150_000
SEED = 1234


def write_texts(path: Path, texts: Iterable[str]) -> None:
    """Write documents as JSON lines; the file is complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    aside.write_text("".join(lines), encoding="utf-8")
    aside.replace(path)


def pages(paragraphs: Iterable[str], length: int = 3000) -> Iterable[str]:
    """Yield documents of consecutive paragraphs, each of at least `length` characters except the last."""
    page: list[str] = []
    size = 0
    for paragraph in paragraphs:
        page.append(paragraph)
        size += len(paragraph)
        if size >= length:
            yield "\n".join(page)
            page, size = [], 0
    if page:
        yield "\n".join(page)


def train_tokenizer(folder: Path, texts: Sequence[Path]) -> None:
    """Make `tokenizer.model` (SentencePiece BPE), small, so that a small model is mostly its layers."""
    prefix = folder / "tokenizer"
    if not prefix.with_suffix(".model").exists():
        argv = ["--input", *texts, "--vocab-size", VOCABULARY, "--sample-bytes", 5e6, "--seed", SEED]
        tool("train_tokenizer", *argv, "--output-prefix", prefix)


def tokenize(folder: Path, text: Path) -> Path:
    """Make the indexed dataset of a file of JSON lines; return its prefix."""
    prefix = folder / f"{text.stem}_text_document"
    if not prefix.with_suffix(".idx").exists():
        argv = ["--input", text, "--append-eod", "--workers", 1]
        argv += ["--tokenizer-type", "SentencePieceTokenizer"]
        argv += ["--tokenizer-model", folder / "tokenizer.model"]
        tool("preprocess_data", *argv, "--output-prefix", folder / text.stem)
    return prefix


def draw(folder: Path, *argv: object) -> None:
    """Draw version slices into `folder`, always with the same seed."""
    tool("slice_versions", *argv, "--seed", SEED, "--output", folder)


def tool(name: str, *argv: object) -> None:
    """Call `tools/NAME.py`."""
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, argv)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

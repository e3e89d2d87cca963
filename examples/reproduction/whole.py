#!/usr/bin/env python3
"""Make the main corpus: the mixture of mixture.py with whole documents held out for validation.

A novel, the documentation of a service, or a module of source code is a document. Every twentieth of them (by a digest
of its name) is held out: the validation set is drawn from those, the versions from all others. Called again, it does
nothing when everything exists.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path

import novels
from corpus import DATA, VALID_TOKENS, draw, pages, tokenize, train_tokenizer, write_texts
from mixture import SHARES, modules, strings

FOLDER = DATA / "whole"
HELD_OUT = 20
"""One in this many documents is held out."""
TOKENS, LENGTH = 4_550_000, 128
"""Tokens of a version and of a sample."""
Documents = Iterator[tuple[str, list[str]]]


def fiction(source: str) -> Documents:
    """Yield the novels in the order of their periods: name and pages."""
    for _, name, text in sorted(novels.read(novels.fetch(source)), key=lambda novel: novel[0]):
        yield name, text


def documentation() -> Documents:
    """Yield for each service in each of the quickstart's files its name and pages."""
    for file in strings():
        for service, lines in groupby(sorted(file, key=lambda line: line[0]), key=lambda line: line[0]):
            yield service, list(pages(text for _, text in lines))


def held_out(name: str) -> bool:
    """Return whether the document of this name is for validation."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT == 0


def split(documents: Iterable[tuple[str, list[str]]]) -> dict[bool, list[str]]:
    """Return the pages, by whether their document is held out."""
    found: dict[bool, list[str]] = {False: [], True: []}
    for name, text in documents:
        found[held_out(name)] += text
    return found


def write(makers: Mapping[str, Callable[[], Documents]]) -> dict[bool, dict[str, Path]]:
    """Return the JSON lines files of every domain, by whether they are held out; make missing ones."""
    files = {
        out: {domain: FOLDER / "text" / f"{domain}{'-held-out' if out else ''}.jsonl" for domain in makers}
        for out in (False, True)
    }
    for domain, maker in makers.items():
        if not all(files[out][domain].exists() for out in files):
            for out, text in split(maker()).items():
                write_texts(files[out][domain], text)
    return files


def main() -> None:
    """Make text, tokenizer, datasets and slices in `data/reproduction/whole`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    novels.add_source(parser)
    source = parser.parse_args().source
    files = write({"novels": lambda: fiction(source), "documentation": documentation, "code": modules})
    train_tokenizer(FOLDER, list(files[False].values()))
    slices = FOLDER / "slices"
    sources: dict[bool, list[object]] = {
        out: [
            word
            for domain, text in some.items()
            for word in ("--source", f"{tokenize(FOLDER, text)}:{SHARES[domain]}:{domain}")
        ]
        for out, some in files.items()
    }
    if not (slices / "valid.slice").exists():
        draw(slices, *sources[True], "--valid-tokens", VALID_TOKENS)
    if not (slices / "v4.slice").exists():
        draw(slices, *sources[False], "--versions", 4, "--tokens-per-version", TOKENS, "--seq-length", LENGTH)


if __name__ == "__main__":
    main()

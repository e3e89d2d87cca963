#!/usr/bin/env python3
"""Make the second corpus: English novels of four periods, one period a data version.

The European Literary Text Collection (ELTeC-eng: texts in the public domain, markup CC BY 4.0) sorts its novels by
year: T1 1840-59, T2 1860-79, T3 1880-99, T4 1900-20. They become the versions v1 to v4. The validation set is drawn
from all four. Called again, it does nothing when everything exists.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from corpus import DATA, VALID_TOKENS, draw, pages, tokenize, train_tokenizer, write_texts

COLLECTION = "https://github.com/COST-ELTeC/ELTeC-eng.git"
COMMIT = "3db3b6738a836f0e1b276b6c9703e42f4297f978"
LEFT_OUT = "level1/ENG18460_Reynolds.xml"
"""The collection's 100th novel, by far the longest: not in the copy behind the published figures."""
FOLDER = DATA / "novels"
PERIODS = {"T1": "v1", "T2": "v2", "T3": "v3", "T4": "v4"}
TEI = "{http://www.tei-c.org/ns/1.0}"
ELTEC = "{http://distantreading.net/eltec/ns}"


def fetch(source: str) -> Path:
    """Return the folder of the novels at the commit, cloned from `source` (an address or another clone)."""
    clone = DATA / "ELTeC-eng"
    novels = ["level1", f":(exclude){LEFT_OUT}"]
    try:
        if not (clone / ".git").exists():
            git("clone", "--quiet", "--no-checkout", "--filter=blob:none", source, str(clone))
        git("-C", str(clone), "checkout", "--quiet", COMMIT, "--", *novels)
    except subprocess.CalledProcessError:
        sys.exit(
            f"error: cannot clone the novels from {source}; git printed the reason above. Without access, clone "
            "https://github.com/COST-ELTeC/ELTeC-eng elsewhere and name that folder: --source FOLDER"
        )
    return clone / "level1"


def git(*argv: str) -> None:
    """Call git; raise CalledProcessError if it fails."""
    subprocess.run(["git", *argv], check=True, stdout=subprocess.DEVNULL)


def paragraphs(novel: ElementTree.Element) -> Iterator[str]:
    """Yield the paragraphs of a novel's body, each on one line."""
    for body in novel.iter(f"{TEI}body"):
        for paragraph in body.iter(f"{TEI}p"):
            if text := " ".join("".join(paragraph.itertext()).split()):
                yield text


def read(folder: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Yield every novel: the version of its period, its name, and its pages."""
    for path in sorted(folder.glob("*.xml")):
        novel = ElementTree.parse(path).getroot()
        period = next(novel.iter(f"{ELTEC}timeSlot")).get("key", "")
        yield PERIODS[period], path.stem, list(pages(paragraphs(novel)))


def texts(source: str = COLLECTION) -> list[Path]:
    """Return the JSON lines files of v1 to v4; make them if one is missing."""
    files = [FOLDER / "text" / f"{version}.jsonl" for version in PERIODS.values()]
    if not all(path.exists() for path in files):
        documents: dict[str, list[str]] = {path.stem: [] for path in files}
        for version, _, text in read(fetch(source)):
            documents[version] += text
        for path in files:
            write_texts(path, documents[path.stem])
    return files


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add the argument for the source of the novels."""
    parser.add_argument("--source", default=COLLECTION, help="where git clones the novels from")


def main() -> None:
    """Make text, tokenizer, datasets and slices in `data/reproduction/novels`."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_source(parser)
    files = texts(parser.parse_args().source)
    train_tokenizer(FOLDER, files[:1])  # the only text that a team has when it begins
    sources = {path.stem: f"{tokenize(FOLDER, path)}::{path.stem}" for path in files}
    if not (FOLDER / "slices" / "valid.slice").exists():
        every = [word for source in sources.values() for word in ("--source", source)]
        draw(FOLDER / "slices", *every, "--valid-tokens", VALID_TOKENS)
    for version, source in sources.items():
        if not (FOLDER / "slices" / f"{version}.slice").exists():
            draw(FOLDER / "slices", "--source", source, "--append")


if __name__ == "__main__":
    main()

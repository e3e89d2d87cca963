#!/usr/bin/env python3
"""Make the first corpus: four data versions drawn without replacement from one mixture, as in the paper.

Half of the tokens are novels (see novels.py), a quarter is documentation (botocore, the
quickstart's text), a quarter Python source (sympy, BSD license). The packages come from the package registry that
pip is set up for. Called again, it does nothing when everything exists.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import novels
from corpus import DATA, ROOT, VALID_TOKENS, draw, pages, tokenize, train_tokenizer, write_texts

FOLDER = DATA / "mixture"
SHARES = {"novels": 0.5, "documentation": 0.25, "code": 0.25}
DRAWS = {"slices": (2_500_000, 128), "slices-large": (8_300_000, 256)}
"""Tokens of each version and of a sample: for the experiments on the CPU and on a GPU."""
WHEEL = "sympy-1.13.3-py3-none-any.whl"
DIGEST = "54612cf55a62755ee71824ce692986f23c88ffa77207b30c1368eda4a7060f73"


def strings() -> Iterator[list[tuple[str, str]]]:
    """Yield the quickstart's text, a list for each of its files: services and their documentation strings."""
    subprocess.run([sys.executable, str(ROOT / "examples/quickstart/prepare.py")], check=True)
    for path in sorted(Path("data/quickstart/text").glob("*.jsonl")):
        lines = map(json.loads, path.open(encoding="utf-8"))
        yield [(line["service"], line["text"]) for line in lines]


def documentation() -> Iterator[str]:
    """Yield the quickstart's text in pages."""
    for file in strings():
        yield from pages(text for _, text in file)


def modules() -> Iterator[tuple[str, list[str]]]:
    """Yield the modules of sympy: name and pages."""
    wheel = DATA / WHEEL
    if not wheel.exists():
        name, version = WHEEL.split("-")[:2]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--dest={DATA}"]
        subprocess.run([*command, f"{name}=={version}"], check=True)
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != DIGEST:
        sys.exit(f"error: {wheel} is not the release it should be; remove it and call again")
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".py"):
                yield name, list(pages(archive.read(name).decode("utf-8").splitlines()))


def code() -> Iterator[str]:
    """Yield the modules of sympy in pages."""
    for _, module in modules():
        yield from module


def fiction(source: str) -> Iterator[str]:
    """Yield the novels of all periods."""
    for path in novels.texts(source):
        yield from (json.loads(line)["text"] for line in path.open(encoding="utf-8"))


def main() -> None:
    """Make text, tokenizer, datasets and slices in `data/reproduction/mixture`."""
    parser = argparse.ArgumentParser(description=__doc__)
    novels.add_source(parser)
    source = parser.parse_args().source
    makers = {"novels": lambda: fiction(source), "documentation": documentation, "code": code}
    files = {domain: FOLDER / "text" / f"{domain}.jsonl" for domain in SHARES}
    for domain, path in files.items():
        if not path.exists():
            write_texts(path, makers[domain]())
    train_tokenizer(FOLDER, list(files.values()))
    prefixes = {domain: tokenize(FOLDER, path) for domain, path in files.items()}
    sources = [f"{prefixes[domain]}:{share}:{domain}" for domain, share in SHARES.items()]
    for name, (tokens, length) in DRAWS.items():
        if not (FOLDER / name / "valid.slice").exists():
            argv: list[object] = [word for source in sources for word in ("--source", source)]
            argv += ["--versions", 4, "--tokens-per-version", tokens, "--valid-tokens", VALID_TOKENS]
            draw(FOLDER / name, *argv, "--seq-length", length)


if __name__ == "__main__":
    main()

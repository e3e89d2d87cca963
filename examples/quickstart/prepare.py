#!/usr/bin/env python3
"""Make the quickstart's data: four data versions that really arrived one after the other.

Version k is the documentation that was new in the k-th of four dated releases of the Python package botocore
(Apache-2.0), in two domains: `operations` (what a service does) and `shapes` (what a field means). Called
again, it continues where it stopped, and does nothing when everything exists. The tools in
`tools/` make the tokenizer, the datasets and the slices.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

FOLDER = Path("data/quickstart")
PACKAGE = "botocore"
RELEASES = {  # version: (release, SHA-256 of its wheel)
    "v1": ("1.12.0", "354dd98082dc1ca8aa127f5aff0e28404363f94a8c13c9a9ddbd24b9a70eb259"),  # 2018
    "v2": ("1.20.0", "634b39ab0d55477cfbffb0e5dff31b7ab4bb171b04a0c69f8bcf65135f26ba94"),  # 2021
    "v3": ("1.29.0", "c706640f8cf9297d2af87fc711394631afc14aaa225c7554e220964b5047b47d"),  # 2022
    "v4": ("1.34.0", "6ec19f6c9f61c3df22fb3e083940ac7946a3d96128db1f370f10aea702bb157f"),  # 2023
}
DOMAINS = ("operations", "shapes")
SHORTEST = 80  # characters; shorter strings are mostly "The name of the resource."
VOCAB_SIZE = 4096
VALID_TOKENS = 60_000
SEED = 1234
RECIPE = {
    "releases": RELEASES,
    "shortest": SHORTEST,
    "vocab": VOCAB_SIZE,
    "valid": VALID_TOKENS,
    "seed": SEED,
}
BLOCK_END = re.compile(r"</(?:p|li|ul|ol|dt|dd|note|important|h\d|tr|pre)\s*>|<br\s*/?>", re.IGNORECASE)
TAG = re.compile(r"<[^>]{0,400}>")
SERVICE = re.compile(r"botocore/data/(?P<name>[^/]+)/[^/]+/service-2\.json(?:\.gz)?$")


class PrepareError(Exception):
    """Failure to make the data; the message gives the reason and the remedy."""


def fetch(release: str, digest: str) -> Path:
    """Return the wheel of a release; download it from pip's package registry unless it is in the cache."""
    cache = FOLDER / "cache"
    pattern = f"{PACKAGE}-{release}-*.whl"
    for wheel in cache.glob(pattern):
        if hashlib.sha256(wheel.read_bytes()).hexdigest() == digest:
            return wheel
        wheel.unlink()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--retries=2", "--timeout=20", f"--dest={cache}"]
    answer = subprocess.run([*command, f"{PACKAGE}=={release}"], capture_output=True, text=True, check=False)
    wheels = list(cache.glob(pattern))
    if answer.returncode or not wheels:
        lines = [line for line in answer.stderr.splitlines() if line.strip()] or ["pip gave no reason"]
        raise PrepareError(
            f"cannot get {PACKAGE} {release} from the package registry: {lines[-1]}\n"
            f"The quickstart needs the registry (or a mirror that pip is configured for) this once; when it is in "
            f"reach, call this again, or put {pattern} into {cache}/"
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != digest:
        raise PrepareError(f"{wheels[0]} is not the release it should be (SHA-256 {found}, not {digest})")
    return wheels[0]


def documentation(node: Any) -> Iterator[str]:
    """Yield all documentation strings below a node of a service's description."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "documentation" and isinstance(value, str):
                yield value
            else:
                yield from documentation(value)
    elif isinstance(node, list):
        for value in node:
            yield from documentation(value)


def plain_text(markup: str) -> str:
    """Return the text of a documentation string: one line per paragraph or list item, no tags."""
    text = html.unescape(TAG.sub("", BLOCK_END.sub("\n", markup)))
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def read_release(wheel: Path) -> dict[str, list[tuple[str, str]]]:
    """Return (service, text) of every documentation string that is long enough, by domain."""
    found: dict[str, list[tuple[str, str]]] = {domain: [] for domain in DOMAINS}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            match = SERVICE.match(name)
            if not match:
                continue
            data = archive.read(name)
            service = json.loads(gzip.decompress(data) if name.endswith(".gz") else data)
            shapes = service.pop("shapes", {})
            for domain, node in zip(DOMAINS, (service, shapes), strict=True):
                texts = (plain_text(markup) for markup in documentation(node))
                found[domain] += [(match["name"], text) for text in texts if len(text) >= SHORTEST]
    return found


def text_file(version: str, domain: str) -> Path:
    return FOLDER / "text" / f"{version}-{domain}.jsonl"


def extract(wheels: list[Path]) -> tuple[int, int]:
    """Write the new text of each release as JSON lines; return its number of documents and bytes."""
    seen: set[str] = set()
    documents = size = 0
    with ProcessPoolExecutor(2) as pool:
        for version, release in zip(RELEASES, pool.map(read_release, wheels), strict=True):
            for domain in DOMAINS:
                lines = []
                for service, text in release[domain]:
                    if text not in seen:
                        seen.add(text)
                        lines.append(
                            json.dumps({"service": service, "text": text}, ensure_ascii=False) + "\n"
                        )
                        size += len(text.encode())
                documents += len(lines)
                write_whole(text_file(version, domain), "".join(lines))
    return documents, size


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is either complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def call_tool(name: str, *arguments: str) -> None:
    """Run one of the project's tools; raise PrepareError with its output if it fails."""
    command = [sys.executable, "-m", f"megatron_lrpath.tools.{name}", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise PrepareError(f"tools/{name}.py failed:\n{(answer.stderr or answer.stdout).strip()}")


def build_tokenizer() -> None:
    """Train the tokenizer on version 1, the only text that a team has when it begins."""
    if not (FOLDER / "tokenizer.model").exists():
        inputs = [str(text_file("v1", domain)) for domain in DOMAINS]
        call_tool(
            "train_tokenizer",
            "--input",
            *inputs,
            "--vocab-size",
            str(VOCAB_SIZE),
            "--seed",
            str(SEED),
            "--output-prefix",
            str(FOLDER / "tokenizer"),
        )


def dataset(version: str, domain: str) -> Path:
    """Return the prefix of an indexed dataset."""
    return FOLDER / "indexed" / f"{version}-{domain}_text_document"


def tokenize(version: str, domain: str) -> None:
    """Make one indexed dataset."""
    prefix = dataset(version, domain)
    if not prefix.with_name(prefix.name + ".idx").exists():
        call_tool(
            "preprocess_data",
            "--input",
            str(text_file(version, domain)),
            "--append-eod",
            "--workers",
            "1",
            "--tokenizer-type",
            "SentencePieceTokenizer",
            "--tokenizer-model",
            str(FOLDER / "tokenizer.model"),
            "--output-prefix",
            str(prefix).removesuffix("_text_document"),
        )


def slice_versions() -> None:
    """Draw validation from all releases, then give each version the rest of its own release."""
    slices = FOLDER / "slices"
    common = ["--seed", str(SEED), "--output", str(slices)]
    if not (slices / "valid.slice").exists():
        everything = [source for version in RELEASES for source in sources(version)]
        call_tool("slice_versions", *everything, "--valid-tokens", str(VALID_TOKENS), *common)
    for version in RELEASES:
        if not (slices / f"{version}.slice").exists():
            call_tool("slice_versions", *sources(version), "--append", *common)


def sources(version: str) -> list[str]:
    """Return the options that name a version's datasets."""
    return [word for domain in DOMAINS for word in ("--source", f"{dataset(version, domain)}::{domain}")]


def start_over_if_changed() -> None:
    """Remove the output of an older recipe; keep the fetched releases."""
    note, recipe = FOLDER / "recipe.json", json.dumps(RECIPE, indent=1)
    if note.exists() and note.read_text() == recipe:
        return
    for made in ("text", "indexed", "slices"):
        shutil.rmtree(FOLDER / made, ignore_errors=True)
    for made in ("tokenizer.model", "tokenizer.vocab"):
        (FOLDER / made).unlink(missing_ok=True)
    write_whole(note, recipe)


def prepare() -> None:
    """Run all steps; skip each whose result exists."""
    start_over_if_changed()
    started = time.monotonic()

    def step(number: int, text: str) -> None:
        print(f"[{number}/4] {text}", file=sys.stderr, flush=True)

    if not all(text_file(version, domain).exists() for version in RELEASES for domain in DOMAINS):
        step(
            1, f"{PACKAGE} {', '.join(release for release, _ in RELEASES.values())} from the package registry"
        )
        with ThreadPoolExecutor(4) as pool:
            wheels = list(pool.map(lambda wanted: fetch(*wanted), RELEASES.values()))
        documents, size = extract(wheels)
        step(2, f"{documents:,} documents, {size / 1e6:.1f} MB of text; training the tokenizer")
    build_tokenizer()
    step(3, "tokenizing")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: tokenize(*job), [(v, d) for v in RELEASES for d in DOMAINS]))
    step(4, "drawing four versions and the validation set")
    slice_versions()
    print(f"data in {FOLDER}, {time.monotonic() - started:.0f} s", file=sys.stderr)


def main() -> int:
    """Prepare the data in `data/quickstart` of the current folder; return the exit status."""
    if all((FOLDER / "slices" / f"{name}.slice").exists() for name in (*RELEASES, "valid")):
        note = FOLDER / "recipe.json"
        if note.exists() and note.read_text() == json.dumps(RECIPE, indent=1):
            print(f"data in {FOLDER}, already prepared", file=sys.stderr)
            return 0
    try:
        prepare()
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; call again to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    sys.exit(main())

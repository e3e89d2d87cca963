#!/usr/bin/env python3
"""Try the recipe on this machine: a few megabytes in FineWeb's form, made of Python's own library, and a tiny model.

Writes Parquet files with FineWeb's columns below FOLDER/fineweb, a small copy of the plan, and calls recipe.sh with all
steps but the download. A tenth of each crawl repeats documents of the crawls before it.

  python examples/public/203m/trial.py /tmp/trial
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[2]
DUMPS = ("CC-MAIN-2021-04", "CC-MAIN-2022-05", "CC-MAIN-2023-06", "CC-MAIN-2024-10")
REPEATED = 0.1  # share of a crawl's documents that earlier crawls have
LENGTH, BATCH = 64, 8
STEPS_PER_MEGABYTE = 150  # steps that the text of a crawl is enough for, at about 3 bytes per token


def documents(megabytes: float) -> list[str]:
    """Return texts of 500 to 4,000 characters from the source files of Python's library."""
    texts: list[str] = []
    size = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        for start in range(0, len(text), 4000):
            if len(part := text[start : start + 4000]) > 500:
                texts.append(part)
                size += len(part)
        if size > megabytes * 1e6:
            break
    return texts


def write_crawl(path: Path, dump: str, texts: Sequence[str]) -> None:
    """Write a Parquet file with FineWeb's columns."""
    count = len(texts)
    columns = {
        "text": list(texts),
        "id": [f"<urn:uuid:{number:032x}>" for number in range(count)],
        "dump": [dump] * count,
        "url": [f"https://example.org/{number}" for number in range(count)],
        "date": [f"{dump[8:12]}-01-20T00:00:00Z"] * count,
        "file_path": [f"s3://commoncrawl/crawl-data/{dump}/warc/{number}.warc.gz" for number in range(count)],
        "language": ["en"] * count,
        "language_score": [0.9] * count,
        "token_count": [len(text) // 4 for text in texts],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def write_crawls(folder: Path, megabytes: float) -> None:
    """Write a file for each crawl; each repeats some documents of the crawls before it."""
    texts = documents(megabytes * len(DUMPS))
    order = random.Random(1)
    order.shuffle(texts)
    size = len(texts) // len(DUMPS)
    for number, dump in enumerate(DUMPS):
        own, before = texts[number * size : (number + 1) * size], texts[: number * size]
        again = order.sample(before, int(REPEATED * size)) if before else []
        write_crawl(folder / "fineweb/data" / dump / "000_00000.parquet", dump, [*own, *again])


def write_plan(folder: Path, steps: int) -> Path:
    """Write the recipe's plan for the tiny model and this data; return its path."""
    plan = yaml.safe_load((HERE / "plan.yaml").read_text(encoding="utf-8"))
    plan |= {"model": "tiny", "output": str(folder / "runs")}
    plan["schedule"]["warmup_steps"] = 2
    plan["batch"] = {"global_batch_size": BATCH, "micro_batch_size": BATCH, "seq_length": LENGTH}
    plan["tokenizer"]["model"] = str(folder / "tokenizer.model")
    plan["data"] = {"slices": str(folder / "slices"), "valid": str(folder / "slices/valid")}
    plan["megatron"] = {name: value for name, value in plan["megatron"].items() if name != "bf16"}
    for version in plan["versions"]:
        version["steps"] = steps
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf-8")
    return path


def main() -> int:
    """Write the data and call the recipe; return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="everything is written there; it must not exist")
    parser.add_argument("--megabytes", type=float, default=1.0, help="of text in each crawl (default: 1)")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True)
    steps = int(args.megabytes * STEPS_PER_MEGABYTE)
    write_crawls(folder, args.megabytes)
    settings = {
        "ROOT": str(folder),
        "PLAN": str(write_plan(folder, steps)),
        "TOKENS": str(steps * BATCH * LENGTH),
        "VALID": "4000",
        "LENGTH": str(LENGTH),
        "VOCABULARY": "2000",
        "WORKERS": "2",
        "PYTHON": sys.executable,
        "LRPATH": shutil.which("lrpath", path=str(Path(sys.executable).parent)) or "lrpath",
    }
    argv = ["bash", str(HERE / "recipe.sh"), "tokenizer", "tokenize", "draw", "plan", "run", "report"]
    return subprocess.call(argv, cwd=PROJECT, env={**os.environ, **settings})


if __name__ == "__main__":
    sys.exit(main())

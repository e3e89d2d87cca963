#!/usr/bin/env python3
"""Time and peak memory of comparing a delivery's documents with those of all earlier versions.

Makes up the hashes of --new documents in one dataset and of --earlier ones in datasets of 100 million, each
in two slices, then compares them in a process of its own, as slice_versions.py and `lrpath update` do.

  python benchmarks/duplicates.py --new 100e6 --earlier 400e6
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DATASET = 100_000_000  # documents of an earlier dataset
CHUNK = 1 << 22
REPEATED = 20  # one in this many new documents repeats an earlier one


def make_hashes(prefix: Path, count: int, seed: int, of: Path | None = None) -> None:
    """Write the hashes of `count` documents and their record; some hashes are those of the dataset `of`."""
    from megatron_lrpath.data.document_hashes import DTYPE, KEY, describe
    from megatron_lrpath.sealed import write_sealed
    from megatron_lrpath.tokenizers.prints import TokenizerSpec

    rng = np.random.Generator(np.random.PCG64(seed))
    path = Path(f"{prefix}.hashes")
    with path.open("wb") as out:
        for start in range(0, count, CHUNK):
            block = rng.integers(0, 2**64, min(CHUNK, count - start), dtype=np.uint64)
            if of is not None:
                some = block[::REPEATED]
                some[:] = np.fromfile(
                    f"{of}.hashes", dtype=DTYPE, count=len(some), offset=8 * (start // REPEATED)
                )
            block.tofile(out)
    facts = TokenizerSpec("NullTokenizer", vocab_size=1000).facts
    record = {"format": 1, "fingerprint": prefix.name, "tokenizer": facts, KEY: describe(path, 999)}
    write_sealed(f"{prefix}.tokens.json", record)


def make(folder: Path, new: int, earlier: int) -> None:
    """Write the hashes of the earlier datasets, then of the new one, which repeats some of the first."""
    counts = [min(DATASET, earlier - start) for start in range(0, earlier, DATASET)]
    for number, count in enumerate(counts):
        make_hashes(folder / f"old{number}", count, number)
    make_hashes(folder / "new", new, 1000, folder / "old0")
    (folder / "counts.json").write_text(json.dumps({"new": new, "earlier": counts}))


def compare(folder: Path) -> None:
    """Compare the datasets and print the result."""
    from megatron_lrpath.data.duplicates import NewDocuments, find_duplicates
    from megatron_lrpath.data.slice import Slice, SliceSource

    counts = json.loads((folder / "counts.json").read_text())
    earlier = []
    for number, count in enumerate(counts["earlier"]):
        half = np.random.Generator(np.random.PCG64(number)).random(count, dtype=np.float32) < 0.5
        prefix = folder / f"old{number}"
        for name, mask in ((f"v{2 * number + 1}", half), (f"v{2 * number + 2}", ~half)):
            documents = np.flatnonzero(mask).astype(np.int32)
            earlier.append(Slice(name, 1, (SliceSource(prefix, prefix.name, "web", documents, 1),)))
    new = NewDocuments(folder / "new", "new", np.ones(counts["new"], dtype=bool))
    begin = time.perf_counter()
    found = find_duplicates([new], earlier, [])
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "repeats": found.repeats, "by_slice": found.by_slice}))


def main() -> int:
    """Make the data, compare in another process, print seconds, processor time and peak memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--new", type=float, default=100e6, help="documents of the delivery (default: 100e6)")
    parser.add_argument("--earlier", type=float, default=400e6, help="documents of earlier versions (400e6)")
    parser.add_argument(
        "--folder", type=Path, help="for the data, 8 bytes a document (default: a temporary one)"
    )
    parser.add_argument("--compare", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compare:
        compare(args.compare)
        return 0
    folder = args.folder or Path(tempfile.mkdtemp(prefix="duplicates-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        make(folder, int(args.new), int(args.earlier))
        argv = [sys.executable, __file__, "--compare", str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        begin = time.perf_counter()
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(argv, stdout=output, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            whole = time.perf_counter() - begin
            output.seek(0)
            print(output.read().strip())
        if status:
            return 1
        busy = usage.ru_utime + usage.ru_stime
        print(f"{whole:.0f} s, {busy:.0f} s of processor time, {usage.ru_maxrss / 2**20:.2f} GiB at most")
    finally:
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())

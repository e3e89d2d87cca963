#!/usr/bin/env python3
"""Time and peak memory of drawing versions out of many documents, and of opening a large slice for training.

Makes up indexed datasets of real sizes (.idx whole, .bin sparse: drawing reads no tokens), then measures each
step in a process of its own: the draw, the check, and the opening of one slice of --open-documents documents,
first with an empty index cache and then with a full one.

  python benchmarks/slicing.py --documents 100e6 --sources 20 --versions 4 --open-documents 10e6
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MEAN_LOG, SPREAD = 6.2, 1.1  # lengths are lognormal: a mean of about 900 tokens, as in web text
CHUNK = 1 << 22
OPENED = "opened_documents"


def make_dataset(prefix: Path, documents: int, seed: int) -> int:
    """Write PREFIX.idx for `documents` documents and a sparse PREFIX.bin; return the number of tokens."""
    rng = np.random.Generator(np.random.PCG64(seed))
    lengths = np.empty(documents, dtype="<i4")
    for start in range(0, documents, CHUNK):
        part = rng.lognormal(MEAN_LOG, SPREAD, min(CHUNK, documents - start))
        lengths[start : start + len(part)] = np.maximum(part, 1)
    ends = np.cumsum(lengths, dtype="<i8") * 2
    tokens = int(ends[-1]) // 2
    with open(f"{prefix}.idx", "wb") as index:
        index.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, documents, documents + 1))
        lengths.tofile(index)
        ends -= 2 * lengths.astype("<i8")
        ends.tofile(index)
        np.arange(documents + 1, dtype="<i8").tofile(index)
    with open(f"{prefix}.bin", "wb") as stream:
        stream.write(struct.pack("<Q", seed))
        stream.truncate(tokens * 2)
    return tokens


def measured(command: list[str]) -> dict[str, float]:
    """Run a process that must succeed; return its seconds and peak memory (GiB), or its answer."""
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment())
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        output.seek(0)
        errors.seek(0)
        if status:
            raise SystemExit(f"{' '.join(command)} failed:\n{errors.read()}")
        last = output.read().strip().splitlines()[-1]
    return json.loads(last) if OPENED in last else {"seconds": seconds, "peak_gib": usage.ru_maxrss / 2**20}


def environment() -> dict[str, str]:
    """Return the environment of measured processes: this checkout, and one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def open_for_training(path: Path, seq_length: int) -> dict[str, float]:
    """Open a slice as training does; return what this costs beyond the imports."""
    from megatron_lrpath.data.slice import Slice, available_samples, check_disjoint, verify_slices
    from megatron_lrpath.data.versioned import build_chained

    sys.path.insert(0, str(ROOT))
    from tests.support.data_fixtures import dataset_config

    config = dataset_config(seq_length)
    anonymous, peak = memory("RssAnon"), memory("VmHWM")
    begin = time.perf_counter()
    one = Slice.load(path)
    verify_slices([one])
    check_disjoint([one])
    loaded = time.perf_counter()
    samples = available_samples(one, seq_length)
    dataset = build_chained([one], [samples], config, 1)
    built = time.perf_counter()
    assert len(dataset[samples - 1]["tokens"]) == seq_length
    return {
        OPENED: one.documents,
        "samples": samples,
        "load_and_verify_seconds": loaded - begin,
        "seconds": built - begin,
        "kept_gib": memory("RssAnon") - anonymous,
        "extra_peak_gib": memory("VmHWM") - peak,
        "index_gib": sum(path.stat().st_size for path in (path.parent / ".cache").iterdir()) / 2**30,
    }


def memory(field: str) -> float:
    """Return a field of /proc/self/status in GiB: RssAnon (own memory), VmHWM (peak, with mapped files)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


def draw_command(folder: Path, prefixes: list[Path], tokens: int, versions: int, output: str) -> list[str]:
    """Return the call of slice_versions.py that draws nearly all of the sources."""
    sources = [word for prefix in prefixes for word in ("--source", str(prefix))]
    amounts = ["--versions", str(versions), "--tokens-per-version", str(tokens), "--valid-tokens", "20e6"]
    tool = [sys.executable, str(ROOT / "tools/slice_versions.py")]
    return [*tool, *sources, *amounts, "--output", str(folder / output), "--json"]


def run(args: argparse.Namespace, folder: Path) -> None:
    """Make the data, measure, print one line per step."""
    documents, share = int(args.documents), int(args.documents) // args.sources
    prefixes = [folder / f"source{number:02d}" for number in range(args.sources)]
    total = sum(make_dataset(prefix, share, number + 1) for number, prefix in enumerate(prefixes))
    print(f"{documents:,} documents, {total:,} tokens in {args.sources} sources")
    tokens = int((total - 20e6) * 0.99 / args.versions)
    report("draw", measured(draw_command(folder, prefixes, tokens, args.versions, "slices")))
    sizes = sum(path.stat().st_size for path in (folder / "slices").glob("*.slice"))
    print(f"slice files: {sizes / 2**20:.1f} MiB, {sizes / documents:.2f} bytes per document")
    check = [sys.executable, str(ROOT / "tools/check_slices.py"), str(folder / "slices"), "--json"]
    report("check", measured(check))
    big = folder / "big"
    make_dataset(big, int(args.open_documents * 1.05), 99)
    one = [sys.executable, str(ROOT / "tools/slice_versions.py"), "--output", str(folder / "open"), "--json"]
    measured([*one, "--documents", f"v1={big}:0-{int(args.open_documents)}"])
    opening = [sys.executable, __file__, "--open", str(folder / "open/v1.slice")]
    for name in ("open, no index yet", "open, index there"):
        report(name, measured([*opening, "--seq-length", str(args.seq_length)]))


def report(name: str, figures: dict[str, float]) -> None:
    """Print a line of figures."""
    print(f"{name}: " + ", ".join(f"{key} {value:,.2f}" for key, value in figures.items()), flush=True)


def main() -> None:
    """Run the benchmark, or (--open) the part of it that is measured in another process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=float, default=100e6, help="in all sources together")
    parser.add_argument("--sources", type=int, default=20)
    parser.add_argument("--versions", type=int, default=4)
    parser.add_argument("--open-documents", type=float, default=10e6)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--folder", type=Path, help="where to make up the data (20 bytes per document)")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        print(json.dumps(open_for_training(args.open, args.seq_length)))
        return
    folder = Path(tempfile.mkdtemp(prefix="slicing-", dir=args.folder))
    try:
        run(args, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

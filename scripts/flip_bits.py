"""Flip single bits in what a plan's runs leave and read, and count what is accepted in silence.

    .venv/bin/python scripts/flip_bits.py [--flips 300] [--seed 1]

Trains a tiny plan on the CPU, flips one bit at every kind of place (tensor data, metadata, common state, manifest,
tracker, `.bin`, `.idx`, slice, record, prepared chats, index cache, lineage, results), and lets one of its readers
read it: start, resume, branch, fine-tuning, evaluation, export, merge, report, status, check_slices.py --full. A flip
is found if the reader refuses it, names it, or has the outcome of the undamaged file. Prints a table; status 1 if a
flip was accepted silently or a stack trace was printed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.flips import READERS, Flip, build, flip_bits


def tell(flip: Flip) -> None:
    """Print a silently accepted flip or one with a stack trace."""
    if flip.taken == "silent" or flip.trace:
        what = "accepted in silence" if flip.taken == "silent" else "a stack trace"
        print(f"{what}: byte {flip.byte} bit {flip.bit} of {flip.path}, {flip.reader}", flush=True)
        print(*flip.said[:12], sep="\n    ", flush=True)


def main() -> int:
    """Flip bits and print the results; return 1 if a flip was accepted silently or printed a stack trace."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--flips", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder) / "plan"  # readers look for the files where they were trained
        at.mkdir()
        build(at)
        base = at.rename(Path(folder) / "base")
        flips = flip_bits(base, at, args.flips, args.seed, tuple(READERS), tell)
    counts = Counter((flip.kind, flip.taken) for flip in flips)
    for kind in dict.fromkeys(flip.kind for flip in flips):
        print(
            f"{kind:16}",
            *(f"{counts[kind, how]:4} {how}" for how in ("refused", "named", "identical", "silent")),
        )
    total = Counter(flip.taken for flip in flips)
    traces = sum(flip.trace for flip in flips)
    print(
        f"{len(flips)} flips (seed {args.seed}): {total['refused']} refused, {total['named']} named, "
        f"{total['identical']} without an effect, {total['silent']} accepted in silence, {traces} stack traces; "
        f"{time.monotonic() - begun:.0f} s"
    )
    return 1 if total["silent"] or traces else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Prove what slices claim: files whole, sources there and unchanged, tokens as counted, no document in two.

  check_slices.py data/slices

Exit status: 0 if all of it holds, 1 if anything does not (every failure is named), 2 for bad input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Run the tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "slices", nargs="+", type=Path, metavar="PATH", help="slice files, or folders of them"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    from megatron_lrpath.console import run_script
    from megatron_lrpath.data.slice_tools import check_slices

    return run_script(lambda: check_slices(args))


if __name__ == "__main__":
    sys.exit(main())

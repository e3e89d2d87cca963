#!/usr/bin/env python3
"""Import a Hugging Face LLaMA or Qwen2 folder as a Megatron checkpoint, so that a plan can start from it.

  import_hf.py models/Qwen2-1.5B --output imported/qwen2

Writes imported/qwen2 (weights for any parallel layout, tokenizer) and imported/qwen2/plan.yaml, the lines
for a plan whose runs without a parent (main path, PTFS, the first CPT version) are to start from these
weights. Only safetensors and JSON are read; code in the folder is never run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_lrpath.console import run_tool


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="the Hugging Face folder, on this machine"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as stored)"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Import, and say how to go on."""
    from megatron_lrpath.export.importer import SNIPPET, describe, import_folder
    from megatron_lrpath.export.weights import DTYPES

    model = import_folder(args.folder, args.output, DTYPES[args.dtype] if args.dtype else None)
    print(f"{args.output}: {describe(model)}")
    print(f"lines for a plan: {args.output / SNIPPET}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; 0, or 2 for bad input."""
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())

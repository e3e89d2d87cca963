#!/usr/bin/env python3
"""Export trained versions as Hugging Face folders: weights, configuration, tokenizer, model card.

  export_hf.py examples/quickstart/plan.yaml --run branch-v2
  export_hf.py runs/mine/checkpoints --step 2000 --output exported/mine

No GPU and no process group is needed, and one tensor is in memory at a time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_lrpath.commands import export
from megatron_lrpath.console import ToolParser, run_tool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return 0, or 2 for bad input."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    export.add_arguments(parser)
    return run_tool(parser, export.execute, argv)


if __name__ == "__main__":
    sys.exit(main())

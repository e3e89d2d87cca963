"""Evaluates checkpoints of a plan's runs, in a process of its own: command line and device, then `perplexity`."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import load_plan
from megatron_lrpath.runs import failure
from megatron_lrpath.runs.results import Target
from megatron_lrpath.training.device import DEVICES, activate, choose_device


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The worker's own arguments, and the Megatron arguments that may follow."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", required=True, metavar="PARADIGM/RUN[@STEP]")
    parser.add_argument("--device", default="auto", choices=DEVICES)
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Evaluate; a user's error is one message and exit code 2."""
    for category in (DeprecationWarning, FutureWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category)
    args, extra = parse(sys.argv[1:] if argv is None else argv)
    try:
        with failure.recorded():
            plan = load_plan(args.plan)
            targets = [Target.named(plan, name) for name in args.runs]
            device = choose_device(args.device)
            activate(device)
            from megatron_lrpath.evaluate import (
                perplexity,  # imports Megatron: only once the device is activated
            )

            perplexity.evaluate_targets(plan, targets, device, extra)
    except UserError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"lrpath: error: {error}", file=sys.stderr, flush=True)
        os._exit(2)


if __name__ == "__main__":
    main()

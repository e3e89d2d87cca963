"""Evaluate checkpoints of a plan's runs in a separate process: command line and device, then `perplexity`."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

from megatron_lrpath.errors import UserError
from megatron_lrpath.exits import BAD_INPUT, leave_at_once
from megatron_lrpath.plan import load_plan
from megatron_lrpath.runs import failure
from megatron_lrpath.runs.results import Target
from megatron_lrpath.training.machine import DEVICES, activate, choose_device, lasting_imports


def main(argv: list[str] | None = None) -> None:
    """Evaluate checkpoints; Megatron's arguments can follow this program's. Report a user's error in one
    message with exit status 2.
    """
    for category in (DeprecationWarning, FutureWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category)
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", required=True, metavar="PARADIGM/RUN[@STEP]")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--device", default="auto", choices=DEVICES)
    args, extra = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    try:
        with failure.recorded():
            plan = load_plan(args.plan)
            targets = [Target.named(plan, name) for name in args.runs]
            device = choose_device(args.device)
            activate(device)
            with lasting_imports():
                # imports Megatron, which the device must precede
                from megatron_lrpath.evaluate import perplexity

            perplexity.evaluate_targets(plan, targets, device, extra, args.again)
    except UserError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"lrpath: error: {error}", file=sys.stderr, flush=True)
        leave_at_once(BAD_INPUT)


if __name__ == "__main__":
    main()

"""`lrpath samples`: the documents and the text that a step of a run was trained on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_lrpath.console import quiet
from megatron_lrpath.errors import UserError

HELP = "print the documents and the text of a step's batch"
EXAMPLE = "lrpath samples runs/quickstart/ours/main --step 120"
SHOWN = 300  # characters of a sample
FACTS = ("lr", "loss", "grad_norm")  # of a step, from its history


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run's folder, the step, and the length of the text."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder: OUTPUT/<paradigm>/<run>")
    parser.add_argument("--step", type=int, required=True, help="the step (the first one of a plan is 1)")
    parser.add_argument(
        "--plan", type=Path, help="the plan file (default: the plan that the run was started with)"
    )
    parser.add_argument(
        "--characters", type=int, default=SHOWN, help=f"characters of each sample; 0: all (default: {SHOWN})"
    )
    parser.add_argument("--json", action="store_true", help="print JSON: documents and the whole text")


def execute(args: argparse.Namespace) -> int:
    """Print the batch; return 0."""
    quiet()
    from megatron_lrpath.training import machine

    machine.activate("cpu")
    from megatron_lrpath.training.batches import open_batches

    batches = open_batches(*named_run(args.run, args.plan))
    samples = batches.of_step(args.step)
    if args.json:
        print(json.dumps({"step": args.step, "samples": samples}, ensure_ascii=False))
        return 0
    print(heading(args.run, args.step, samples))
    for sample in samples:
        show(sample, args.characters)
    return 0


def named_run(folder: Path, plan: Path | None) -> tuple[Path, str, str]:
    """Return the plan, the paradigm and the run of a run's folder.

    Raises:
        UserError: the folder does not belong to a run, or its plan is unknown.
    """
    from megatron_lrpath.runs.lineage import read_lineage

    lineage = read_lineage(folder)
    if lineage is None:
        raise UserError(f"{folder}: not the folder of a run that was started (it has no lineage)")
    known = [start["plan"] for start in lineage["starts"] if start.get("plan")]
    path = plan or (Path(known[-1]) if known else None)
    if path is None or not path.is_file():
        raise UserError(f"{folder}: its plan{f' {path}' if path else ''} is not there; name it with --plan")
    resolved = folder.resolve()
    return path, resolved.parent.name, resolved.name


def heading(folder: Path, step: int, samples: list[dict[str, Any]]) -> str:
    """Return the step, its samples, and its line in the history as text."""
    from megatron_lrpath.runs.history import row_of_step

    row = row_of_step(folder, step)
    facts = [f"{name} {value:.6g}" for name in FACTS if (value := getattr(row, name, None)) is not None]
    facts += ["a loss spike"] if row and row.spike else []
    facts += ["update skipped"] if row and row.skipped else []
    first, last = samples[0]["sample"], samples[-1]["sample"]
    return f"step {step}: samples {first} to {last}" + (f" ({', '.join(facts)})" if facts else "")


def show(sample: dict[str, Any], characters: int) -> None:
    """Print one sample: its source, and its text."""
    again = ", read again" if sample.get("replayed") else ""
    print(f"\nsample {sample['sample']}, version {sample['version']}{again}")
    for place in sample["documents"]:
        end = place["offset"] + place["tokens"]
        print(f"  {place['dataset']} document {place['document']}, tokens {place['offset']} to {end - 1}")
    text = sample["text"]
    shown = text[:characters] if characters else text
    print("  | " + "\n  | ".join(shown.splitlines() or [""]) + (" …" if len(shown) < len(text) else ""))

"""`lrpath export`: a run's checkpoint as a Hugging Face folder."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lrpath.commands.options import paradigms_of
from megatron_lrpath.console import quiet, say_next
from megatron_lrpath.errors import UserError
from megatron_lrpath.paradigms import OURS, PARADIGMS
from megatron_lrpath.runs.folder import RunFolder

if TYPE_CHECKING:
    from megatron_lrpath.export.folder import Exported, Wishes
    from megatron_lrpath.plan import Plan, Run

HELP = "write trained versions as Hugging Face folders (LLaMA, Qwen2, Qwen3, Mistral): weights, tokenizer, model card"
EXAMPLE = "lrpath export examples/quickstart/plan.yaml --run branch-v2"
UNITS = {"": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3}


def shard_size(text: str) -> int:
    """Parse the size of a shard in bytes: `500MB` -> 500,000,000."""
    match = re.fullmatch(r"(\d+)(KB|MB|GB|)", text.upper())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 4GB")
    return int(match[1]) * UNITS[match[2]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the selection of the models, and the settings of the export."""
    parser.add_argument(
        "source", type=Path, metavar="PLAN", help="the plan file; or a folder of Megatron checkpoints"
    )
    parser.add_argument(
        "--paradigm",
        choices=PARADIGMS,
        help=f"default: {OURS.name}; with --run the paradigm with a run of this name",
    )
    parser.add_argument(
        "--run",
        metavar="NAME",
        help="the run to export (default: every trained version, and every fine-tuned one)",
    )
    parser.add_argument("--step", type=int, metavar="STEP", help="the checkpoint's step (default: the last)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder to write (default: huggingface in the run's folder)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as stored)"
    )
    parser.add_argument(
        "--max-shard-size",
        type=shard_size,
        default="4GB",
        metavar="SIZE",
        help="of a weights file (default: 4GB)",
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="where the tokenizer is now, if it was moved")
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="rows of the embeddings to keep (default: the tokenizer's tokens)",
    )
    parser.add_argument("--force", action="store_true", help="replace earlier exports")


def execute(args: argparse.Namespace) -> int:
    """Export, and print the written files; return 0."""
    quiet()
    from megatron_lrpath.data.record import require_tokenizer
    from megatron_lrpath.export.card import origin_of
    from megatron_lrpath.export.folder import Wishes, export_checkpoint, is_export_of
    from megatron_lrpath.plan import load_plan

    wishes = Wishes(args.dtype, args.max_shard_size, args.tokenizer, args.vocab_size, args.force)
    if args.source.is_dir():
        print_exported(export_folder(args, wishes))
        return 0
    plan = load_plan(args.source)
    require_tokenizer(plan, args.tokenizer)
    for run in chosen(plan, args):
        fetch_model(plan, run, args.step)
        step, checkpoint = find_checkpoint(RunFolder(plan.folder(run)).checkpoints, args.step)
        if args.step is None and step != run.last_step:
            print(f"{run.name}: not trained to its end ({step} of {run.last_step} steps)", file=sys.stderr)
        target = args.output or RunFolder(plan.folder(run)).exported
        last = run, target
        if args.run is None and wishes == Wishes() and is_export_of(target, plan.folder(run), step):
            print(f"{target}: is of step {step:,} already (--force exports it again, with the card of now)")
            continue
        print_exported(export_checkpoint(checkpoint, target, origin_of(plan, run, step), wishes))
    tell_next(plan, *last)
    return 0


def tell_next(plan: Plan, run: Run, folder: Path) -> None:
    """Print the next commands: to try the model, and to push it to a hub."""
    path, name = shlex.quote(str(plan.path)), f"{plan.name}-{run.name}"
    see = f"lrpath chat {path}" if run.is_sft else f"lrpath generate {path}"
    after = "" if run.is_sft else ' "some text"'
    say_next(f"{see} --paradigm {run.paradigm} --run {run.name}{after}")
    print(f"to a hub: hf upload USER/{name} {shlex.quote(str(folder))}")
    if plan.license is None:
        print("  (the model card names no license: `license:` in the plan)", file=sys.stderr)


def chosen(plan: Plan, args: argparse.Namespace) -> list[Run]:
    """Return the named run, or all trained versions' runs."""
    from megatron_lrpath.runs.results import is_complete, model_runs, nothing_there

    if args.run:
        return [plan.carried_out(plan.run(paradigms_of(args, plan)[0], args.run))]
    paradigm = args.paradigm or OURS.name
    runs = [run for run in model_runs(plan, [paradigm]) if is_complete(plan.folder(run), run)]
    if not runs:
        raise nothing_there(plan, f"nothing to export, no version of {paradigm} is trained yet")
    if (args.output or args.step is not None) and len(runs) > 1:
        raise UserError(
            f"--output and --step are for one run: add --run, one of {', '.join(r.name for r in runs)}"
        )
    return runs


def export_folder(args: argparse.Namespace, wishes: Wishes) -> Exported:
    """Export from a folder of checkpoints, or the folder of one step, without a plan."""
    from megatron_lrpath.export.card import Origin
    from megatron_lrpath.export.folder import export_checkpoint

    if args.output is None:
        raise UserError(f"{args.source}: give --output, the folder to write.")
    if (args.source / ".metadata").is_file():
        name = args.source.name.removeprefix("iter_")
        step, checkpoint = (int(name) if name.isdigit() else 0), args.source
    else:
        step, checkpoint = find_checkpoint(args.source, args.step)
    return export_checkpoint(checkpoint, args.output, Origin(step), wishes)


def fetch_model(plan: Plan, run: Run, step: int | None) -> None:
    """Fetch the checkpoint of `step`, or of a complete run's end, if only the plan's archive has it."""
    from megatron_lrpath.runs.archive import fetch_missing
    from megatron_lrpath.runs.results import is_complete

    if step is None and not is_complete(plan.folder(run), run):
        return  # its newest checkpoint is in no archive
    fetch_missing(plan, [(run, run.last_step if step is None else step)])


def find_checkpoint(folder: Path, step: int | None) -> tuple[int, Path]:
    """Return step and folder of a complete checkpoint: the requested one, else the newest; an imported model
    is step 0.
    """
    from megatron_lrpath.runs.checkpoints import checkpoint_folder, latest_step, require_checkpoint

    if step is not None:
        require_checkpoint(folder, step)
        return step, checkpoint_folder(folder, step)
    newest = latest_step(folder)
    if newest is not None:
        return newest, checkpoint_folder(folder, newest)
    if (folder / "release" / ".metadata").is_file():
        return 0, folder / "release"
    raise UserError(f"{folder}: there is no complete checkpoint; train the run first (lrpath run PLAN).")


def print_exported(exported: Exported) -> None:
    """Print one line for each export, and its notes."""
    files = "1 file" if len(exported.weights) == 1 else f"{len(exported.weights)} files"
    print(f"{exported.folder}: {exported.kind}, {files} of weights", flush=True)
    for note in exported.notes:
        print(f"  note: {note}", file=sys.stderr)

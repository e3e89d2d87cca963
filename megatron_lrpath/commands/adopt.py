"""`lrpath adopt`: make the checkpoint of another training the beginning of a plan's main path."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lrpath.commands.options import add_plan, count_from
from megatron_lrpath.console import quiet
from megatron_lrpath.errors import UserError
from megatron_lrpath.paradigms import OURS

if TYPE_CHECKING:
    from megatron_lrpath.plan import Plan
    from megatron_lrpath.training.adoption import Trained
    from megatron_lrpath.upkeep.adopt import Adoption

HELP = (
    "begin a main path with a checkpoint that plain Megatron trained at a constant rate, or an imported model"
)
EXAMPLE = "lrpath adopt plan.yaml --checkpoint old/checkpoints --step 120000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plan, the checkpoint, and the data that it was trained on."""
    add_plan(parser)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="the other training's folder of checkpoints (it is only read), or a folder of tools/import_hf.py",
    )
    parser.add_argument(
        "--step", type=count_from(1), metavar="S", help="the checkpoint's step (default: the newest one)"
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="SLICE",
        help="a slice, in the plan's folder of slices, that it was trained on; may be repeated (default: unknown)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, write nothing")


def execute(args: argparse.Namespace) -> int:
    """Check, copy and record the checkpoint; return 0."""
    quiet()
    from megatron_lrpath.plan import load_plan
    from megatron_lrpath.runs.checkpoints import RELEASE, latest_step
    from megatron_lrpath.upkeep.adopt import carry_out
    from megatron_lrpath.upkeep.quiet import at_rest

    plan = load_plan(args.plan)
    if not args.checkpoint.is_dir():
        raise UserError(f"--checkpoint {args.checkpoint}: there is no such folder")
    newest = latest_step(args.checkpoint)
    if (args.checkpoint / RELEASE).is_dir() and newest is None:
        return imported(plan, args)
    step = args.step or newest
    if step is None:
        raise UserError(f"--checkpoint {args.checkpoint}: it has no complete checkpoint")
    if args.dry_run:
        adoption, trained = prepared(plan, args.checkpoint, step, args.data)
        tell(adoption, trained)
        print("nothing was written (--dry-run)")
        return 0
    Path(plan.output).mkdir(parents=True, exist_ok=True)
    with at_rest(plan):
        adoption, trained = prepared(plan, args.checkpoint, step, args.data)
        if adoption.is_done:
            print(f"nothing to do: {adoption.root} has the adopted checkpoint of step {step:,} already")
            return 0
        tell(adoption, trained)
        carry_out(adoption)
    print(f"next: lrpath plan {shlex.quote(str(plan.path))}")
    return 0


def prepared(plan: Plan, root: Path, step: int, data: list[str]) -> tuple[Adoption, Trained]:
    """Check the adoption and return it. Raise UserError if the checkpoint does not fit."""
    from megatron_lrpath.runs.checkpoints import checkpoint_folder
    from megatron_lrpath.training import machine
    from megatron_lrpath.upkeep.adopt import prepare, require_flat, require_rate

    require_flat(checkpoint_folder(root, step))
    machine.activate("cpu")
    from megatron_lrpath.training.adoption import examine  # imports Megatron, after the device is chosen

    trained = examine(plan, checkpoint_folder(root, step), step)
    adoption = prepare(plan, root, step, trained.samples, data)
    require_rate(adoption, trained.rate)
    return adoption, trained


def tell(adoption: Adoption, trained: Trained) -> None:
    """Print what is adopted and where the main path continues."""
    from megatron_lrpath.wording import listing, plural, short_number

    plan, adopted = adoption.plan, adoption.adopted
    tokens = short_number(adopted.samples * plan.batch.seq_length)
    data = listing(list(adopted.data)) if adopted.data else "unknown"
    print(
        f"{adoption.source}: step {adopted.step:,}, {adopted.samples:,} samples, {tokens} tokens; data: {data}"
    )
    print(f"  copied to {adoption.root}; the original stays as it is")
    print(
        f"{plan.path}: the main path continues from step {adopted.step:,} at {trained.rate:g} with "
        f"{plan.versions[0].name}; its costs count from there; ptfs and cpt cannot be trained"
    )
    for note in trained.notes:
        print(f"  {note}")
    first = plan.runs(OURS.name)[1]
    print(f"  {first.name} leaves it at step {first.first_step:,}, {plural(first.steps, 'step')} long")


def imported(plan: Plan, args: argparse.Namespace) -> int:
    """Make the weights of an imported folder, which have no optimizer state, the start of the plan's runs."""
    from megatron_lrpath.plan.file.edit import write_text
    from megatron_lrpath.training import machine
    from megatron_lrpath.upkeep.adopt import prepare_weights

    if args.step:
        raise UserError(
            f"--checkpoint {args.checkpoint}: an imported model has no step and no optimizer state; leave --step out. "
            "The runs begin with it at step 0."
        )
    text, adopting = prepare_weights(plan, args.checkpoint, args.data)
    machine.activate("cpu")
    # imports Megatron, after the device is chosen
    from megatron_lrpath.training.adoption import examine_weights

    notes = examine_weights(plan, args.checkpoint)
    if not text:
        print(f"nothing to do: {plan.path} has adopted {args.checkpoint} already")
        return 0
    tell_imported(adopting, args.checkpoint, notes)
    if args.dry_run:
        print("nothing was written (--dry-run)")
        return 0
    write_text(plan.path, text)
    print(f"next: lrpath plan {shlex.quote(str(plan.path))}")
    return 0


def tell_imported(plan: Plan, folder: Path, notes: list[str]) -> None:
    """Print which weights the plan begins with, the rate, and the step at which its first branch starts."""
    from megatron_lrpath.wording import listing, plural

    data = listing(list(plan.adopted.data)) if plan.adopted and plan.adopted.data else "unknown"
    print(f"{folder}: an imported model, without optimizer state; data: {data}")
    schedule = plan.schedule
    print(
        f"{plan.path}: runs without a parent begin with it at step 0, with {plural(schedule.warmup, 'step')} of "
        f"warm-up to {schedule.max_lr:g}; costs count from there"
    )
    for note in notes:
        print(f"  {note}")
    first = plan.runs(OURS.name)[1]
    print(
        f"  {first.name} leaves the main path at step {first.first_step:,}, {plural(first.steps, 'step')} long"
    )

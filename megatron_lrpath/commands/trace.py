"""`lrpath trace`: which versions, steps and checkpoints have read a document; slices without it."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lrpath.commands.options import add_plan
from megatron_lrpath.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_lrpath.plan import Plan
    from megatron_lrpath.upkeep.takedown import Reduced, Retraining
    from megatron_lrpath.upkeep.trace import Named, PlanSlices, Seen

HELP = "list the versions, steps and checkpoints that have read a document; write slices without it"
EXAMPLE = "lrpath trace plan.yaml --document data/web_text_document:1234"
STEPS_SHOWN = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plan, the documents, and the option to write slices without them."""
    add_plan(parser)
    parser.add_argument(
        "--document",
        action="append",
        default=[],
        metavar="SOURCE:N",
        help="document N (from 0) of an indexed dataset, by its path or file name; may be repeated",
    )
    parser.add_argument(
        "--text-file",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="documents with exactly the text of this file (UTF-8), found by their hash; may be repeated",
    )
    parser.add_argument(
        "--without",
        type=Path,
        metavar="FILE",
        help="write slices from which the documents listed in FILE (SOURCE:N, one a line) and their copies are gone, "
        "and list the runs that have to be trained again",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="new folder for the slices of --without"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def execute(args: argparse.Namespace) -> int:
    """Trace, write the new slices with --without, and return 0."""
    from megatron_lrpath.plan import load_plan
    from megatron_lrpath.upkeep.trace import PlanSlices, find, holders, trace

    if bool(args.without) != bool(args.output):
        raise UserError(
            "--without FILE and --output FOLDER go together: slices are never changed in their place"
        )
    listed = [] if args.without is None else references(args.without)
    if not (args.document or args.text_file or listed):
        raise UserError("name documents: --document SOURCE:N, --text-file FILE, or --without FILE")
    plan = load_plan(args.plan)
    slices = PlanSlices.of(plan)
    named = find(plan, slices, [*args.document, *listed], args.text_file)
    seen = trace(plan, slices, named.wanted)
    held = holders(slices, named.wanted)
    found: dict[str, Any] = {
        "documents": {
            str(slices.sources[key][0].prefix): numbers.tolist() for key, numbers in named.wanted.items()
        },
        "slices": held,
        "not_compared": [str(prefix) for prefix in named.unhashed],
        "runs": [as_json(one) for one in seen],
    }
    if not args.json:
        tell(slices, named, held, seen)
    if args.without:
        found["takedown"] = take_down(args, plan, named)
    if args.json:
        print(json.dumps(found, indent=2))
    return 0


def references(path: Path) -> list[str]:
    """Return the documents that a file lists as SOURCE:N, one a line; blank lines and # lines are skipped."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--without {path}: cannot be read ({error}); it lists documents as SOURCE:N, one a line"
        ) from None
    found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise UserError(f"--without {path}: lists no document; write SOURCE:N on a line for each")
    return found


def as_json(one: Seen) -> dict[str, Any]:
    """Return a run's entry."""
    return {
        "run": one.key,
        "version": one.run.version,
        "has_read": one.has_seen,
        "steps": list(one.steps),
        "steps_trained": len(one.trained),
        "parent": one.parent,
        "checkpoints": list(one.checkpoints),
    }


def tell(slices: PlanSlices, named: Named, held: dict[str, int], seen: Sequence[Seen]) -> None:
    """Print the documents, the slices that contain them, and the runs that have read them."""
    from megatron_lrpath.console import table_console, terminal_table
    from megatron_lrpath.wording import listing, plural

    for key, numbers in named.wanted.items():
        shown = [f"{number}" for number in numbers[:STEPS_SHOWN].tolist()]
        more = ", …" if len(numbers) > STEPS_SHOWN else ""
        what = plural(len(numbers), "document")
        print(f"{slices.sources[key][0].prefix}: {what}, copies included: {', '.join(shown)}{more}")
    if named.unhashed:
        print(
            f"note: {listing([str(prefix) for prefix in named.unhashed[:3]])}: no hashes of the documents, so copies "
            "there were not looked for; tools/check_dataset.py PREFIX --tokenizer-model MODEL --record writes them"
        )
    if not held:
        print("no slice of the plan holds them: nothing was trained on them or evaluated with them")
        return
    valid = {one.name for one in slices.validation}
    names = [
        f"{'validation set ' if name in valid else ''}{name} ({count:,})" for name, count in held.items()
    ]
    print(f"slices that hold them: {listing(names)}")
    if not seen:
        print("no run reads them")
        return
    rows = [(one.key, state(one), steps(one), checkpoints(one)) for one in seen]
    console = table_console()
    console.print(terminal_table(("run", "has read them", "in its steps", "checkpoints"), "Llll", rows))


def state(one: Seen) -> str:
    """Return the text on whether the run has read the documents."""
    if one.has_seen:
        return f"yes, from {one.parent}" if one.parent and not one.trained else "yes"
    if one.reached < 0:
        return "not trained yet; would"
    return f"not yet, at step {one.reached:,}"


def steps(one: Seen) -> str:
    """Return the first steps that read the documents, and their total number."""
    shown = ", ".join(f"{step:,}" for step in one.steps[:STEPS_SHOWN])
    return shown + (f", … ({len(one.steps):,})" if len(one.steps) > STEPS_SHOWN else "")


def checkpoints(one: Seen) -> str:
    """Return the first checkpoints that have read the documents, and the last one."""
    if not one.checkpoints:
        return ""
    shown = ", ".join(f"{step:,}" for step in one.checkpoints[:STEPS_SHOWN])
    return shown + (f", … {one.checkpoints[-1]:,}" if len(one.checkpoints) > STEPS_SHOWN else "")


def take_down(args: argparse.Namespace, plan: Plan, named: Named) -> dict[str, Any]:
    """Write the slices without the documents; return the changes and the runs to train again for JSON."""
    from megatron_lrpath.data.draw import existing_slices
    from megatron_lrpath.upkeep.takedown import reduced, retraining, write_slices

    existing = existing_slices(plan.data.slices)
    changed = reduced(plan, existing, named.wanted)
    if not changed:
        raise UserError(f"no slice in {plan.data.slices} holds one of these documents; nothing was written")
    again = retraining(plan, {one.slice.name for one in changed})
    write_slices(args.output, existing, changed)
    if not args.json:
        tell_changes(args, plan, changed, again)
    return {
        "output": str(args.output),
        "slices": {
            one.slice.name: {"removed": one.removed, "tokens": one.slice.tokens, "steps": one.steps}
            for one in changed
        },
        "train_again": again.as_json(),
    }


def tell_changes(args: argparse.Namespace, plan: Plan, changed: Sequence[Reduced], again: Retraining) -> None:
    """Print what was written, which runs must be trained again and at what cost, and how."""
    from megatron_lrpath.wording import hours_text, plural, short_number

    path = shlex.quote(str(args.plan))
    print(f"\n{args.output}: all slices of {plan.data.slices}; these have changed:")
    for one in changed:
        less = "" if one.steps is None else f"; suffices for {one.steps:,} steps, set `steps` in the plan"
        print(
            f"  {one.slice.name}: {plural(one.removed, 'document')} fewer, {one.slice.tokens:,} tokens{less}"
        )
    if not again.runs:
        print("no run has to be trained again")
    else:
        print("to train again:")
        for run in again.runs:
            print(f"  {run.key}: from step {run.from_step:,} to {run.to_step:,} ({run.steps:,} steps)")
        cost = (
            ""
            if again.hours is None or again.pace is None
            else f", {hours_text(again.hours, again.pace.unit)}"
        )
        print(f"together {again.steps:,} steps, {short_number(again.tokens)} tokens{cost}")
    print("next:")
    if again.rewind_to:
        print(f"  lrpath rewind {path} --to-step {again.rewind_to}")
    elif again.rewind_to == 0:
        print(
            "  no checkpoint of the main path is from before: give the plan another `output` and train it again"
        )
    others = [run for run in again.runs if not run.key.startswith("ours/")]
    for run in others:
        print(f"  move {run.folder} away")
    print(
        f"  set `slices: {args.output}` in {path}, and validation sets in `data.valid` that are in the old folder"
    )
    print(f"  lrpath run {path}")

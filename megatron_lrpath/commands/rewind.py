"""`lrpath rewind`: continue the main path from an earlier checkpoint, optionally without a version."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lrpath.commands.following import next_for
from megatron_lrpath.commands.options import add_plan, count_from
from megatron_lrpath.console import say_next
from megatron_lrpath.errors import UserError

if TYPE_CHECKING:
    from megatron_lrpath.plan import Plan
    from megatron_lrpath.runs.rewinds import SetAside

HELP = (
    "continue the main path from an earlier checkpoint, optionally without a version; set later files aside"
)
EXAMPLE = "lrpath rewind plan.yaml --to-step 40000 --drop v5"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plan, and the step to return to, or the treatment of files that were set aside."""
    add_plan(parser)
    parser.add_argument(
        "--to-step", type=count_from(1), metavar="S", help="a step whose checkpoint the main path has kept"
    )
    parser.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="VERSION",
        help="take this version out of the plan, and make its slices available again; may be repeated",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print what would be done, write nothing")
    what.add_argument(
        "--confirm", action="store_true", help="remove for good what earlier rewinds have set aside"
    )


def execute(args: argparse.Namespace) -> int:
    """Rewind, or list or remove what is set aside; return 0."""
    from megatron_lrpath.plan import load_plan
    from megatron_lrpath.upkeep.quiet import at_rest

    if args.to_step is None and (args.drop or args.dry_run):
        raise UserError(
            "--to-step S is the step to which the main path returns; `lrpath status` lists its checkpoints"
        )
    if args.to_step is not None and args.confirm:
        raise UserError(
            "--confirm removes what earlier rewinds have set aside; rewind first, then call it alone"
        )
    plan = load_plan(args.plan)
    with at_rest(plan):
        if args.to_step is None:
            return set_aside(plan, args.confirm)
        return rewind(plan, args.to_step, list(dict.fromkeys(args.drop)), args.dry_run)


def rewind(plan: Plan, step: int, dropped: list[str], dry_run: bool) -> int:
    """Print the changes, and make them."""
    from contextlib import ExitStack

    from megatron_lrpath.launch.process import only_one
    from megatron_lrpath.upkeep.rewind import begun, carry_out, is_done, prepare

    staying: tuple[str, ...] = ()
    record = begun(plan, step, dropped)
    if record is None and is_done(plan, step, dropped):
        print(f"nothing to do: the main path was rewound to step {step:,} already, and has not gone on since")
        say_next(next_for(plan))
        return 0
    if record is None:
        prepared = prepare(plan, step, dropped)
        record, staying = prepared.record, prepared.staying
    tell(plan, record, staying)
    if dry_run:
        print("nothing was written (--dry-run)")
        say_next("the same command without --dry-run")
        return 0
    with ExitStack() as held:
        if record.slices:
            held.enter_context(
                only_one(Path(plan.data.slices), "is drawing slices there; call again when it is done")
            )
        carry_out(plan, record)
    path = shlex.quote(str(plan.path))
    say_next(f"lrpath update {path} --source PREFIX, or lrpath run {path}")
    print(f"when nothing is missed: lrpath rewind {path} --confirm")
    return 0


def tell(plan: Plan, record: SetAside, staying: tuple[str, ...]) -> None:
    """Print what moves where, and what is kept."""
    from megatron_lrpath.wording import listing, plural, short_number

    without = f", without {listing(list(record.dropped))}" if record.dropped else ""
    lost = record.from_step - record.to_step
    tokens = short_number(plan.tokens(record.to_step, record.from_step))
    print(
        f"{plan.path}: the main path goes back from step {record.from_step:,} to step {record.to_step:,}{without}"
    )
    print(f"  {plural(lost, 'step')}, {tokens} tokens, no longer count")
    checkpoints = len(record.moves) - len(record.runs)
    aside = [plural(checkpoints, "checkpoint") + f" after step {record.to_step:,}", *record.runs]
    print(f"  set aside in {record.folder(Path(plan.output))}: {listing(aside)}")
    if record.slices:
        names = [Path(source).name.removesuffix(".slice") for source, _ in record.slices]
        print(f"  slices set aside, their documents available again: {listing(names)}")
        print("  (another plan that reads them has to be given others, or their old names back)")
    if staying:
        print(f"  as they are: {listing(list(staying))}")
    if beyond := [str(one) for one in plan.also_branch_at if one > record.to_step]:
        print(
            "  no longer there for branches of other plans (also_branch_at) until trained again: "
            f"step {listing(beyond)}"
        )


def set_aside(plan: Plan, confirm: bool) -> int:
    """List what earlier rewinds have set aside, and remove it if confirmed."""
    from megatron_lrpath.runs.lineage import read_lineage
    from megatron_lrpath.runs.rewinds import all_set_aside, half_removed, require_no_rewind
    from megatron_lrpath.runs.storage import folder_bytes
    from megatron_lrpath.upkeep.rewind import remove_set_aside
    from megatron_lrpath.wording import byte_size

    output, folder = Path(plan.output), plan.folder(plan.main)
    require_no_rewind(folder, read_lineage(folder))
    records = all_set_aside(output)
    if not records and not half_removed(output):
        print(f"{output}: nothing is set aside")
        say_next(next_for(plan))
        return 0
    for one in records:
        size = byte_size(folder_bytes(one.folder(output)))
        print(
            f"{one.folder(output)}: step {one.from_step:,} back to {one.to_step:,}, {one.time[:10]}, {size}"
        )
    if confirm:
        remove_set_aside(plan, records)
        print("removed")
        say_next(next_for(plan))
    else:
        print("nothing was removed")
        say_next(f"to remove it for good: lrpath rewind {shlex.quote(str(plan.path))} --confirm")
    return 0

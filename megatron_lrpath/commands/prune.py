"""`lrpath prune`: remove the checkpoints that no run starts from any more."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megatron_lrpath.commands.following import next_for
from megatron_lrpath.commands.options import add_plan
from megatron_lrpath.console import say_next

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_lrpath.plan import Plan
    from megatron_lrpath.runs.archive import Archive
    from megatron_lrpath.upkeep.prune import Found, Survey

HELP = "list the checkpoints that no run starts from any more, and remove them with --yes"
EXAMPLE = "lrpath prune examples/quickstart/plan.yaml --dry-run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plan, and the option to remove."""
    add_plan(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="list only (so without --yes, too)")
    what.add_argument("--yes", action="store_true", help="remove what is listed")
    parser.add_argument(
        "--keep-ends",
        action="store_true",
        help="leave the main path's checkpoint at the end of each version, to rewind to",
    )
    parser.add_argument(
        "--archived",
        action="store_true",
        help="remove versions' ends and branch points too, as far as the plan's archive has them; never the newest two",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def execute(args: argparse.Namespace) -> int:
    """List the checkpoints, and remove them with --yes; return 0."""
    from megatron_lrpath.plan import load_plan
    from megatron_lrpath.upkeep.prune import carry_out, survey
    from megatron_lrpath.upkeep.quiet import at_rest

    plan = load_plan(args.plan)
    with at_rest(plan):
        found = survey(plan, args.keep_ends, archive_of(plan, args.archived), args.archived)
        if args.json:
            print(json.dumps(as_json(found, removed=args.yes), indent=2))
        else:
            tell(found)
        if args.yes:
            carry_out(found)
    if not args.json:
        print(ending(args, found))
        keep = (["--keep-ends"] if args.keep_ends else []) + (["--archived"] if args.archived else [])
        remove = shlex.join(["lrpath", "prune", str(args.plan), *keep, "--yes"])
        say_next(remove if found.spare and not args.yes else next_for(plan))
    return 0


def archive_of(plan: Plan, needed: bool) -> Archive | None:
    """Return the plan's archive; if not needed, None without one, or with a warning if it does not answer.

    Raises:
        UserError: it is needed and the plan names none, or it does not answer.
    """
    from megatron_lrpath.console import warn
    from megatron_lrpath.errors import UserError
    from megatron_lrpath.runs.archive import Archive
    from megatron_lrpath.upkeep.archive import required_archive

    if needed:
        return required_archive(plan)
    try:
        found = Archive.of(plan)
        if found is not None:
            assert found.complete is not None  # queries the store
    except UserError as error:
        warn(f"{error}; what is archived is not known, so that more stays")
        return None
    return found


def as_json(found: Survey, removed: bool) -> dict[str, Any]:
    """Return what can be removed, what is kept with its reason, and the runs that are not touched."""

    def row(one: Found) -> dict[str, Any]:
        return {name: value for name, value in asdict(one).items() if name != "root"}

    return {
        "removed": removed,
        "spare": [row(one) for one in found.spare],
        "staying": [row(one) for one in found.staying],
        "left_alone": list(found.alone),
        "bytes": sum(one.bytes for one in found.spare),
    }


def tell(found: Survey) -> None:
    """Print what can be removed, and why the others are kept."""
    from megatron_lrpath.console import table_console, terminal_table
    from megatron_lrpath.wording import byte_size

    def table(title: str, rows: Sequence[Found]) -> None:
        if rows:
            cells = [(one.key, f"{one.step:,}", byte_size(one.bytes), reason(one)) for one in rows]
            drawn = terminal_table(("run", "step", "on disk", "why"), "LRRl", cells, title=title)
            drawn.title_justify = "left"
            console.print(drawn)

    console = table_console()
    table("May go:", found.spare)
    table("Stay:", found.staying)
    for line in found.alone:
        console.print(line, soft_wrap=True, markup=False)


def reason(one: Found) -> str:
    """Return why it is kept or can be removed, and whether it is archived."""
    text = one.reason or ("it is in the archive" if one.archived else "nothing starts from it")
    return f"{text}; archived" if one.archived and one.reason else text


def ending(args: argparse.Namespace, found: Survey) -> str:
    """Return the result, done or possible."""
    from megatron_lrpath.wording import byte_size, plural

    if not found.spare:
        return (
            "nothing to do: something may still start from every checkpoint, or it is one of the newest two"
        )
    amount = f"{plural(len(found.spare), 'checkpoint')}, {byte_size(sum(one.bytes for one in found.spare))}"
    if args.yes:
        return f"removed {amount}"
    return f"nothing was removed; {amount} may go"

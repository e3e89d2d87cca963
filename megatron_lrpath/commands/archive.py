"""`lrpath archive`: copy versions' ends and branch points to an object store, verify them, and fetch them."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from megatron_lrpath.commands.options import add_plan
from megatron_lrpath.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_lrpath.plan import Plan
    from megatron_lrpath.runs.archive import Archive
    from megatron_lrpath.upkeep.archive import Item

HELP = "copy the ends of versions and the branch points to the plan's object store, or fetch them"
EXAMPLE = "lrpath archive plan.yaml --dry-run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plan and the action."""
    add_plan(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="list only")
    what.add_argument(
        "--verify",
        action="store_true",
        help="read all archived checkpoints and compare them with their manifests",
    )
    what.add_argument(
        "--fetch",
        action="append",
        default=[],
        metavar="RUN:STEP",
        help="copy an archived checkpoint back to its run, as in ours/branch-v1:2000; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def execute(args: argparse.Namespace) -> int:
    """List, copy, verify or fetch; return 0, or 1 if --verify finds damage."""
    from megatron_lrpath.plan import load_plan
    from megatron_lrpath.upkeep.archive import items, required_archive

    plan = load_plan(args.plan)
    archive = required_archive(plan)
    if args.fetch:
        return fetch(plan, archive, args.fetch)
    found, alone = items(plan, archive)
    for line in alone:
        print(line, file=sys.stderr)
    if args.verify:
        return verify(archive, found)
    missing = [one for one in found if one.here and not one.there]
    if args.json:
        rows = [
            {"run": one.key, "step": one.step, "what": one.what, "here": one.here, "archived": one.there}
            for one in found
        ]
        print(json.dumps({"archive": plan.archive, "checkpoints": rows}, indent=2))
    else:
        tell(found)
    if not args.dry_run:
        for one in missing:
            archive.put(one.key, one.root, one.step, say)
    if not args.json:
        print(ending(plan, missing, args.dry_run))
    return 0


def say(text: str) -> None:
    """Print a line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def tell(found: Sequence[Item]) -> None:
    """Print the checkpoints and their locations."""
    from megatron_lrpath.console import table_console, terminal_table
    from megatron_lrpath.wording import byte_size

    if not found:
        return
    rows = [
        (
            one.key,
            f"{one.step:,}",
            byte_size(one.bytes) if one.here else "not on disk",
            "archived" if one.there else "not archived",
            one.what,
        )
        for one in found
    ]
    console = table_console()
    console.print(terminal_table(("run", "step", "on disk", "archive", "what"), "LRRll", rows))


def ending(plan: Plan, missing: Sequence[Item], dry_run: bool) -> str:
    """Return a line on what was copied, or with `dry_run` what would be copied."""
    from megatron_lrpath.wording import byte_size, plural

    if not missing:
        return (
            f"nothing to copy to {plan.archive}: it has all versions' ends and branch points that are on disk"
        )
    amount = f"{plural(len(missing), 'checkpoint')}, {byte_size(sum(one.bytes for one in missing))}"
    if dry_run:
        return f"nothing was copied (--dry-run); to copy: {amount}"
    return f"copied to {plan.archive}: {amount}; `lrpath prune --archived` may remove them from the disk"


def verify(archive: Archive, found: Sequence[Item]) -> int:
    """Read all archived checkpoints; return 0, or 1 if one is damaged."""
    from megatron_lrpath.console import say_error
    from megatron_lrpath.wording import plural

    archived = [one for one in found if one.there]
    wrong = [line for one in archived for line in archive.verify(one.key, one.step)]
    for line in wrong:
        say_error(line)
    if wrong:
        say_error(
            "remove the damaged checkpoints in the store; `lrpath archive` copies them again where they are on disk"
        )
        return 1
    print(f"{plural(len(archived), 'archived checkpoint')}: all files hold what their manifests say")
    return 0


def fetch(plan: Plan, archive: Archive, wanted: Sequence[str]) -> int:
    """Fetch the named checkpoints; return 0."""
    from megatron_lrpath.paradigms import PARADIGMS
    from megatron_lrpath.runs.tasks import build_tasks

    tasks = {task.key: task for task in build_tasks(plan, PARADIGMS)}
    for text in wanted:
        key, _, step = text.rpartition(":")
        if key not in tasks or not step.isdecimal():
            archived = [
                f"{one}:{number}" for one, steps in archive.complete.items() for number in sorted(steps)
            ]
            known = f"it has {', '.join(archived)}" if archived else "it is empty"
            raise UserError(f"--fetch {text}: write RUN:STEP for a checkpoint of the archive; {known}")
        print(archive.fetch(key, tasks[key].checkpoints, int(step), say))
    return 0

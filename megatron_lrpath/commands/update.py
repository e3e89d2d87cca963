"""`lrpath update`: make new data the next version of a plan."""

from __future__ import annotations

import argparse
import re
import shlex
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lrpath.commands.options import add_plan, number_in
from megatron_lrpath.console import say_next
from megatron_lrpath.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_lrpath.data.delivery import Delivered, Delivery
    from megatron_lrpath.data.duplicates import Duplicates
    from megatron_lrpath.data.slice import Slice
    from megatron_lrpath.plan import Plan
    from megatron_lrpath.plan.spec import Version

HELP = "make new data the next version of a plan: draw slice and validation, append it, print its cost"
EXAMPLE = "lrpath update plan.yaml --source data/web-2025_text_document --tokens 10.5B --dry-run"
TAKES_EXTRA = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plan, the data, and what to do with it."""
    add_plan(parser)
    parser.add_argument(
        "--source",
        action="append",
        required=True,
        dest="sources",
        metavar="PREFIX[:WEIGHT[:DOMAIN]]",
        help="an indexed dataset of the new data (without .bin), its weight and its domain; may be repeated",
    )
    parser.add_argument("--tokens", metavar="N", help="how many tokens to draw, like 10.5B (default: all)")
    parser.add_argument("--name", help="name of the version (default: the number after the last one's)")
    parser.add_argument(
        "--valid-share",
        type=number_in(0, 0.5, "a share of the tokens, from 0 to 0.5"),
        metavar="SHARE",
        help="share of the tokens that is held out as a validation set of its own; 0: none (default: 0.01, at most "
        "5M tokens)",
    )
    parser.add_argument(
        "--drop-duplicates",
        action="store_true",
        help="leave out the documents whose text is in an earlier version, in a validation set or in this delivery "
        "before (new validation sets are always drawn without them)",
    )
    parser.add_argument(
        "--alpha", type=number_in(1e-6, 1, "a number above 0, up to 1"), help="alpha of this version alone"
    )
    parser.add_argument(
        "--replay",
        type=number_in(1e-6, 0.999, "a share above 0 and below 1"),
        metavar="SHARE",
        help="share of the version's samples that is drawn again from earlier versions (default: none)",
    )
    parser.add_argument(
        "--global-batch-size",
        type=int,
        metavar="N",
        help="samples of a step from this version on (default: as many as before)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print what would be done, write nothing")
    what.add_argument(
        "--run", action="store_true", help="train it here at once (after --: Megatron arguments)"
    )
    what.add_argument("--submit", action="store_true", help="submit it to Slurm at once")


@dataclass(frozen=True)
class Update:
    """The new version and its data. `text`: the new plan file; `plan`: the plan in it; `known`: added before.

    `duplicates` are those among the documents of the delivery.
    """

    name: str
    slices: tuple[Slice, ...]
    text: str
    plan: Plan
    known: bool
    duplicates: Duplicates


def execute(args: argparse.Namespace) -> int:
    """Draw and append the version; return 0, or the exit status of --run or --submit."""
    from megatron_lrpath.data.delivery import keep
    from megatron_lrpath.data.draw import existing_slices
    from megatron_lrpath.data.record import blend_problems, refuse, require_tokenizer
    from megatron_lrpath.locks import FolderLock, LockHeldError
    from megatron_lrpath.plan import load_plan
    from megatron_lrpath.plan.file.edit import write_text
    from megatron_lrpath.tokenizers.prints import TokenizerSpec

    if args.extra and not (args.run or args.submit):
        raise UserError("Megatron arguments after `--` go with --run or --submit")
    plan = load_plan(args.plan)
    folder = Path(plan.data.slices)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: there is no such folder of slices; call from where the plan's paths begin"
        )
    delivery = asked(args, plan)
    require_tokenizer(plan)
    refuse(blend_problems([str(one.prefix) for one in delivery.sources], TokenizerSpec.of_plan(plan)))
    try:
        lock = FolderLock.acquire(folder)
    except LockHeldError as owner:
        raise UserError(f"{folder}: {owner} is drawing slices there now; try again when it is done") from None
    try:
        existing = existing_slices(folder)
        update = prepared(args, plan, delivery, existing)
        tell(plan, update, args)
        if args.dry_run:
            print("nothing was written (--dry-run)")
            say_next("the same command without --dry-run")
            return 0
        keep(list(reversed(update.slices)), existing, folder)  # the version last: the plan names it next
        if not update.known:
            write_text(args.plan, update.text)
    finally:
        lock.close()
    require_tokenizer(load_plan(args.plan))
    return go_on(args)


def asked(args: argparse.Namespace, plan: Plan) -> Delivery:
    """Return the delivery that the options describe."""
    from megatron_lrpath.data.delivery import Delivery
    from megatron_lrpath.data.draw_request import parse_source, parse_tokens

    share = None if args.valid_share is None else Fraction(repr(args.valid_share))
    return Delivery(
        sources=tuple(parse_source(text) for text in args.sources),
        tokens=None if args.tokens is None else parse_tokens(args.tokens),
        share=share,
        seed=plan.seed,
        folder=Path(plan.data.slices),
        drop_duplicates=args.drop_duplicates,
    )


def prepared(args: argparse.Namespace, plan: Plan, delivery: Delivery, existing: Sequence[Slice]) -> Update:
    """Draw and check the update, or resume the update that an interrupted call has begun.

    Raises:
        UserError: the data do not suffice, are in slices already, or do not fit the plan.
    """
    from megatron_lrpath.data.delivery import is_drawn
    from megatron_lrpath.data.slice import check_disjoint, held_out

    last = plan.versions[-1].name
    names = [version.name for version in plan.versions]
    valid = held_out(plan.data)
    if args.name in names[:-1]:
        raise UserError(f"--name {args.name}: is an earlier version of {plan.path}; a new one comes last")
    if args.name in (None, last):
        again = drawn(delivery, last, existing, valid)
        if again and is_drawn(again.slices, existing):
            if args.alpha not in (None, plan.versions[-1].alpha):
                raise UserError(f"--alpha: {last} is in {plan.path} already; write its alpha there")
            there = plan.versions[-1].replay
            if args.replay is not None and (there is None or there.share != Fraction(repr(args.replay))):
                raise UserError(f"--replay: {last} is in {plan.path} already; write its replay there")
            if args.global_batch_size not in (None, plan.batch_sizes.changes[-1][1]):
                raise UserError(
                    f"--global-batch-size: {last} is in {plan.path} already; write its global_batch_size there"
                )
            return Update(last, again.slices, "", plan, known=True, duplicates=again.duplicates)
        if args.name:
            raise UserError(f"--name {last}: is a version of {plan.path} already, drawn from other data")
    name = args.name or following(last)
    made = delivery.slices(name, existing, valid)
    slices = made.slices
    own = {one.name for one in slices}
    check_disjoint([*(one for one in existing if one.name not in own and one.name in in_use(plan)), *slices])
    text, changed = appended(args, plan, name, slices)
    return Update(name, slices, text, changed, known=False, duplicates=made.duplicates)


def drawn(
    delivery: Delivery, name: str, existing: Sequence[Slice], valid: Sequence[Slice]
) -> Delivered | None:
    """Return the slices of `name` as this call would draw them; None if it cannot draw them."""
    there = [one for one in existing if one.name == name]
    try:
        return delivery.slices(name, existing, valid) if there and delivery.is_of(there[0]) else None
    except UserError:
        return None


def in_use(plan: Plan) -> set[str]:
    """Return the names of the slices that must be disjoint."""
    valid = Path(plan.data.valid).name.removesuffix(".slice")
    return {*(version.name for version in plan.versions), valid, *plan.data.more_sets}


def following(name: str) -> str:
    """Return the next version's name: v4 -> v5, 2025-09 -> 2025-10.

    Raises:
        UserError: the name does not end with a number.
    """
    match = re.fullmatch(r"(.*?)([0-9]+)", name)
    if match is None:
        raise UserError(
            f"the last version is called {name!r}, after which nothing follows by itself; give --name"
        )
    return f"{match[1]}{int(match[2]) + 1:0{len(match[2])}}"


def appended(args: argparse.Namespace, plan: Plan, name: str, slices: Sequence[Slice]) -> tuple[str, Plan]:
    """Return the plan's text with the version, and the plan in it. Raise UserError if the version does not fit."""
    from megatron_lrpath.data.slice import available_samples, validation_path
    from megatron_lrpath.plan.file.edit import with_version
    from megatron_lrpath.plan.file.load import plan_from
    from megatron_lrpath.plan.file.source import parse_source, read_text
    from megatron_lrpath.plan.mix import Replay

    batch = plan.batch
    size = args.global_batch_size or plan.batch_sizes.changes[-1][1]
    available = available_samples(slices[0], batch.seq_length)
    replay = None if args.replay is None else Replay(Fraction(repr(args.replay)))
    steps = replay.steps(available, size) if replay else available // size
    if steps < 1:
        raise UserError(
            f"{name}: {slices[0].tokens:,} tokens are less than a step of {size * batch.seq_length:,}; draw more"
        )
    version: dict[str, Any] = {"name": name, "steps": steps}
    if args.global_batch_size is not None:
        version["global_batch_size"] = size
    if args.alpha is not None:
        version["alpha"] = args.alpha
    if args.replay is not None:
        version["replay"] = args.replay
    new = [str(Path(plan.data.slices) / one.name) for one in slices[1:]]
    before = [plan.data.valid, *plan.data.more_valid] if validation_path(plan.data).exists() else []
    text = read_text(args.plan)
    text = with_version(args.plan, text, version, [*before, *new] if new else [])
    return text, plan_from(parse_source(args.plan, text))


def tell(before: Plan, update: Update, args: argparse.Namespace) -> None:
    """Print the version, its cost and the alpha to choose."""
    from megatron_lrpath.launch.estimate import cost_lines, estimate
    from megatron_lrpath.runs.results import completed_step, version_runs
    from megatron_lrpath.runs.tasks import named_paradigms
    from megatron_lrpath.wording import listing, plural, short_number

    plan, (version, *valid) = update.plan, update.slices
    added = next(one for one in plan.versions if one.name == update.name)
    step_tokens = plan.batch_sizes.changes[-1][1] * plan.batch.seq_length
    domains = ", ".join(f"{short_number(count)} {name}" for name, count in version.tokens_by_domain.items())
    said = "is in the plan already, drawn from just this (another version: --name)" if update.known else "new"
    print(
        f"{update.name}: {said}: {plural(version.documents, 'document')}, {short_number(version.tokens)} tokens"
    )
    print(f"  ({domains}); {added.steps:,} steps of {step_tokens:,} tokens{replay_note(before, added)}")
    for line in update.duplicates.lines(args.drop_duplicates):
        print(line)
    paradigms = named_paradigms(before)
    if valid:
        models = [run for run in version_runs(before, paradigms) if completed_step(before.folder(run))]
        cost = f"; {plural(len(models), 'earlier model')} will be measured on it, too: " if models else ""
        cost += f"{short_number(len(models) * valid[0].tokens)} tokens forward" if models else ""
        print(f"validation: {valid[0].name}, {short_number(valid[0].tokens)} tokens{cost}")
    else:
        print(f"validation: no validation: nothing measures the text of {update.name}")
    first, *further = cost_lines(estimate(plan, paradigms), datetime.now().astimezone())
    print(f"to train: {first} ({listing(list(paradigms))})")
    for line in further:
        print(f"  {line}")
    print(f"alpha: {alpha_text(before, plan, args)}")


def replay_note(before: Plan, added: Version) -> str:
    """Return a note on the version's replay; if it has none, only where the version before it has one."""
    from megatron_lrpath.plan.wording import replay_text

    if added.replay is not None:
        return f", {replay_text(added.replay)}"
    last = before.versions[-1]
    if last.replay is None or last.name == added.name:
        return ""
    return f", nothing replayed ({last.name}: {replay_text(last.replay)}; see --replay)"


def alpha_text(before: Plan, plan: Plan, args: argparse.Namespace) -> str:
    """Return a text with the version's alpha and the alpha that `lrpath advise` recommends."""
    from megatron_lrpath.advise.advice import advise

    own = plan.versions[-1].alpha or plan.alpha
    try:
        chosen = advise(before).chosen
    except UserError as error:
        return f"{own:g}; no advice: {str(error).split('. ')[0]}"
    if chosen is None or chosen.alpha == own:
        return f"{own:g}" + (
            ", as `lrpath advise` would take" if chosen else "; no alpha meets advise's target"
        )
    return (
        f"{own:g}; `lrpath advise` would take {chosen.alpha:g}: add `--alpha {chosen.alpha:g}` to this command, or "
        f"`alpha: {chosen.alpha:g}` to the version in the plan before its branch begins"
    )


def go_on(args: argparse.Namespace) -> int:
    """Train the version, or print the commands that do."""
    from megatron_lrpath.commands import run, submit

    path = shlex.quote(str(args.plan))
    if not (args.run or args.submit):
        say_next(f"lrpath run {path}   (on a cluster: lrpath submit {path}), then lrpath report {path}")
        return 0
    command = run if args.run else submit
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    wanted = parser.parse_args([str(args.plan)])
    wanted.extra = args.extra
    return command.execute(wanted)

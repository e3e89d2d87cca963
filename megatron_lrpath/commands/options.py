"""Options that several commands share, and the types of options' values."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lrpath.errors import UserError
from megatron_lrpath.paradigms import PARADIGMS

if TYPE_CHECKING:
    from megatron_lrpath.launch.local import Options
    from megatron_lrpath.plan import Plan
    from megatron_lrpath.readiness import Request
    from megatron_lrpath.runs.overridden import OverriddenPlan

PLAN, PLAN_OR_EXPERIMENT = "the plan file", "the plan (or experiment) file"
AUTO, EVERY = "auto", "all"
WRITTEN = "needs a new output (or its own), where it writes plan.yaml"  # help of --set for training


def add_plan(parser: argparse.ArgumentParser, about: str = PLAN, optional: bool = False) -> None:
    """Add the positional argument PLAN."""
    parser.add_argument("plan", type=Path, metavar="PLAN", nargs="?" if optional else None, help=about)


def add_runs(parser: argparse.ArgumentParser, about_plan: str, about_run: str = "") -> None:
    """Add PLAN, --paradigm (see `paradigms_of`) and, if a help text is given, --run."""
    add_plan(parser, about_plan)
    add_paradigm(parser)
    if about_run:
        parser.add_argument("--run", metavar="NAME", help=about_run)


def add_set(parser: argparse.ArgumentParser, end: str) -> None:
    """Add --set; `end` describes the use of the plan."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"the plan with this value (YAML) at a dotted key, as schedule.max_lr=1e-3; may be repeated; {end}",
    )


def overridden(args: argparse.Namespace, output: str | None = None) -> OverriddenPlan | None:
    """Return the plan with the values of --set, None without --set. Raise UserError if it does not match its
    output.
    """
    if not args.set:
        return None
    from megatron_lrpath.runs.overridden import OverriddenPlan

    changed = OverriddenPlan.of(args.plan, args.set, output)
    changed.require_output()
    return changed


def add_paradigm(parser: argparse.ArgumentParser, default: str = "those that the plan names") -> None:
    """Add --paradigm: one, or all."""
    parser.add_argument("--paradigm", choices=(*PARADIGMS, EVERY), help=f"default: {default}")


def add_machine(parser: argparse.ArgumentParser, models: str, nproc: str) -> None:
    """Add the options of commands that train: --nproc (with this help), --device, and --evaluate for the
    `models`.
    """
    parser.add_argument("--nproc", type=count_from(1), metavar="N", help=nproc)
    add_device(parser)
    parser.add_argument(
        "--evaluate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=f"evaluate the {models} at the end (default: yes)",
    )
    parser.add_argument(
        "--cold",
        action="store_true",
        help="start every training as a fresh process; without it, those on the CPU are forked from a process that has "
        "imported everything, which saves seconds each",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument("--device", choices=(AUTO, "cpu", "cuda"), default=AUTO)


def paradigms_of(args: argparse.Namespace, plan: Plan | None = None) -> tuple[str, ...]:
    """Return the paradigms that --paradigm selects: the given one, or all.

    Without it, return those with the run of --run, or else those that the plan names; all without a plan.
    """
    adopted = plan.adopted if plan is not None else None
    if plan and adopted and not adopted.is_imported and args.paradigm in PARADIGMS[1:]:
        raise UserError(
            f"--paradigm {args.paradigm}: {plan.path} begins with an adopted checkpoint; only "
            f"{PARADIGMS[0]} can be trained"
        )
    if args.paradigm is not None or plan is None:
        return (args.paradigm,) if args.paradigm in PARADIGMS else PARADIGMS
    from megatron_lrpath.runs.tasks import named_paradigms, paradigms_with

    run = getattr(args, "run", None)
    return (paradigms_with(plan, run) if run else ()) or named_paradigms(plan)


def training_options(args: argparse.Namespace, plan: Plan | None = None, only_sft: bool = False) -> Options:
    """Return the command line's settings of a training on this machine; `plan` is None for an experiment."""
    from megatron_lrpath.launch.local import Options

    return Options(
        paradigms=paradigms_of(args, plan),
        run=args.run,
        nproc=args.nproc,
        jobs=None if args.jobs == AUTO else args.jobs,
        device=args.device,
        evaluate=args.evaluate,
        only_sft=only_sft,
        extra=tuple(args.extra),
        cold=args.cold,
    )


def request_of(options: Options) -> Request:
    """Return the checks before a training on this machine."""
    from megatron_lrpath.readiness import Request

    return Request(
        paradigms=options.paradigms,
        runs=(options.run,) if options.run else (),
        fine_tunings="only" if options.only_sft else "too",
        extra=options.extra,
        device=options.device,
        nproc=options.nproc,
        evaluate=options.evaluate,
    )


def count_from(least: int, alternative: str = "") -> Callable[[str], int | str]:
    """Return the type of an integer from `least` on; `alternative` is a word that is also accepted."""

    def read(text: str) -> int | str:
        if alternative and text == alternative:
            return text
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return read


def number_in(least: float, most: float = sys.float_info.max, what: str = "") -> Callable[[str], float]:
    """Return the type of a number from `least` to `most`; `what` describes it in the error message."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what or f'a number from {least:g} on'}")
        return value

    return read


lr_share = number_in(0, 1, "a share of max_lr, from 0 to 1")


def percentage(text: str) -> float:
    """Parse a percentage: `0.5%` -> 0.005."""
    if not text.endswith("%"):
        raise argparse.ArgumentTypeError(f"{text!r}: write a percentage, like 0.5%")
    return number_in(0)(text[:-1]) / 100


def share(text: str) -> float:
    """Parse a share: `50%` or `0.5` -> 0.5."""
    return percentage(text) if text.endswith("%") else number_in(0)(text)

"""The common part of `lrpath probe` and `lrpath audition`: options, cost, training, and the table."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lrpath.commands.options import add_plan, count_from
from megatron_lrpath.errors import UserError

if TYPE_CHECKING:
    from megatron_lrpath.experiment.load import Experiment
    from megatron_lrpath.plan import Plan
    from megatron_lrpath.trials.record import Trial


def add_trial(parser: argparse.ArgumentParser, begin: str) -> None:
    """Add PLAN, and the options of every trial; `begin` is the help of --from."""
    add_plan(parser)
    parser.add_argument("--from", dest="begin", type=count_from(1), metavar="STEP", help=begin)
    parser.add_argument(
        "--steps",
        type=count_from(2),
        metavar="N",
        help="steps of each branch (default: a tenth of the version's, at least 20)",
    )
    parser.add_argument(
        "--repeats",
        type=count_from(1),
        metavar="N",
        default=3,
        help="how often each candidate is trained, on other documents; intervals need 2 (default: 3)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print what would be trained and its cost")
    what.add_argument(
        "--submit", action="store_true", help="submit the branches to Slurm, with the settings of the cluster"
    )
    what.add_argument("--show", action="store_true", help="print what has been measured, train nothing")
    parser.add_argument("--settings", type=Path, metavar="FILE", help="settings of the cluster, for --submit")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def carry_out(args: argparse.Namespace, plan: Plan, trial: Trial) -> int:
    """Print the cost, run the remaining trainings here or as Slurm jobs, print the comparison; return the status."""
    from megatron_lrpath.experiment.trial import prepare, unmeasured, write

    if args.extra and (args.dry_run or args.show):
        raise UserError("Megatron arguments after `--` need a training; remove them, or --dry-run or --show")
    tell = sys.stderr if args.json else sys.stdout
    status = 0
    if not args.show:
        prepared = prepare(plan, trial)
        for line in cost_lines(plan, trial):
            print(line, file=tell)
        if names := unmeasured(plan, trial):
            print(
                f"note: no validation slice measures the text of {', '.join(names)} "
                f"(valid-{names[0]} in {plan.data.slices})",
                file=tell,
            )
        if args.dry_run:
            print(f"nothing was written (--dry-run); the trial would be in {trial.folder(plan)}", file=tell)
            return 0
        experiment = write(plan, trial, prepared)
        tell.flush()
        with output_to(tell):
            status = train(args, experiment)
    if not status and not args.submit:
        show(plan, trial, args.json)
    return status


def cost_lines(plan: Plan, trial: Trial) -> list[str]:
    """Return lines on the branches of the trial and their cost."""
    from megatron_lrpath.experiment.trial import step_samples
    from megatron_lrpath.launch.estimate import pace
    from megatron_lrpath.report.trials import design
    from megatron_lrpath.wording import hours_text, plural, short_number

    last = plan.versions[-1]
    share = trial.total_steps / last.steps
    tokens = trial.total_steps * step_samples(plan, trial) * plan.batch.seq_length
    lines = [
        f"{trial.name}: {design(plan, trial)}",
        f"  {plural(trial.total_steps, 'step')} in all, {short_number(tokens)} tokens, "
        f"{share:.0%} of the steps of {last.name}",
    ]
    lines += [
        f"  {one.name}: rate {one.rate:g}, slice {one.slice}"
        + (f", replay {one.replay}" if one.replay else "")
        for one in trial.candidates
    ]
    if (speed := pace(plan)) is not None:
        hours = trial.total_steps * speed.seconds * speed.processes / 3600
        lines.append(f"  {hours_text(hours, speed.unit)} at {speed.seconds:.3g} s a step, {speed.basis}")
    return lines


def train(args: argparse.Namespace, experiment: Experiment) -> int:
    """Train and evaluate the branches that are not complete, here or as jobs; return the exit status."""
    from megatron_lrpath.commands import run, submit

    command: Any = submit if args.submit else run
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = [str(experiment.path)]
    if args.submit:
        words += ["--settings", str(args.settings)] if args.settings else []
    else:
        words += ["--jobs", str(args.jobs), "--device", args.device]
        words += ["--nproc", str(args.nproc)] if args.nproc else []
        words += ["--cold"] if args.cold else []
    wanted = parser.parse_args(words)
    wanted.extra = args.extra
    return int(command.execute(wanted))


def show(plan: Plan, trial: Trial, as_json: bool) -> None:
    """Print the comparison of the measured candidates."""
    from rich.console import Console
    from rich.text import Text

    from megatron_lrpath.report.page import rich_table
    from megatron_lrpath.report.trials import trial_part
    from megatron_lrpath.trials.compare import compare, to_dict

    comparison = compare(plan, trial)
    part = trial_part(plan, comparison)
    if as_json:
        facts = {
            "trial": trial.name,
            "folder": str(trial.folder(plan)),
            "kind": trial.kind,
            "from_step": trial.begin,
            "steps": trial.steps,
            "decay_steps": trial.decay,
            "repeats": trial.repeats,
            "total_steps": trial.total_steps,
            "candidates": {
                one.name: {"rate": one.rate, "slice": one.slice, "replay": one.replay}
                for one in trial.candidates
            },
            "conclusions": list(part.sentences[1:]),
        }
        print(json.dumps(facts | dict(to_dict(comparison)), indent=2, ensure_ascii=False))
        return
    console = Console()
    if not comparison.texts:
        console.print(f"{trial.name}: nothing to compare yet: no repeat is measured for every candidate")
        return
    console.print(rich_table(part.table))
    for line in (*part.table.notes, *part.sentences[1:]):
        console.print(Text(line))
    print(f"next: lrpath report {shlex.quote(str(plan.path))} shows it with its figure")


@contextmanager
def output_to(stream: Any) -> Iterator[None]:
    """Redirect the output of this process and its children to `stream`, so that stdout holds only JSON."""
    if stream is sys.stdout:
        yield
        return
    sys.stdout.flush()
    kept, before = os.dup(1), sys.stdout
    try:
        os.dup2(2, 1)
        sys.stdout = stream
        yield
    finally:
        sys.stdout = before
        os.dup2(kept, 1)
        os.close(kept)


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add the options of trainings on this machine: --jobs, --nproc, --device, --cold."""
    from megatron_lrpath.commands.options import AUTO, add_device

    parser.add_argument(
        "--jobs",
        type=count_from(1, AUTO),
        metavar="N|auto",
        default=AUTO,
        help="branches side by side (default: auto)",
    )
    parser.add_argument("--nproc", type=count_from(1), metavar="N", help="processes of each branch")
    add_device(parser)
    parser.add_argument("--cold", action="store_true", help="start every training as a fresh process")

"""`lrpath compare-starts`: compare the losses of a run's starts with other libraries or layouts."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
from typing import TYPE_CHECKING

from megatron_lrpath.commands.options import add_plan, count_from
from megatron_lrpath.errors import UserError
from megatron_lrpath.paradigms import MAIN, OURS

if TYPE_CHECKING:
    from megatron_lrpath.plan import Plan, Run
    from megatron_lrpath.upkeep.compare_starts import Difference

HELP = "compare the losses of starts from one checkpoint with another Megatron, torch, layout or device"
EXAMPLE = "lrpath compare-starts plan.yaml --step 40000 --steps 50 --start torch-2.15"
TAKES_EXTRA = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run, the checkpoint, and the trial to train."""
    add_plan(parser)
    parser.add_argument("--run", default=MAIN.prefix, metavar="NAME", help="a run of ours (default: main)")
    parser.add_argument(
        "--step",
        type=count_from(1),
        required=True,
        metavar="S",
        help="start from its checkpoint of this step",
    )
    parser.add_argument(
        "--start",
        metavar="NAME",
        help="train a trial of this name with this environment, in OUTPUT/compare-starts (after --: Megatron "
        "arguments); without it, only compare",
    )
    parser.add_argument("--steps", type=count_from(1), metavar="N", help="train and compare N steps")
    parser.add_argument("--nproc", type=count_from(1), default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument(
        "--print-command",
        action="store_true",
        help="prepare the trial and print the training's command, for a batch script; train nothing",
    )


def execute(args: argparse.Namespace) -> int:
    """Train a trial if one is named, then compare; return 0, or the trial's exit status."""
    from megatron_lrpath.plan import load_plan

    plan = load_plan(args.plan)
    run = plan.run(OURS.name, args.run)
    if args.extra and not args.start:
        raise UserError("Megatron arguments after `--` go with --start NAME")
    if args.start:
        status = train(plan, run, args)
        if status or args.print_command:
            return status
    compare(plan, run, args)
    return 0


def train(plan: Plan, run: Run, args: argparse.Namespace) -> int:
    """Train the trial; return its exit status."""
    from megatron_lrpath.launch import torchrun
    from megatron_lrpath.runs.folder import RunFolder
    from megatron_lrpath.runs.tasks import build_tasks
    from megatron_lrpath.upkeep.compare_starts import prepare, remove_checkpoints

    if not args.steps:
        raise UserError("--steps N: how many steps is the trial to train?")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", args.start):
        raise UserError(f"--start {args.start}: letters, digits, `.`, `_` and `-`")
    last = args.step + args.steps
    if last > run.last_step:
        most = run.last_step - args.step
        fewer = f"give at most {most}, or " if most > 0 else ""
        raise UserError(
            f"--steps {args.steps}: {run.name} ends at step {run.last_step:,}; {fewer}start from an earlier step"
        )
    trial, own = prepare(plan, run, args.step, args.start)
    (task,) = (one for one in build_tasks(trial, (OURS.name,)) if one.run == own)
    extra = ("--exit-interval", str(last), *args.extra)
    device = None if args.device == "auto" else args.device
    command = torchrun.training(trial.path, task, args.nproc, device, extra).command
    if args.print_command:
        print(shlex.join(command))
        return 0
    log = RunFolder(task.folder).path / "trial.log"
    with log.open("wb") as stream:
        status = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        raise_from(log, status)
    remove_checkpoints(trial, own)
    return 0


def raise_from(log: object, status: int) -> None:
    """Raise UserError with the trial's own message or its exit status, and the path of its log."""
    from pathlib import Path

    text = Path(str(log)).read_text(errors="replace")
    said = [line for line in text.splitlines() if line.startswith("lrpath: error: ")]
    why = said[0].removeprefix("lrpath: error: ") if said else f"the training ended with status {status}"
    raise UserError(f"the trial could not be trained: {why} (log: {log})")


def compare(plan: Plan, run: Run, args: argparse.Namespace) -> None:
    """Print a line or more for each start."""
    from megatron_lrpath.upkeep.compare_starts import differences, starts_of

    starts = starts_of(plan, run, args.step, args.step + args.steps if args.steps else None)
    if len(starts) < 2:
        names = ", ".join(one.name for one in starts) or "none"
        print(
            f"{run.key}: starts with steps after step {args.step:,}: {names}. Nothing to compare yet: call it with "
            "--start NAME in the other environment"
        )
        return
    print(f"{run.key} from step {args.step:,}: loss minus that of `{starts[0].name}`, in nats a token")
    for one in differences(starts):
        print(text_of(one))


def text_of(one: Difference) -> str:
    """Return a start's differences in a few lines."""
    from megatron_lrpath.wording import plural

    lines = [
        f"  {one.name}: {plural(one.steps, 'step')}: first {one.first:+.2e}, largest {one.largest:.2e}, mean "
        f"{one.mean:+.2e} ± {one.error:.1e}"
        + (f"; {one.equal} with equal bits" if one.equal < one.steps else "; all with equal bits")
    ]
    lines += [f"    {clause}" for clause in one.environment]
    if one.error and abs(one.mean) > 3 * one.error and one.largest > 1e-6:
        lines.append(
            "    the mean differs by more than three standard errors: more than rounding; look for its cause"
        )
    return "\n".join(lines)

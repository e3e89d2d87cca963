"""Prevent trainings while the output of a plan is changed: no job is active, and the locks of its runs are
held.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

from megatron_lrpath.console import say_error
from megatron_lrpath.errors import UserError
from megatron_lrpath.exits import FAILED, leave_at_once
from megatron_lrpath.experiment.load import is_written_by_experiment
from megatron_lrpath.launch.process import only_one
from megatron_lrpath.launch.slurm.show import Jobs
from megatron_lrpath.paradigms import PARADIGMS
from megatron_lrpath.plan import Plan
from megatron_lrpath.runs.folder import OutputFolder, RunFolder
from megatron_lrpath.runs.results import nothing_there
from megatron_lrpath.runs.state import is_live
from megatron_lrpath.training.guards.runlock import hold
from megatron_lrpath.wording import plural

PATIENCE = 1.0  # seconds for a process that is ending


@contextmanager
def at_rest(plan: Plan) -> Iterator[None]:
    """Prevent that a run in the plan's output is trained, and that its plan is run or submitted.

    Raises:
        UserError: there is no output, or a training runs in it or waits in Slurm's queue; with what to do.
    """
    output = Path(plan.output)
    if not output.is_dir():
        raise nothing_there(plan, "nothing is there")
    at_work = (
        f"is at work there; wait for it, or end it (Ctrl-C, `lrpath cancel {plan.path}`), then call again"
    )
    homes = [output.resolve().parent, output] if is_written_by_experiment(plan) else [output]
    with ExitStack() as held:
        for home in homes:
            held.enter_context(only_one(home, at_work, PATIENCE))
            if (jobs := OutputFolder(home).slurm).is_dir():
                held.enter_context(only_one(jobs, at_work, PATIENCE))
            require_no_jobs(plan, home)
        for folder in run_folders(output):
            if is_live(folder):
                raise UserError(f"{folder}: a training {at_work}")
            held.enter_context(only_one(folder, at_work, PATIENCE))
            checkpoints = RunFolder(folder).checkpoints
            if checkpoints.is_dir():
                held.callback(hold(checkpoints, lost, PATIENCE).close)
        yield


def require_no_jobs(plan: Plan, output: Path) -> None:
    """Refuse if jobs submitted for `output` are pending or running, or if that is unknown.

    Raises:
        UserError: with what to do.
    """
    jobs = Jobs.of(str(output))
    if jobs.queue is None:
        raise UserError(
            f"{jobs.ledger.file}: this plan has jobs under Slurm, and squeue does not answer here; call again where it "
            "does, when they are over"
        )
    alive = [entry for entry in jobs.entries if entry.number in jobs.queue]
    if alive:
        named = ", ".join(f"{entry.key} (job {entry.number})" for entry in alive[:3])
        raise UserError(
            f"{plural(len(alive), 'job')} of this plan in Slurm's queue: {named}{', …' if alive[3:] else ''}; wait for "
            f"them, or end them with `lrpath cancel {plan.path}`, then call again"
        )


def run_folders(output: Path) -> list[Path]:
    """Return the folders of all runs in an output without duplicates, including those that the plan no longer
    has.
    """
    return [
        one
        for paradigm in PARADIGMS
        for one in sorted((output / paradigm).glob("*"))
        if one.is_dir() and not one.is_symlink()
    ]


def lost(owner: str) -> NoReturn:
    """End this process before both write, because another process has begun to train one of the runs."""
    say_error(f"{owner} has taken a run over meanwhile; call again when it is done")
    leave_at_once(FAILED)

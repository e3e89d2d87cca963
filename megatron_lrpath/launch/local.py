"""Run a plan on this machine, alone in its output folder: `lrpath run` without its command line."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from megatron_lrpath.console import say, say_error, say_next
from megatron_lrpath.errors import UserError
from megatron_lrpath.launch import warm
from megatron_lrpath.launch.display import PlainDisplay, open_display
from megatron_lrpath.launch.graph import width
from megatron_lrpath.launch.process import Starter, only_one, supervised
from megatron_lrpath.launch.resources import (
    Share,
    check_fine_tuning,
    cores,
    micro_batch_arguments,
    share_out,
    sizes_left,
)
from megatron_lrpath.launch.runner import GRACE_SECONDS, RunFailedError, Runner
from megatron_lrpath.launch.torchrun import Ranks, training
from megatron_lrpath.paradigms import SFT
from megatron_lrpath.plan import PARADIGMS, Plan
from megatron_lrpath.runs.results import needs_evaluation
from megatron_lrpath.runs.tasks import Task, build_tasks, with_ancestors
from megatron_lrpath.sft.prepare import prepare, print_summary
from megatron_lrpath.wording import clock, plural


def fine_tunings(plan: Plan, tasks: Sequence[Task], name: str | None) -> list[Task]:
    """Return fine-tunings (or only `name`) with trained versions. Raise UserError if there are none."""
    by_key = {task.key: task for task in tasks}
    found = [task for task in tasks if task.run.is_sft and name in (None, task.run.name)]
    if not found:
        raise UserError(
            f"{plan.path}: there is no fine-tuning{f' {name}' if name else ''} here; see its `sft`"
        )
    ready = [task for task in found if task.parent is None or by_key[task.parent].complete]
    waiting = [task for task in found if task not in ready]
    if not ready:
        raise UserError(f"{waiting[0].key}: {waiting[0].parent} is not trained yet: lrpath run {plan.path}")
    for task in waiting:
        print(f"{task.key}: left out, {task.parent} is not trained yet", file=sys.stderr)
    return ready


COMMAND_LINE = "megatron_lrpath.cli"
CommandFor = Callable[[Task], Ranks | Sequence[str]]


@dataclass(frozen=True)
class Options:
    """The user's choices; None leaves a choice to `resources.share_out`."""

    paradigms: tuple[str, ...] = PARADIGMS
    run: str | None = None
    nproc: int | None = None
    jobs: int | None = None
    device: str = "auto"
    evaluate: bool = True
    only_sft: bool = False  # fine-tune trained versions, and train no version
    extra: tuple[str, ...] = ()
    cold: bool = False  # start every process without a fork of the warm one, also on the CPU
    grace: float = GRACE_SECONDS


class Ended(KeyboardInterrupt):
    """A signal `number` requested the end of this process."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number


def carry_out(
    plan: Plan, options: Options, command_for: CommandFor | None = None, display: PlainDisplay | None = None
) -> int:
    """Run the remaining trainings of the plan, then evaluate; return the exit status for the shell.

    0 when complete, 1 when a run failed, 128+n when signal n ended it; all processes of runs have ended then.
    `command_for` replaces the training's command. Raise `UserError` if a run cannot be started at all.
    """
    wanted = plan.sft is not None and set(plan.sft.paradigms) & set(options.paradigms)
    if wanted and (options.run is None or options.run.startswith(SFT.prefix)):
        # first: problems of the data are reported before days of training, and the data determine the steps
        print_summary(prepare(plan, cores()), plan.sft_folder)
    tasks = chosen_tasks(plan, options)
    # counts all chosen runs, complete ones, too: a second call shares the machine in the same way
    share = share_out(plan, width(tasks), options.device, options.nproc, options.jobs, options.extra)
    options = replace(
        options,
        extra=(*options.extra, *micro_batch_arguments(plan, share.nproc, options.extra, sizes_left(tasks))),
    )
    check_fine_tuning(plan, share.nproc, options.extra)

    def work() -> int:
        trained = train(plan, tasks, share, options, command_for, display or open_display())
        evaluation = evaluation_argv(plan, tasks, share, options) if options.evaluate else None
        if evaluation:
            return call(evaluation, options.grace, starter_of(share, options))  # it prints the next command
        if not trained:
            print(f"nothing to do: {plural(len(tasks), 'run')} of {plan.path} complete in {plan.output}")
        if not options.only_sft:
            say_next(f"lrpath report {shlex.quote(str(plan.path))}")
        return 0

    return alone(Path(plan.output), work)


def alone(output: Path, work: Callable[[], int]) -> int:
    """Do the work with exclusive use of an output folder; return its status, or 1 and 128+n as `carry_out`.

    Raise `UserError` if another `lrpath run` uses the folder.
    """
    try:
        with only_one(output, "is running a plan there; wait for it or end it"), signals_raise():
            return work()
    except RunFailedError as error:
        say_error(error)
        return error.status
    except KeyboardInterrupt as error:
        say("lrpath: stopped; call the same command again to continue")
        return 128 + (error.number if isinstance(error, Ended) else signal.SIGINT)


def train(
    plan: Plan,
    tasks: Sequence[Task],
    share: Share,
    options: Options,
    command_for: CommandFor | None,
    display: PlainDisplay,
) -> list[Task]:
    """Run the incomplete tasks and return them."""
    todo = [task for task in tasks if not task.complete]
    started = time.monotonic()
    with display:
        if todo:
            display.event(announcement(plan, tasks, todo, share))
        command_for = command_for or default_command(lambda _: plan.path, options, share)
        starter = starter_of(share, options)
        Runner(plan.name, tasks, share, command_for, display, options.grace, starter).run()
        if todo:
            display.event(
                f"{plan.name}: trained {plural(len(todo), 'run')} in {clock(time.monotonic() - started)}"
            )
    return todo


def evaluation_argv(plan: Plan, tasks: Sequence[Task], share: Share, options: Options) -> list[str] | None:
    """Return the arguments of `lrpath` that evaluate newly trained models; None if there are none."""
    runs = [task.run for task in tasks if task.run.makes_version]
    if not any(needs_evaluation(plan, run) for run in runs):
        return None
    argv = ["eval", str(plan.path), *_paradigm_option(options.paradigms), "--nproc", str(share.nproc)]
    argv += ["--device", options.device, *(["--run", options.run] if options.run else [])]
    argv += ["--", *options.extra] if options.extra else []
    return argv


def _paradigm_option(paradigms: Sequence[str]) -> list[str]:
    """Return --paradigm for one or for all paradigms; empty for those that the plan names."""
    if len(paradigms) == 1:
        return ["--paradigm", paradigms[0]]
    return ["--paradigm", "all"] if len(paradigms) == len(PARADIGMS) else []


def call(argv: Sequence[str], grace: float, starter: Starter) -> int:
    """Run `lrpath` with `argv` on this console; return its exit status. It ends with this process."""
    process = starter(Ranks(COMMAND_LINE, tuple(argv), alone=True), {}, grace, None, ())
    try:
        return process.wait() or 0
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise


def chosen_tasks(plan: Plan, options: Options) -> list[Task]:
    """Return the tasks of the chosen paradigms; with `run` only that run and its ancestors."""
    tasks = build_tasks(plan, options.paradigms)
    chosen = with_ancestors(tasks, plan, options.run) if options.run else tasks
    return fine_tunings(plan, tasks, options.run) if options.only_sft else chosen


def default_command(plan_path: Callable[[Task], Path], options: Options, share: Share) -> CommandFor:
    """Return the command of the training under torchrun; `plan_path(task)` is the path of its plan."""
    device = None if options.device == "auto" else options.device
    return lambda task: training(plan_path(task), task, share.nproc, device, options.extra)


def starter_of(share: Share, options: Options) -> Starter:
    """Return the starter of ranks: forks of a warm process on the CPU, new ones on GPUs or with `cold`."""
    return supervised if options.cold or share.device != "cpu" else warm.start


def announcement(plan: Plan, tasks: Sequence[Task], todo: Sequence[Task], share: Share) -> str:
    """Return a text on the remaining runs, with the place of their output."""
    steps = sum(task.run.steps for task in todo)
    done = f", {len(tasks) - len(todo)} complete already" if len(todo) < len(tasks) else ""
    side = f"{share.jobs} at a time" if share.jobs > 1 else "one at a time"
    size = f"{plural(share.nproc, 'process', 'es')} each, {plural(share.threads, 'thread')}"
    return (
        f"{plan.name}: {plural(len(todo), 'run')}, {steps} steps{done}; {side}, {size}, {share.device}\n"
        f"  full output of each run: {plan.output}/<paradigm>/<run>/logs"
    )


@contextmanager
def signals_raise() -> Iterator[None]:
    """Turn the signals that end this process into exceptions.

    This includes SIGINT: a shell starts background jobs with it ignored, and Python then ignores it, too.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise Ended(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if number != signal.SIGHUP or handler is not signal.SIG_IGN:  # nohup
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""`lrpath run` of an experiment: all its trainings here, each once, then the evaluations."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_lrpath.experiment.spec import Experiment
from megatron_lrpath.experiment.tasks import PointTask, experiment_tasks, point_tasks, write_plans
from megatron_lrpath.launch.display import open_display
from megatron_lrpath.launch.graph import width
from megatron_lrpath.launch.local import Ended, Options, call, evaluation_command, only_one, signals_raise
from megatron_lrpath.launch.process import torchrun_command
from megatron_lrpath.launch.records import is_done
from megatron_lrpath.launch.resources import Share, share_out
from megatron_lrpath.launch.runner import RunFailedError, Runner
from megatron_lrpath.launch.tasks import Task

CommandFor = Callable[[Task], Sequence[str]]


def carry_out_experiment(
    experiment: Experiment, options: Options, command_for: CommandFor | None = None
) -> int:
    """Train what is left to train, then evaluate; the exit status as `launch.local.carry_out`'s."""
    if options.run:
        experiment = replace(experiment, only=(options.run,))
    tasks = experiment_tasks(experiment, options.paradigms)
    plan = experiment.points[0].plan
    share = share_out(plan, width(tasks), options.device, options.nproc, options.jobs, options.extra)
    try:
        with only_one(experiment.output), signals_raise():
            write_plans(experiment)
            _train(experiment, tasks, share, options, command_for)
            return _evaluate(experiment, share, options) if options.evaluate else 0
    except RunFailedError as error:
        print(f"lrpath: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print("lrpath: stopped; call the same command again to go on", file=sys.stderr)
        return 128 + (error.number if isinstance(error, Ended) else signal.SIGINT)


def _train(
    experiment: Experiment,
    tasks: Sequence[PointTask],
    share: Share,
    options: Options,
    command_for: CommandFor | None,
) -> None:
    todo = [task for task in tasks if not is_done(task)]
    steps = sum(task.run.steps for task in todo)
    with open_display() as display:
        display.event(
            f"{experiment.name}: {len(experiment.points)} plans, {len(tasks)} trainings, {len(todo)} to do, "
            f"{steps} steps; {share.jobs} at a time, {share.nproc} processes each, {share.device}"
        )
        Runner(experiment.name, tasks, share, command_for or _command(options, share), display).run()


def _command(options: Options, share: Share) -> CommandFor:
    device = None if options.device == "auto" else options.device

    def command(task: Task) -> Sequence[str]:
        assert isinstance(task, PointTask)
        return torchrun_command(task.plan_path, task, share.nproc, device, options.extra)

    return command


def _evaluate(experiment: Experiment, share: Share, options: Options) -> int:
    """Evaluate the points one after the other; what several share is evaluated with the first."""
    paradigms = [name for name in experiment.paradigms if name in options.paradigms]
    for point in experiment.points:
        for paradigm in paradigms:
            tasks = point_tasks(experiment, point, [paradigm])
            alone = replace(options, paradigms=(paradigm,), run=None)
            command = evaluation_command(point.plan, tasks, share, alone)
            if command and (status := call(command, options.grace)):
                return status
    return 0

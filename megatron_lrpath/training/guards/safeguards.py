"""What keeps a run safe, put in place at its start: who saves and removes, and the guard of every step."""

from __future__ import annotations

from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.runs import lineage
from megatron_lrpath.runs.history import losses_before
from megatron_lrpath.training.checkpoints import saves
from megatron_lrpath.training.checkpoints.start import Start
from megatron_lrpath.training.context import RunContext
from megatron_lrpath.training.environment import importable
from megatron_lrpath.training.guards import guard, orphans
from megatron_lrpath.training.guards.guard import SpikeDetector
from megatron_lrpath.training.guards.peers import Ranks


def before_validation(args: Any) -> None:
    """Choose how checkpoints are written and signals answered, before Megatron validates its arguments.

    Megatron turns --async-save off without its persistent worker; see `writers` for the CPU.

    Raises:
        UserError: checkpoints of another kind are asked for.
    """
    if args.non_persistent_ckpt_type or args.non_persistent_save_interval:
        raise UserError(
            "--non-persistent-save-interval, --non-persistent-ckpt-type: a run with a learning-rate path has "
            "one kind of checkpoint. Use a shorter --save-interval with --save-retain-interval."
        )
    args.exit_signal_handler = False  # ours answers
    if args.async_save:
        args.use_persistent_ckpt_worker = True
        if not importable("nvidia_resiliency_ext"):
            args.async_strategy = "mcore"


def install(args: Any, context: RunContext, start: Start, ranks: Ranks, device: str) -> None:
    """Take saving, retention and the check of numbers over from Megatron."""
    retain_interval, args.save_retain_interval = args.save_retain_interval, None
    earlier = lineage.retain_intervals(context.folder) if context.folder is not None else []
    points = branch_points(context)
    saves.set_saves(
        saves.Saves(Path(args.save), context.keep_steps, points, retain_interval, start.existing, earlier)
    )
    set_forkserver_preload([orphans.__name__])
    if device == "cpu":
        # The persistent worker would write tensors while the training changes them (it shares their memory);
        # a forked writer has the memory as it was.
        args.use_persistent_ckpt_worker = False
    check, args.check_for_nan_in_loss_and_grad = args.check_for_nan_in_loss_and_grad, False
    guard.set_guard(
        guard.Guard(
            check=check,
            detector=spike_detector(args, context, start, ranks),
            skip=args.loss_spike_action == "skip",
            max_skips=args.loss_spike_max_skips,
            first_step=start.step,
        )
    )


def branch_points(context: RunContext) -> frozenset[int]:
    """The steps that other runs start from: all that are kept, but on a plan's main path the version ends."""
    plan, run = context.plan, context.run
    if plan is None or run is None or run.makes_version:
        return context.keep_steps
    parents = [other.parent for other in plan.runs(run.paradigm) if other.parent is not None]
    return frozenset(parent.step for parent in parents if parent.run == run.name)


def spike_detector(args: Any, context: RunContext, start: Start, ranks: Ranks) -> SpikeDetector | None:
    """The detector that the arguments describe, which knows the losses before this start.

    Raises:
        UserError: spikes are to be skipped in a run without a folder, which would not remember.
    """
    if args.loss_spike_action == "off":
        return None
    if args.loss_spike_action == "skip" and context.folder is None:
        raise UserError(
            "--loss-spike-action skip needs --plan: a skipped batch is recorded in the run's folder."
        )
    window = args.loss_spike_window
    earlier = losses_before(context.folder, start.step, window) if context.folder and not ranks.rank else []
    return SpikeDetector(args.loss_spike_threshold, window, ranks.share(earlier))

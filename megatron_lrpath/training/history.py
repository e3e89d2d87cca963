"""What every step really used and gave: a line in the history, and the right rate in Megatron's log."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron_lrpath.console import warn
from megatron_lrpath.runs.history import HistoryWriter
from megatron_lrpath.runs.lineage import add_skipped
from megatron_lrpath.training import watching
from megatron_lrpath.training.context import get_context
from megatron_lrpath.training.guards.guard import current_guard
from megatron_lrpath.training.guards.peers import current_watch
from megatron_lrpath.training.scheduler import current_scheduler

_history: HistoryWriter | None = None


def record_step(
    loss_dict: dict[str, Any], iteration: int, skipped: bool, grad_norm: float | None, lr: float
) -> None:
    """Add the step to the run's history and to its curves, on the one rank that has the loss."""
    global _history
    import torch.distributed as dist
    from megatron.training import get_args, get_timers

    context = get_context()
    if context is None or dist.get_rank() != dist.get_world_size() - 1:
        return
    guard = current_guard()
    loss = guard.loss if guard and guard.loss is not None else loss_dict.get("lm loss")
    record: dict[str, Any] = {
        "step": iteration,
        "consumed_samples": get_args().consumed_train_samples,
        "lr": lr,
        "loss": None if loss is None else float(loss),
        "grad_norm": None if grad_norm is None else float(grad_norm),
    }
    mfu = watching.show_step(record)
    if context.folder is None:
        return
    if mfu is not None:
        record["mfu"] = round(mfu, 5)
    if skipped:
        record["skipped"] = True
    if guard and guard.spike:
        record["spike"] = {"median": guard.spike.median, "limit": guard.spike.limit}
    if _history is None:
        elapsed = get_timers()("interval-time", log_level=0).elapsed(reset=False)  # started with the loop
        _history = HistoryWriter(context.folder, iteration - 1, elapsed)
    _history.append(record)


def sync_history() -> None:
    """Sync the history, on the rank that writes it."""
    if _history is not None:
        _history.sync()


def report_spike(iteration: int) -> None:
    """Say that the step was a loss spike, with its samples; a skipped one enters the lineage. On rank 0."""
    from megatron.training import get_args

    guard, context, args = current_guard(), get_context(), get_args()
    if guard is None or guard.spike is None or args.rank != 0:
        return
    last = args.consumed_train_samples - 1
    first = last + 1 - args.global_batch_size
    spike, action = guard.spike, "update skipped" if guard.skipped else "update made"
    warn(
        f"step {iteration}: loss spike: {spike.loss:.4f} over a running median of {spike.median:.4f} (limit "
        f"{spike.limit:.4f}); samples {first} to {last}; {action}"
    )
    if guard.skipped and context is not None and context.folder is not None:
        record = {"step": iteration, "samples": [first, last], "loss": spike.loss, "median": spike.median}
        _unrecorded.append(record)
        try:
            record_skips()
        except OSError as error:
            warn(
                f"{context.folder}: {error.strerror}; the lineage learns of step {iteration} at the next save."
            )


_unrecorded: list[dict[str, Any]] = []
"""Skipped updates that the lineage does not hold yet."""


def record_skips() -> None:
    """Enter skipped updates in the lineage; raises OSError where the disk has no room. On rank 0."""
    while _unrecorded:
        context = get_context()
        assert context is not None
        assert context.folder is not None
        add_skipped(context.folder, _unrecorded[0])
        del _unrecorded[0]


def wrap_training_log(original: Callable[..., bool]) -> Callable[..., bool]:
    """Log the rate the step used (Megatron reads it after the scheduler has moved on) and record the step."""

    @functools.wraps(original)
    def training_log(
        loss_dict: dict[str, Any],
        total_loss_dict: dict[str, Any],
        learning_rate: float | None,
        iteration: int,
        loss_scale: float,
        report_memory_flag: bool,
        skipped_iter: int,
        grad_norm: float | None,
        *args: Any,
        **kwargs: Any,
    ) -> bool:
        scheduler, guard = current_scheduler(), current_guard()
        if scheduler is not None:
            if skipped_iter:
                scheduler.step(0)  # Megatron leaves the rate; here it belongs to the consumed samples
            if learning_rate is not None:
                learning_rate = scheduler.used_lr
            record_step(loss_dict, iteration, bool(skipped_iter), grad_norm, scheduler.used_lr)
            report_spike(iteration)
        if guard is not None:
            guard.step_ended()
        if (watch := current_watch()) is not None:
            watch.step = iteration
        return original(
            loss_dict,
            total_loss_dict,
            learning_rate,
            iteration,
            loss_scale,
            report_memory_flag,
            skipped_iter,
            grad_norm,
            *args,
            **kwargs,
        )

    return training_log

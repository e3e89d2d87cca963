"""Checkpoints that others depend on: branch points and version ends are always saved and never removed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron_lrpath.training.context import get_context
from megatron_lrpath.training.guards import signals


def keep_steps() -> frozenset[int]:
    """Steps whose checkpoints this run must leave behind (branch points, version ends)."""
    context = get_context()
    return context.keep_steps if context else frozenset()


def must_save(args: Any, iteration: int) -> bool:
    """Whether `iteration` is to be kept and nothing else of Megatron saves it.

    Megatron itself saves at multiples of the interval and at the last step.
    """
    regular = args.save_interval and iteration % args.save_interval == 0
    return bool(args.save) and iteration in keep_steps() and not regular and iteration < args.train_iters


def wrap_checkpoint_and_decide_exit(original: Callable[..., bool]) -> Callable[..., bool]:
    """Save at the steps to keep, decide as Megatron does, save and stop where a signal asks for it."""

    @functools.wraps(original)
    def checkpoint_and_decide_exit(
        model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        iteration: int,
        num_floating_point_operations_so_far: Any,
        checkpointing_context: Any,
        train_data_iterator: Any,
    ) -> bool:
        from megatron.training import get_args
        from megatron.training.training import save_checkpoint_and_time

        state = (iteration, model, optimizer, opt_param_scheduler, num_floating_point_operations_so_far)

        def save() -> None:
            save_checkpoint_and_time(*state, checkpointing_context, train_data_iterator=train_data_iterator)

        if must_save(get_args(), iteration):
            save()
        if original(
            model,
            optimizer,
            opt_param_scheduler,
            iteration,
            num_floating_point_operations_so_far,
            checkpointing_context,
            train_data_iterator,
        ):
            return True
        if signals.stopping():
            save()
        return signals.stopping()

    return checkpoint_and_decide_exit

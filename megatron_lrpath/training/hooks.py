"""Megatron's names that act on the run: each wrapper calls the part of the session that answers, then the original."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.training import get_args

from megatron_lrpath.runs.checkpoints import TRACKER
from megatron_lrpath.training.checkpoints.parent import is_pretrained
from megatron_lrpath.training.checkpoints.saves import SaveFailedError
from megatron_lrpath.training.scheduler import LRPathScheduler
from megatron_lrpath.training.session import Session

Wrapped = Callable[..., Any]


def wrap_scheduler_builder(original: Wrapped, session: Session) -> Wrapped:
    """Megatron's builder, or ours where the run has a learning-rate path."""

    @functools.wraps(original)
    def get_optimizer_param_scheduler(optimizer: Any, *args: Any, **named: Any) -> Any:
        if session.context is None:
            return original(optimizer, *args, **named)
        session.scheduler = LRPathScheduler.of(optimizer, session.context.path, get_args())
        return session.scheduler

    return get_optimizer_param_scheduler


def wrap_training_log(original: Wrapped, session: Session) -> Wrapped:
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
        **named: Any,
    ) -> Any:
        if session.scheduler is not None:
            loss = loss_dict.get("lm loss")
            rate = session.step_ended(iteration, loss, grad_norm, bool(skipped_iter))
            learning_rate = learning_rate if learning_rate is None else rate
        rest = (loss_scale, report_memory_flag, skipped_iter, grad_norm, *args)
        return original(loss_dict, total_loss_dict, learning_rate, iteration, *rest, **named)

    return training_log


def wrap_checkpoint_and_decide_exit(original: Wrapped, session: Session) -> Wrapped:
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
        *args: Any,
        **named: Any,
    ) -> bool:
        from megatron.training.training import save_checkpoint_and_time  # itself a replaced name's caller

        trained = (model, optimizer, opt_param_scheduler)
        rest = (num_floating_point_operations_so_far, checkpointing_context)

        def save() -> None:
            save_checkpoint_and_time(iteration, *trained, *rest, train_data_iterator=train_data_iterator)

        settings, saves = get_args(), session.saves
        if saves is not None and saves.is_due(iteration, settings.save_interval, settings.train_iters):
            save()
        if original(*trained, iteration, *rest, train_data_iterator, *args, **named):
            return True
        if session.signals.stopping:
            save()
        return session.signals.stopping

    return checkpoint_and_decide_exit


def wrap_save_checkpoint(original: Wrapped, session: Session) -> Wrapped:
    """Save a step once; a save that fails is a warning, and the training goes on."""

    @functools.wraps(original)
    def save_checkpoint(iteration: int, *args: Any, **named: Any) -> None:
        saves = session.saves
        if saves is None:
            return original(iteration, *args, **named)
        if saves.begin(iteration):
            try:
                original(iteration, *args, **named)
            except SaveFailedError as error:
                saves.failed(iteration, str(error))

    return save_checkpoint


def wrap_maybe_finalize_async_save(original: Wrapped, session: Session) -> Wrapped:
    """Finish asynchronous saves; one that failed is a warning, and the training goes on."""

    @functools.wraps(original)
    def maybe_finalize_async_save(*args: Any, **named: Any) -> None:
        while True:
            try:
                return original(*args, **named)
            except SaveFailedError as error:
                assert session.saves is not None
                session.saves.failed(session.saves.under_way[0], str(error))

    return maybe_finalize_async_save


def wrap_dist_save(original: Wrapped, session: Session) -> Wrapped:
    """Write a distributed checkpoint aside; commit it now, or when the asynchronous writers are done."""

    @functools.wraps(original)
    def save(sharded_state_dict: Any, checkpoint_dir: str, *args: Any, **named: Any) -> Any:
        if session.commits is None:
            return original(sharded_state_dict, checkpoint_dir, *args, **named)
        return session.commits.save(original, sharded_state_dict, checkpoint_dir, *args, **named)

    return save


def wrap_first_rank_write(original: Wrapped, session: Session) -> Wrapped:
    """Defer an error of the disk in a file that rank 0 writes while others wait; all ranks raise it at the commit."""

    @functools.wraps(original)
    def write(*args: Any, **named: Any) -> None:
        try:
            original(*args, **named)
        except OSError as error:
            if session.commits is None:
                raise
            session.commits.defer(error)

    return write


def wrap_ensure_directory(original: Wrapped, session: Session) -> Wrapped:
    """Leave the folder of a checkpoint to its commit, which gives it its name when all of it is written."""

    @functools.wraps(original)
    def ensure_directory_exists(filename: str, check_parent: bool = True, *args: Any, **named: Any) -> None:
        if check_parent or session.saves is None:  # the folder itself is a distributed checkpoint's
            original(filename, check_parent, *args, **named)

    return ensure_directory_exists


def wrap_tracker_filename(original: Wrapped, session: Session) -> Wrapped:
    """Let Megatron neither write the tracker (in place) nor read it: the manifests say what is newest.

    Of weights to start from, which a run only reads, the tracker names the checkpoint.
    """

    @functools.wraps(original)
    def get_checkpoint_tracker_filename(checkpoints_path: str, *args: Any, **named: Any) -> str:
        given = session.saves is None or is_pretrained(checkpoints_path)
        return original(checkpoints_path, *args, **named) if given else os.devnull

    return get_checkpoint_tracker_filename


def wrap_wandb_save(original: Wrapped, session: Session) -> Wrapped:
    """Weights & Biases gets the real tracker's name."""

    @functools.wraps(original)
    def on_save_checkpoint_success(
        checkpoint_path: str, tracker_filename: str, save_dir: str, *args: Any, **named: Any
    ) -> None:
        tracker = tracker_filename if session.saves is None else str(Path(save_dir) / TRACKER)
        original(checkpoint_path, tracker, save_dir, *args, **named)

    return on_save_checkpoint_success


def wrap_get_grad_norm(original: Wrapped, session: Session) -> Wrapped:
    """Keep the norm for the guard (Megatron computes it before every update)."""

    @functools.wraps(original)
    def get_grad_norm(self: Any, *args: Any, **named: Any) -> float:
        norm: float = original(self, *args, **named)
        if session.guard is not None:
            session.guard.norm = norm
        return norm

    return get_grad_norm


def wrap_step_with_ready_grads(original: Wrapped, session: Session) -> Wrapped:
    """Ask the guard first; a skipped update counts as Megatron counts one with an overflow."""

    @functools.wraps(original)
    def step_with_ready_grads(self: Any, *args: Any, **named: Any) -> bool:
        if session.guard is None or session.guard.before_update():
            return bool(original(self, *args, **named))
        return False

    return step_with_ready_grads


def wrap_load_state_dict(original: Wrapped, session: Session) -> Wrapped:
    """Load a distributed optimizer's state that may have been saved under other rates; a step count a parameter."""

    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        inner, change = state_dict["optimizer"], session.rate_change
        groups = change.renamed(inner["param_groups"]) if change else inner["param_groups"]
        original(self, {**state_dict, "optimizer": {**inner, "param_groups": groups}})
        for moments in self.optimizer.state.values():
            # One tensor was given to all parameters, so that torch's Adam would count every step many times.
            if isinstance(moments.get("step"), torch.Tensor):
                moments["step"] = moments["step"].clone()

    return load_state_dict


def wrap_filter_and_reorder(original: Wrapped, session: Session) -> Any:
    """Pair parameter groups that may have been saved under other rates."""

    @functools.wraps(original)
    def filter_and_reorder(
        current_groups: list[dict[str, Any]],
        state_dict_groups: list[dict[str, Any]],
        *args: Any,
        **named: Any,
    ) -> Any:
        change = session.rate_change
        stored = change.renamed(state_dict_groups) if change else state_dict_groups
        return original(current_groups, stored, *args, **named)

    return staticmethod(filter_and_reorder)

"""Replacements of Megatron's names at the start and in the loop: each calls the responsible part of the
session, then the original.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.training import get_args

from megatron_lrpath.plan.secrets import hide_values
from megatron_lrpath.runs.checkpoints import TRACKER
from megatron_lrpath.training.checkpoints.commit import SaveFailedError
from megatron_lrpath.training.checkpoints.parent import is_pretrained
from megatron_lrpath.training.first_weights import draw_all_experts
from megatron_lrpath.training.machine import importable
from megatron_lrpath.training.optimizer import own_groups
from megatron_lrpath.training.scheduler import LRPathScheduler
from megatron_lrpath.training.session import Session

Wrapped = Callable[..., Any]


def scheduler_builder(session: Session, original: Wrapped, optimizer: Any, *args: Any, **named: Any) -> Any:
    """Return Megatron's scheduler, or this project's if the run has a learning-rate path."""
    if session.context is None:
        return original(optimizer, *args, **named)
    session.scheduler = LRPathScheduler.of(optimizer, session.context.path, session.context.sizes, get_args())
    return session.scheduler


def build_model(session: Session, original: Wrapped, self: Any, *args: Any, **named: Any) -> None:
    """Draw the initial weights of several pipeline stages in the order of a single stage."""
    if session.first_weights is None:
        return original(self, *args, **named)
    session.first_weights.build(lambda: original(self, *args, **named))


def build_experts(session: Session, original: Wrapped, self: Any, *args: Any, **named: Any) -> None:
    """Draw the initial weights of the experts of all ranks, if they come from one seed."""
    if not session.draws_all_experts:
        return original(self, *args, **named)
    draw_all_experts(lambda experts: original(experts, *args, **named), self)


def share_embeddings(session: Session, original: Wrapped, self: Any, *args: Any, **named: Any) -> None:
    """Share the embeddings between the first and the last stage after all stages have drawn their weights."""
    if session.first_weights is None:
        return original(self, *args, **named)
    session.first_weights.when_built(lambda: original(self, *args, **named))


def training_log(
    session: Session,
    original: Wrapped,
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
    """Log the rate that the step used (Megatron reads it after the scheduler has advanced) and record the
    step.
    """
    if session.scheduler is not None:
        loss = loss_dict.get("lm loss")
        rate = session.step_ended(iteration, loss, grad_norm, bool(skipped_iter))
        learning_rate = learning_rate if learning_rate is None else rate
    rest = (loss_scale, report_memory_flag, skipped_iter, grad_norm, *args)
    return original(loss_dict, total_loss_dict, learning_rate, iteration, *rest, **named)


def checkpoint_and_decide_exit(
    session: Session,
    original: Wrapped,
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
    """Save at the steps to keep, decide as Megatron does, and save and stop after a signal."""
    from megatron.training.training import save_checkpoint_and_time  # it is called by a replaced name

    trained = (model, optimizer, opt_param_scheduler)
    rest = (num_floating_point_operations_so_far, checkpointing_context)

    def save() -> None:
        save_checkpoint_and_time(iteration, *trained, *rest, train_data_iterator=train_data_iterator)

    settings, saves = get_args(), session.saves
    if saves is not None and saves.is_due(iteration, settings.save_interval, settings.train_iters):
        save()
    if original(*trained, iteration, *rest, train_data_iterator, *args, **named):
        session.exits.asked = True
    elif session.signals.stopping:
        save()
        session.exits.asked = True
    return session.exits.asked


def note_print(session: Session, original: Wrapped, message: str, *args: Any, **named: Any) -> None:
    """Record Megatron's output while it loads: its exits have no message of their own."""
    session.exits.said = str(message)
    original(message, *args, **named)


def save_checkpoint(session: Session, original: Wrapped, iteration: int, *args: Any, **named: Any) -> None:
    """Save a step once; a failed save is a warning, and the training continues."""
    saves = session.saves
    if saves is None:
        return original(iteration, *args, **named)
    if saves.begin(iteration):
        try:
            original(iteration, *args, **named)
        except SaveFailedError as error:
            saves.failed(iteration, str(error))


def maybe_finalize_async_save(session: Session, original: Wrapped, *args: Any, **named: Any) -> None:
    """Finish asynchronous saves; a failed one is a warning, and the training continues."""
    while True:
        try:
            return original(*args, **named)
        except SaveFailedError as error:
            assert session.saves is not None
            session.saves.failed(session.saves.under_way[0], str(error))


def dist_save(
    session: Session,
    original: Wrapped,
    sharded_state_dict: Any,
    checkpoint_dir: str,
    *args: Any,
    **named: Any,
) -> Any:
    """Write a distributed checkpoint to a temporary folder; commit it now, or when the asynchronous writers
    are done.
    """
    if session.commits is None:
        return original(sharded_state_dict, checkpoint_dir, *args, **named)
    return session.commits.save(original, sharded_state_dict, checkpoint_dir, *args, **named)


def first_rank_write(session: Session, original: Wrapped, *args: Any, **named: Any) -> None:
    """Defer an error of the disk in a file that rank 0 writes while others wait; all ranks raise it at the
    commit.
    """
    try:
        original(*args, **named)
    except OSError as error:
        if session.commits is None:
            raise
        session.commits.defer(error)


def ensure_directory(
    session: Session, original: Wrapped, filename: str, check_parent: bool = True, *args: Any, **named: Any
) -> None:
    """Leave the folder of a checkpoint to its commit, which renames it when all of it is written."""
    if check_parent or session.saves is None:  # the folder itself is a distributed checkpoint's
        original(filename, check_parent, *args, **named)


def tracker_filename(
    session: Session, original: Wrapped, checkpoints_path: str, *args: Any, **named: Any
) -> str:
    """Prevent Megatron from writing (in place) and reading the tracker: the manifests define the newest
    checkpoint.

    For weights to start from, which a run only reads, the tracker names the checkpoint.
    """
    given = session.saves is None or is_pretrained(checkpoints_path)
    return original(checkpoints_path, *args, **named) if given else os.devnull


def wandb_save(
    session: Session,
    original: Wrapped,
    checkpoint_path: str,
    tracker_filename: str,
    save_dir: str,
    *args: Any,
    **named: Any,
) -> None:
    """Give Weights & Biases the real tracker's name."""
    tracker = tracker_filename if session.saves is None else str(Path(save_dir) / TRACKER)
    original(checkpoint_path, tracker, save_dir, *args, **named)


def get_grad_norm(session: Session, original: Wrapped, self: Any, *args: Any, **named: Any) -> float:
    """Keep the norm for the guard (Megatron computes it before every update)."""
    norm: float = original(self, *args, **named)
    if session.guard is not None:
        session.guard.norm = norm
    return norm


def prepare_grads(session: Session, original: Wrapped, self: Any, *args: Any, **named: Any) -> bool:
    """Begin the step; if gradients overflowed, Megatron makes no update, and the ranks agree on signals here."""
    if session.guard is not None:
        session.guard.gradients_ready()
    overflowed = bool(original(self, *args, **named))
    if overflowed and session.guard is not None:
        session.guard.overflowed()
    return overflowed


def step_with_ready_grads(session: Session, original: Wrapped, self: Any, *args: Any, **named: Any) -> bool:
    """Call the guard first; a skipped update counts like an update with an overflow in Megatron."""
    if session.guard is None or session.guard.before_update():
        return bool(original(self, *args, **named))
    return False


def load_state_dict(session: Session, original: Wrapped, self: Any, state_dict: dict[str, Any]) -> None:
    """Load a distributed optimizer's state that may have been saved with other rates; with one step count per
    parameter.
    """
    inner = state_dict["optimizer"]
    groups = inner["param_groups"]
    if session.context is not None:
        groups = own_groups(groups, self.optimizer.param_groups)
    original(self, {**state_dict, "optimizer": {**inner, "param_groups": groups}})
    for moments in self.optimizer.state.values():
        # All parameters share one tensor, so that torch's Adam would count every step many times.
        if isinstance(moments.get("step"), torch.Tensor):
            moments["step"] = moments["step"].clone()


def filter_and_reorder(
    session: Session,
    original: Wrapped,
    current_groups: list[dict[str, Any]],
    state_dict_groups: list[dict[str, Any]],
    *args: Any,
    **named: Any,
) -> Any:
    """Pair parameter groups that may have been saved with other rates."""
    stored = state_dict_groups if session.context is None else own_groups(state_dict_groups, current_groups)
    return original(current_groups, stored, *args, **named)


def print_args(original: Wrapped, title: str, args: Any) -> None:
    """Print Megatron's arguments without the values of secrets."""
    original(title, Namespace(**hide_values(vars(args))))


def compile_helpers(original: Wrapped, *args: Any, **named: Any) -> None:
    """Compile Megatron's dataset helpers only if they are not compiled yet."""
    if not importable("megatron.core.datasets.helpers_cpp"):
        original(*args, **named)


def initialize_megatron(original: Wrapped, allow_no_cuda: bool = False, *args: Any, **named: Any) -> Any:
    """Initialize without a GPU."""
    return original(True, *args, **named)


def set_jit_fusion_options(session: Session, original: Wrapped, *args: Any, **named: Any) -> None:
    """Warm up Megatron's kernels with bias and dropout only for a model with both; never on the CPU."""
    settings = get_args()
    dropout = settings.hidden_dropout or settings.attention_dropout
    if session.device != "cpu" and (settings.add_bias_linear or dropout):
        original(*args, **named)

"""Between the gradients and the update, in every step: is the loss finite, a spike, is anybody told to stop?

One small all-reduce a step answers all three on all ranks alike, so that all stop, skip or go on together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.training import get_args

from megatron_lrpath.training.branch import expect_iteration
from megatron_lrpath.training.guards import signals
from megatron_lrpath.training.guards.finite import stop_for_numbers
from megatron_lrpath.training.guards.spikes import Spike, SpikeDetector


@dataclass
class Guard:
    """Watches the steps of this process's run.

    Attributes:
        check: whether numbers that are not finite stop the run (--no-check-for-nan-in-loss-and-grad: no).
        detector: judges the loss of each step; None looks for no spikes.
        skip: whether the update of a spike is skipped.
        max_skips: updates skipped in a row at most.
        loss: the current step's loss over the whole batch (nats a token), once its gradients are there.
        spike: the current step's loss is one.
        skipped: the current step's update is skipped for it.
        norm: the current step's gradient norm, as far as this rank knows.
        first_step: the step that must have been loaded, until that has been checked.
    """

    check: bool = True
    detector: SpikeDetector | None = None
    skip: bool = False
    max_skips: int = 0
    loss: float | None = None
    spike: Spike | None = None
    skipped: bool = False
    norm: float = 0.0
    first_step: int | None = None
    _losses: list[torch.Tensor] = field(default_factory=list)
    _skips: int = 0

    def note(self, loss: torch.Tensor, tokens: torch.Tensor) -> None:
        """Take note of a micro-batch: the sum of its losses, and its tokens."""
        if torch.is_grad_enabled():  # evaluations are not ours to judge
            self._losses.append(torch.stack([loss.detach().double(), tokens.detach().double()]))

    def before_update(self) -> bool:
        """Decide, on all ranks alike, whether the update is to be made.

        Raises:
            TrainingStoppedError: the loss or the gradient norm is not finite.
            UserError: the first step is not the one that belongs to the loaded checkpoint.
        """
        if self.first_step is not None:
            expect_iteration(get_args(), self.first_step)
            self.first_step = None
        losses, self._losses = self._losses, []
        total, tokens, wrong, told = self._agree(losses)
        if told:
            signals.agree_to_stop()
        self.loss = total / tokens if tokens else math.nan
        if self.check and (wrong or not math.isfinite(self.loss)):
            stop_for_numbers(self.loss, self.norm, [one[0].item() for one in losses])
        self.spike = self.detector.judge(self.loss) if self.detector else None
        self.skipped = self.spike is not None and self.skip and self._skips < self.max_skips
        self._skips = self._skips + 1 if self.skipped else 0
        return not self.skipped

    def step_ended(self) -> None:
        """Forget the step (one with an overflow has not come to its update)."""
        self._losses.clear()
        self.loss, self.spike, self.skipped = None, None, False

    def _agree(self, losses: list[torch.Tensor]) -> list[float]:
        """Sums over the ranks: losses, tokens, norms that are not finite, ranks that were told to stop."""
        ours = torch.zeros(4, dtype=torch.float64, device="cuda")
        if losses and mpu.get_tensor_model_parallel_rank() == 0:
            ours[:2] = torch.stack(losses).sum(dim=0)
        ours[2:] = torch.tensor([not math.isfinite(self.norm), signals.received()], dtype=torch.float64)
        dist.all_reduce(ours)
        return ours.tolist()


_current: Guard | None = None


def current_guard() -> Guard | None:
    """The process's guard, None where Megatron trains on its own terms."""
    return _current


def set_guard(guard: Guard | None) -> None:
    """Make `guard` the process's."""
    global _current
    _current = guard


def wrap_get_grad_norm(original: Callable[[Any], float]) -> Callable[[Any], float]:
    """Keep the norm for the guard (Megatron computes it before every update)."""

    @functools.wraps(original)
    def get_grad_norm(self: Any) -> float:
        norm = original(self)
        if _current is not None:
            _current.norm = norm
        return norm

    return get_grad_norm


def wrap_step_with_ready_grads(original: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Ask the guard first; a skipped update counts as Megatron counts one with an overflow."""

    @functools.wraps(original)
    def step_with_ready_grads(self: Any) -> bool:
        if _current is None:
            return original(self)
        signals.training_begins()
        return original(self) if _current.before_update() else False

    return step_with_ready_grads

"""The check between gradients and update in every step: non-finite loss, loss spike, stop signal.

One small all-reduce for each step gives all ranks the same answer, so that all of them stop, skip or
continue.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.training import get_args

from megatron_lrpath.errors import TrainingStoppedError
from megatron_lrpath.training.checkpoints.commit import Saves
from megatron_lrpath.training.checkpoints.parent import expect_iteration
from megatron_lrpath.training.exits import Signals

MINIMUM = 16  # number of losses before the first that can be a spike
TO_DEVIATION = 1.4826  # median absolute deviation -> standard deviation of a normal distribution
SMALLEST_SCALE = 0.01  # nats: minimum, for losses that barely vary


@dataclass(frozen=True)
class Spike:
    """The loss of a step, the running median, and the limit that the loss exceeded (nats per token)."""

    loss: float
    median: float
    limit: float


class SpikeDetector:
    """Compare each loss with the `window` losses before it.

    A loss is a spike above `median + threshold · 1.4826 · MAD`, where MAD is the median absolute deviation
    from the median (1.4826 · MAD is at least 0.01 nats). Every loss, including spikes, enters the window,
    so that a permanent change counts as a spike for at most half a window.

    Args:
        threshold: in standard deviations.
        window: in steps.
        earlier: losses of the steps before the first checked step.
    """

    def __init__(self, threshold: float, window: int, earlier: Iterable[float] = ()) -> None:
        self.threshold = threshold
        self.losses: deque[float] = deque(earlier, maxlen=window)

    def judge(self, loss: float) -> Spike | None:
        """Return the spike if `loss` is one, else None; the loss enters the window in both cases."""
        spike = None
        if len(self.losses) >= min(MINIMUM, self.losses.maxlen or MINIMUM):
            median = statistics.median(self.losses)
            deviation = statistics.median(abs(other - median) for other in self.losses)
            limit = median + self.threshold * max(TO_DEVIATION * deviation, SMALLEST_SCALE)
            spike = Spike(loss, median, limit) if loss > limit else None
        self.losses.append(loss)
        return spike


def stop_for_numbers(loss: float, norm: float, micro_batches: list[float], saves: Saves) -> None:
    """Stop before the update. All ranks call this in the same step.

    Args:
        loss: the loss of the whole batch.
        norm: the norm of the gradient, as known to this rank.
        micro_batches: the losses of this rank's micro-batches, in order; empty on ranks without a loss.
        saves: the saves of the run, for the message.

    Raises:
        TrainingStoppedError: always.
    """
    from megatron.training.async_utils import maybe_finalize_async_save

    args = get_args()
    bad = [index for index, value in enumerate(micro_batches) if not math.isfinite(value)]
    # Megatron distributes the micro-batches over the data-parallel ranks in turn.
    size, ranks = args.micro_batch_size, mpu.get_data_parallel_world_size()
    begin = args.consumed_train_samples + mpu.get_data_parallel_rank() * size
    firsts = [begin + index * size * ranks for index in bad]
    samples = [
        f"samples {first} to {first + size - 1}" if size > 1 else f"sample {first}" for first in firsts
    ]
    ours = (samples, [micro_batches[index] for index in bad], norm)
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, ours)
    maybe_finalize_async_save(blocking=True)
    raise TrainingStoppedError(message(args, loss, everybody, saves))


def message(
    args: Any, loss: float, everybody: list[tuple[list[str], list[float], float]], saves: Saves
) -> str:
    """Return the message: the cause, how to inspect the batch, and what to do."""
    step = args.curr_iteration + 1
    culprits = [
        f"{value} on rank {rank} in {samples}"
        for rank, (places, values, _) in enumerate(everybody)
        for samples, value in zip(places, values, strict=True)
    ]
    if culprits:
        what = f"the loss is not finite: {'; '.join(culprits)}"
    else:
        ranks = [rank for rank, (_, _, norm) in enumerate(everybody) if not math.isfinite(norm)]
        where = "on every rank" if len(ranks) == len(everybody) else f"on ranks {', '.join(map(str, ranks))}"
        what = f"the gradient norm is {everybody[ranks[0]][2]} {where}, the loss {loss:.4f}"
    first = args.consumed_train_samples
    newest = f"step {saves.steps[-1]} in {saves.root}" if saves.steps else "none"
    return (
        f"step {step}: {what}. Stopped before the update; the batch is samples {first} to "
        f"{first + get_current_global_batch_size() - 1} (`lrpath samples RUN --step {step}` prints them). Last good "
        f"checkpoint: {newest}; a restart continues from there."
    )


@dataclass
class Guard:
    """The checks of the steps of this process's run.

    Attributes:
        signals: whether a signal asked this rank, or any rank, to stop.
        saves: the saves of the run.
        check: whether non-finite numbers stop the run (False with --no-check-for-nan-in-loss-and-grad).
        detector: detects loss spikes; None disables the detection.
        skip: whether the update of a spike is skipped.
        max_skips: the maximum number of successive skipped updates.
        loss: the current step's loss over the whole batch (nats per token), after its gradients are computed.
        spike: whether the current step's loss is a spike.
        skipped: whether the current step's update is skipped because of the spike.
        norm: the current step's gradient norm, as known to this rank.
        first_step: the step that the checkpoint must have been saved at, until it is checked.
        first_samples: the samples consumed before that step.
    """

    signals: Signals
    saves: Saves
    check: bool = True
    detector: SpikeDetector | None = None
    skip: bool = False
    max_skips: int = 0
    loss: float | None = None
    spike: Spike | None = None
    skipped: bool = False
    norm: float = 0.0
    first_step: int | None = None
    first_samples: int = 0
    _losses: list[torch.Tensor] = field(default_factory=list)
    _skips: int = 0

    def note(self, loss: torch.Tensor, tokens: torch.Tensor) -> None:
        """Record a micro-batch: the sum of its losses, and its number of tokens."""
        if torch.is_grad_enabled():  # evaluations are not checked
            self._losses.append(torch.stack([loss.detach().double(), tokens.detach().double()]))

    def gradients_ready(self) -> None:
        """Check the first step of the training, whether it makes an update or not.

        Raises:
            UserError: the step does not match the loaded checkpoint.
        """
        if not self.signals.training:
            self.signals.begin()
        if self.first_step is not None:
            expect_iteration(get_args(), self.first_step, self.first_samples)
            self.first_step = None

    def overflowed(self) -> None:
        """Agree with the other ranks in a step without an update, because its gradients overflowed (fp16)."""
        self.signals.stopping |= bool(self._agree([])[3])

    def before_update(self) -> bool:
        """Decide, equally on all ranks, whether to make the update.

        Raises:
            TrainingStoppedError: the loss or the gradient norm is not finite.
        """
        losses, self._losses = self._losses, []
        total, tokens, wrong, asked = self._agree(losses)
        if asked:
            self.signals.stopping = True
        self.loss = total / tokens if tokens else math.nan
        if self.check and (wrong or not math.isfinite(self.loss)):
            stop_for_numbers(self.loss, self.norm, [one[0].item() for one in losses], self.saves)
        self.spike = self.detector.judge(self.loss) if self.detector else None
        self.skipped = self.spike is not None and self.skip and self._skips < self.max_skips
        self._skips = self._skips + 1 if self.skipped else 0
        return not self.skipped

    def step_ended(self) -> None:
        """Reset per-step state (a step with an overflow skips the update)."""
        self._losses.clear()
        self.loss, self.spike, self.skipped = None, None, False

    def _agree(self, losses: list[torch.Tensor]) -> list[float]:
        """Return sums over the ranks: losses, tokens, non-finite norms, ranks that received a signal."""
        ours = torch.zeros(4, dtype=torch.float64, device="cuda")
        if losses and mpu.get_tensor_model_parallel_rank() == 0:
            ours[:2] = torch.stack(losses).sum(dim=0)
        ours[2:] = torch.tensor([not math.isfinite(self.norm), self.signals.received], dtype=torch.float64)
        dist.all_reduce(ours)
        return ours.tolist()

"""Loss spikes: a step's loss far above the running median of the steps before it."""

from __future__ import annotations

import argparse
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

ACTIONS = ("log", "skip", "off")
MINIMUM = 16  # losses before anything counts as a spike
TO_DEVIATION = 1.4826  # median absolute deviation -> standard deviation of a normal distribution
SMALLEST_SCALE = 0.01  # nats: a loss that hardly moves has no scale of its own


@dataclass(frozen=True)
class Spike:
    """A step's loss, the running median, and the limit it passed (nats a token)."""

    loss: float
    median: float
    limit: float


class SpikeDetector:
    """Compares each loss with the `window` losses before it.

    A loss is a spike above `median + threshold · 1.4826 · MAD`, where MAD is the median absolute deviation
    from the median (at least 0.01 nats in place of 1.4826 · MAD). Every loss, spikes included, enters the
    window, so that a lasting change is a spike for half a window at most.

    Args:
        threshold: in standard deviations.
        window: in steps.
        earlier: losses of the steps before the first one judged.
    """

    def __init__(self, threshold: float, window: int, earlier: Iterable[float] = ()) -> None:
        self.threshold = threshold
        self.losses: deque[float] = deque(earlier, maxlen=window)

    def judge(self, loss: float) -> Spike | None:
        """Whether `loss` is a spike; it enters the window either way."""
        spike = None
        if len(self.losses) >= min(MINIMUM, self.losses.maxlen or MINIMUM):
            median = statistics.median(self.losses)
            deviation = statistics.median(abs(other - median) for other in self.losses)
            limit = median + self.threshold * max(TO_DEVIATION * deviation, SMALLEST_SCALE)
            spike = Spike(loss, median, limit) if loss > limit else None
        self.losses.append(loss)
        return spike


def add_spike_arguments(parser: argparse.ArgumentParser) -> None:
    """The argument group "loss spikes"."""
    group = parser.add_argument_group("loss spikes")
    group.add_argument(
        "--loss-spike-action",
        choices=ACTIONS,
        default="log",
        help="at a loss spike: log it with its samples, skip the update too, or do not look for spikes",
    )
    group.add_argument(
        "--loss-spike-threshold",
        type=float,
        default=10.0,
        metavar="DEVIATIONS",
        help="how far above the running median a spike is, in robust standard deviations",
    )
    group.add_argument(
        "--loss-spike-window", type=int, default=128, metavar="STEPS", help="steps of the running median"
    )
    group.add_argument(
        "--loss-spike-max-skips",
        type=int,
        default=3,
        metavar="STEPS",
        help="updates skipped in a row at most: after that the loss has changed for good",
    )

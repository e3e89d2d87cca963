"""The weights with which checkpoints stand for a decay (WSM, arXiv 2507.17634); pure Python."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from megatron_lrpath.schedule import LRPath


def decay_shares(path: LRPath, steps: Sequence[int]) -> list[float]:
    """w_1 … w_k: the mean rate of a decay between each checkpoint and the one before, over max_lr.

    Args:
        path: the decay, positions in steps; it begins at the first checkpoint.
        steps: the checkpoints' steps, ascending, the first and k others.

    A merge scales the update between two checkpoints by the share of the rate that the decay would have had
    there; at the constant rate of the main path that is what the decayed run's updates would have been to
    first order.
    """
    top = path.schedule.max_lr
    return [
        math.fsum(path.lr_at(position) for position in range(before, after)) / (after - before) / top
        for before, after in itertools.pairwise(steps)
    ]


def merge_weights(shares: Sequence[float]) -> list[float]:
    """c_0 = 1 − w_1, c_j = w_j − w_{j+1}, c_k = w_k; they sum to 1.

    Raises ValueError unless 1 ≥ w_1 ≥ … ≥ w_k ≥ 0.
    """
    bounded = [1.0, *shares, 0.0]
    if not shares or any(after > before + 1e-12 for before, after in itertools.pairwise(bounded)):
        raise ValueError(f"the shares of a decay must fall from 1 to 0, unlike {list(shares)}")
    return [before - after for before, after in itertools.pairwise(bounded)]

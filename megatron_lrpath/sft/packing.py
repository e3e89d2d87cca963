"""Which examples share a sample: best-fit decreasing, shuffled by a seed; a new order for every epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_lrpath.data.draw_random import permutation
from megatron_lrpath.data.index_cache import Arrays, Entry

FORMAT = 1  # part of every key: raise it when packing changes

Lengths = npt.NDArray[np.integer]


def pack(lengths: Lengths, capacity: int) -> list[list[int]]:
    """Put items of these lengths, each at most `capacity`, into as few bins as best-fit decreasing finds.

    The longest goes first, each into the fullest bin that has room for it; equal ones keep their order. How
    many bins there are depends on the lengths alone, not on their order.
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins by the room that is left in them
    rooms = 0  # bit r: some bin has room r
    for item in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        length = int(lengths[item])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        left = room - length
        with_room[left].append(chosen)
        rooms |= 1 << left
    return bins


def epoch_entry(
    digest: str, examples: npt.NDArray[np.uint32], lengths: Lengths, capacity: int, key: tuple[int, int]
) -> Entry:
    """The cache entry of an epoch's samples: `examples` in order, and `bounds` of the samples in them.

    Args:
        digest: of the prepared data and of what of them is used.
        examples: numbers of the examples that are used.
        lengths: their lengths (positions).
        capacity: positions of a sample.
        key: (seed, epoch).
    """

    def build() -> Arrays:
        order = permutation(len(examples), "sft-examples", *key)
        bins = pack(lengths[order], capacity)
        bins = [bins[number] for number in permutation(len(bins), "sft-samples", *key).tolist()]
        return {"examples": examples[order[np.concatenate(bins)]], "bounds": bounds_of(bins)}

    return Entry(["sft", FORMAT, digest, capacity, *key], ("examples", "bounds"), build)


def in_order_entry(digest: str, examples: npt.NDArray[np.uint32], lengths: Lengths, capacity: int) -> Entry:
    """The same without a shuffle, for validation."""

    def build() -> Arrays:
        bins = pack(lengths, capacity)
        return {"examples": examples[np.concatenate(bins)], "bounds": bounds_of(bins)}

    return Entry(["sft-valid", FORMAT, digest, capacity], ("examples", "bounds"), build)


def bounds_of(bins: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    """Where each bin begins in their concatenation, and the end."""
    return np.concatenate([[0], np.cumsum([len(one) for one in bins])]).astype(np.int64)


def held_out(examples: int, share: float, seed: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """(for training, for validation): the numbers of the examples, round(share · examples) of them held out.

    At least one is held out, and one left.
    """
    count = min(max(1, round(share * examples)), examples - 1)
    order = permutation(examples, "sft-held-out", seed)
    return np.sort(order[count:]), np.sort(order[:count])

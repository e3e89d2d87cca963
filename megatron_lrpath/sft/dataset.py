"""Packed samples for Megatron's loop: several examples in a sample, with attention within each example only."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_lrpath.data.index_cache import Arrays, IndexCache
from megatron_lrpath.data.indexed import document_lengths
from megatron_lrpath.sft.prepared import ANSWERS, TOKENS, TRAIN, VALID, Prepared, packed_entry


class PackedExamples:
    """Samples of one pair of datasets (tokens and answers), as ranges of an array of examples."""

    def __init__(self, prefix: Path, seq_length: int, mmap: bool = True) -> None:
        self.name = f"{prefix}_{TOKENS}"
        self.seq_length = seq_length
        self.tokens = IndexedDataset(self.name, mmap=mmap)
        self.answers = IndexedDataset(f"{prefix}_{ANSWERS}", mmap=mmap)

    def sample(self, examples: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the examples one after another, [seq_length] each; the rest of the sample is masked out.

        The keys are `tokens`, `labels`, `loss_mask` (1 if the label is an answer's token), `position_ids`
        (from 0 in each example) and `segments` (the example's number in the sample, from 1; 0 in the
        rest). An example of n tokens takes n-1 positions: its last token is only a label.
        """
        row = {
            "tokens": torch.zeros(self.seq_length, dtype=torch.int64),
            "labels": torch.zeros(self.seq_length, dtype=torch.int64),
            "loss_mask": torch.zeros(self.seq_length, dtype=torch.float32),
            "position_ids": torch.zeros(self.seq_length, dtype=torch.int64),
            "segments": torch.zeros(self.seq_length, dtype=torch.int32),
        }
        start = 0
        for number, example in enumerate(examples.tolist(), start=1):
            tokens = torch.from_numpy(self.tokens.get(example).astype(np.int64))
            answers = torch.from_numpy(self.answers.get(example).astype(np.float32))
            here = slice(start, start + len(tokens) - 1)
            row["tokens"][here] = tokens[:-1]
            row["labels"][here] = tokens[1:]
            row["loss_mask"][here] = answers[1:]
            row["position_ids"][here] = torch.arange(len(tokens) - 1)
            row["segments"][here] = number
            start = here.stop
        row["position_ids"][start:] = torch.arange(self.seq_length - start)
        return row


class PackedDataset(torch.utils.data.Dataset):
    """All epochs in order, each packed and shuffled by (seed, epoch); a position is a consumed sample.

    `samples` is the number of samples of the whole run; up to `length` there are padding samples, which
    are masked out.
    """

    index_split = Split.train

    def __init__(
        self, source: PackedExamples, epochs: list[Arrays], samples: int, length: int | None = None
    ) -> None:
        self._source = source
        self._epochs = epochs
        self._ends = list(np.cumsum([len(epoch["bounds"]) - 1 for epoch in epochs]))
        self._samples = samples
        self._length = samples if length is None else length

    @property
    def name(self) -> str:
        """The prefix of the tokens' dataset."""
        return self._source.name

    def __len__(self) -> int:
        """Return the number of samples, including padding samples."""
        return self._length

    def __getitem__(self, sample: int | None) -> dict[str, torch.Tensor]:
        """Return the sample at this position (None: a padding sample, masked out)."""
        if sample is None or self._samples <= sample < self._length:
            return self._source.sample(np.empty(0, dtype=np.uint32))
        return self._source.sample(self.examples(sample))

    def examples(self, sample: int) -> np.ndarray:
        """Return the numbers of the examples in a sample."""
        if not 0 <= sample < self._samples:
            raise IndexError(f"sample {sample} of {self._samples}")
        which = bisect_right(self._ends, sample)
        epoch = self._epochs[which]
        number = sample - (int(self._ends[which - 1]) if which else 0)
        return np.asarray(epoch["examples"][epoch["bounds"][number] : epoch["bounds"][number + 1]])


class PackedValidation(PackedDataset):
    """Every held-out example once, in a fixed order; padding samples make the length a multiple of
    `multiple_of`.
    """

    index_split = Split.valid
    domains = ("answers",)

    def __init__(self, source: PackedExamples, order: Arrays, multiple_of: int = 1) -> None:
        samples = len(order["bounds"]) - 1
        super().__init__(source, [order], samples, -(-samples // multiple_of) * multiple_of)

    def domain_of(self, sample: int) -> str:
        """Return the only domain; padding samples have it, too."""
        return self.domains[0]


def build_packed(prepared: Prepared, samples: int, cache: str | None = None) -> PackedDataset:
    """Return the training samples of a run of `samples` samples. Every rank must call it (one rank builds the
    indices).
    """
    epochs = -(-samples // int(prepared.record[TRAIN]["samples"]))
    orders = [(prepared.sft.seed, epoch) for epoch in range(epochs)]
    return PackedDataset(*_packed(prepared, TRAIN, orders, cache), samples)


def build_packed_validation(
    prepared: Prepared, multiple_of: int = 1, cache: str | None = None
) -> PackedValidation | None:
    """Return the validation samples; None if no example is held out. Every rank must call it."""
    if VALID not in prepared.record:
        return None
    examples, [order] = _packed(prepared, VALID, [None], cache)
    return PackedValidation(examples, order, multiple_of)


def _packed(
    prepared: Prepared, part: str, orders: Sequence[tuple[int, int] | None], cache: str | None
) -> tuple[PackedExamples, list[Arrays]]:
    """Return the examples of a part, and their samples for each of `orders` (see `packed_entry`)."""
    prefix, examples = prepared.examples(part)
    lengths = np.asarray(document_lengths(f"{prefix}_{TOKENS}")[examples]) - 1
    digest, capacity = prepared.digest(part), prepared.sft.batch.seq_length
    entries = [packed_entry(digest, examples, lengths, capacity, order) for order in orders]
    arrays = IndexCache(cache or prepared.folder / ".cache").prepare(entries)
    return PackedExamples(prefix, capacity), arrays

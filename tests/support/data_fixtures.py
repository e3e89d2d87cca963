"""Small real indexed datasets, and the parts of a GPTDatasetConfig, for tests of slices and datasets."""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lrpath.data.indexed import document_lengths, fingerprint_source
from megatron_lrpath.data.slice import Slice, SliceSource


class StubTokenizer:
    """Tokenizer with only what GPTDataset reads: ids, a vocabulary size and an identity."""

    def __init__(self, vocab_size: int = 60000, eod: int = 0, pad: int = -1) -> None:
        self.vocab_size, self.eod, self.pad, self.eos = vocab_size, eod, pad, eod
        self.unique_identifiers = OrderedDict({"class": "StubTokenizer", "vocab_size": vocab_size})


def make_indexed_dataset(prefix: Path, documents: Sequence[Sequence[int]], dtype: Any = np.uint16) -> Path:
    """Write `documents` (token ids) as PREFIX.bin and .idx with Megatron's builder; return `prefix`."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def make_random_dataset(prefix: Path, lengths: Sequence[int], seed: int = 0, first: int = 1) -> Path:
    """Write documents of these lengths, with token ids counted up from `first`; return `prefix`."""
    ids = np.arange(first, first + sum(lengths)) % 65000
    return make_indexed_dataset(prefix, [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])])


def make_lengths_dataset(prefix: Path, lengths: Sequence[int], mark: int = 0) -> Path:
    """Write an indexed dataset with documents of these lengths, without real tokens (a sparse .bin).

    Needs no Megatron, and no disk space for the tokens; `mark` distinguishes datasets of equal lengths.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    sizes = np.asarray(lengths, dtype="<i4")
    ends = np.cumsum(sizes, dtype="<i8") * 2
    with open(f"{prefix}.idx", "wb") as index:
        index.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(sizes), len(sizes) + 1))
        for array in (sizes, ends - 2 * sizes.astype("<i8"), np.arange(len(sizes) + 1, dtype="<i8")):
            array.tofile(index)
    with open(f"{prefix}.bin", "wb") as tokens:
        tokens.write(struct.pack("<Q", mark)[: int(ends[-1])])
        tokens.truncate(int(ends[-1]))
    return prefix


def make_slice(
    path: Path, sources: Sequence[tuple[Path, Sequence[int], str]], seed: int | None = 1, save: bool = True
) -> Slice:
    """Return a slice of (prefix, documents, domain) at `path`; with `save` it is saved and loaded again."""
    parts = []
    for prefix, documents, domain in sources:
        chosen = np.array(sorted(documents), dtype=np.int32)
        tokens = int(document_lengths(prefix)[chosen].sum())
        parts.append(SliceSource(prefix, fingerprint_source(prefix), domain, chosen, tokens))
    made = Slice(path.name.removesuffix(".slice"), seed, tuple(parts), path)
    if save:
        made.save(path)
        return Slice.load(path)
    return made


def dataset_config(seq_length: int, cache: Path | None = None, **options: Any) -> Any:
    """Return a GPTDatasetConfig as Megatron's arguments make it, without an attention mask."""
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    settings: dict[str, Any] = {
        "random_seed": 1,
        "sequence_length": seq_length,
        "path_to_cache": str(cache) if cache else None,
        "tokenizer": StubTokenizer(),
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "create_attention_mask": False,
    }
    return GPTDatasetConfig(**{**settings, **options})

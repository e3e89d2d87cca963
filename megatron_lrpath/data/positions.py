"""Compute from a slice alone, without torch or Megatron, which samples contain given documents."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from megatron_lrpath.data.slice import Slice
from megatron_lrpath.data.slice_codec import Documents
from megatron_lrpath.data.versioned_index import interleave, source_entry

type Numbers = npt.NDArray[np.int64]
type Wanted = Mapping[str, Documents]
"""Document numbers (sorted int32) by the fingerprint of their dataset."""

LABEL = 1  # tokens of a sample beyond its length: its last label


def holds(one: Slice, wanted: Wanted) -> dict[str, Documents]:
    """Return the wanted documents that are in a slice, by dataset; datasets without one are omitted."""
    found = {
        source.fingerprint: np.intersect1d(source.documents, wanted[source.fingerprint])
        for source in one.sources
        if source.fingerprint in wanted
    }
    return {name: documents for name, documents in found.items() if len(documents)}


def sample_numbers(one: Slice, wanted: Wanted, seq_length: int, seed: int) -> Numbers:
    """Return the numbers of a slice's samples, in training order, that have a token of the wanted documents.

    The last label of a sample counts. The numbers are ascending.

    Args:
        one: the slice of a version or of a mix.
        wanted: the documents.
        seq_length: the length of a sample in tokens.
        seed: the plan's seed; for the slices of a mix, the mix's seed.

    Raises:
        UserError: the dataset is missing or differs from the slice's.
    """
    here = holds(one, wanted)
    sources = [source for source in one.sources if source.tokens >= seq_length + LABEL]
    marks = {}
    for number, source in enumerate(sources):
        if source.fingerprint in here:
            arrays = source_entry(source, seq_length, LABEL, (seed, one.name)).build()
            documents, begins = arrays["documents"], arrays["samples"][:, 0]
            rows = np.zeros(len(begins) - 1, dtype=bool)
            for place in np.flatnonzero(np.isin(documents, here[source.fingerprint])):
                first = np.searchsorted(begins[1:], place, side="left")
                rows[first : np.searchsorted(begins[:-1], place, side="right")] = True
            marks[number] = rows[arrays["shuffle"]]
    if not marks:
        return np.empty(0, dtype=np.int64)
    if len(sources) == 1:
        return np.flatnonzero(marks[0])
    order = interleave([(s.tokens - 1) // seq_length for s in sources], "interleave", seed, one.name)
    found = np.zeros(len(order["source"]), dtype=bool)
    for number, mark in marks.items():
        of_source = np.flatnonzero(order["source"] == number)
        found[of_source[mark[order["sample"][of_source]]]] = True
    return np.flatnonzero(found)

"""Find the documents of a delivery whose text is in earlier slices, or repeated in the delivery itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lrpath.data.document_hashes import Hashes, HashFile
from megatron_lrpath.data.record import recorded_hashes
from megatron_lrpath.data.slice import Slice, SliceSource
from megatron_lrpath.errors import UserError
from megatron_lrpath.wording import listing, plural

type Flags = npt.NDArray[np.uint8]
type Mask = npt.NDArray[np.bool_]

IN_VERSION, IN_VALIDATION, LATER_COPY, FIRST_COPY = 1, 2, 4, 8
"""Bits of a document's flag: its text is in an earlier version; in a validation set; it is a copy of an
earlier document in the delivery; it is the first of several copies."""
REPEAT = IN_VERSION | IN_VALIDATION | LATER_COPY  # the documents that --drop-duplicates excludes
BLOCK = 1 << 24  # number of hashes of earlier documents that are compared at a time


@dataclass(frozen=True)
class NewDocuments:
    """The documents of one dataset that may be drawn: `free` is a mask over all of its documents."""

    prefix: Path
    fingerprint: str
    free: Mask


@dataclass(frozen=True)
class Duplicates:
    """The result of a comparison.

    `flags`: by the fingerprint of each new dataset, uint8 (documents,). `by_slice`: how many new documents
    repeat one of each earlier slice. `validation`: the names of those slices that are validation sets.
    `documents`: the number of compared documents. `later`: the number of copies of another new document.
    `repeats`: the number of documents that repeat any other. `missing`: the datasets without hashes.
    """

    flags: dict[str, Flags]
    by_slice: dict[str, int]
    validation: tuple[str, ...]
    documents: int
    later: int
    repeats: int
    missing: tuple[Path, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """Return JSON-serializable data."""
        return {
            "documents": self.documents,
            "repeats": self.repeats,
            "by_slice": self.by_slice,
            "copies_in_the_delivery": self.later,
            "not_compared": [str(prefix) for prefix in self.missing],
        }

    def lines(self, dropped: bool) -> list[str]:
        """Return the result as lines of text; `dropped`: whether the repeats were excluded."""
        lines = []
        if self.missing:
            lines.append(
                f"note: {listing([*map(str, self.missing)], 2)}: no hashes of the documents, so not compared; "
                "tools/check_dataset.py PREFIX --tokenizer-model MODEL --record writes them"
            )
        if not self.documents:
            return lines
        if not self.repeats:
            return [*lines, f"duplicates: none in {plural(self.documents, 'document')}"]
        found = [
            f"{count:,} in {'validation set ' if name in self.validation else ''}{name}"
            for name, count in self.by_slice.items()
            if count
        ]
        found += [f"{self.later:,} repeat another document of this delivery"] if self.later else []
        what = (
            "left out (--drop-duplicates)"
            if dropped
            else "kept out of new validation sets, otherwise drawn; --drop-duplicates leaves them out"
        )
        share = f"{100 * self.repeats / self.documents:.1f}%"
        return [
            *lines,
            f"duplicates: {self.repeats:,} of {plural(self.documents, 'document')} ({share}): {'; '.join(found)}; "
            f"{what}",
        ]


def find_duplicates(
    new: Sequence[NewDocuments],
    earlier: Sequence[Slice],
    validation: Sequence[str],
    records: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
    block: int = BLOCK,
) -> Duplicates:
    """Compare the hashes of new documents with each other and with those of all documents of earlier slices.

    Memory: about 32 bytes per new document, and a block of the earlier ones. Earlier datasets need only
    their records and hashes on disk.

    Args:
        new: the datasets to draw from.
        earlier: the existing slices.
        validation: the names of those slices that are validation sets.
        records: another folder for the records of datasets.
        note: called with a line of progress.
        block: the number of hashes compared at a time.

    Raises:
        UserError: a file of hashes is damaged, or two files exclude different end-of-document tokens.
    """
    files = _Files(records)
    known = [(one, found) for one in new if (found := files.of(one.prefix, one.fingerprint)) is not None]
    note("comparing the documents with each other")
    table = _Table.of([_chosen(found, one.free) for one, found in known])
    by_slice = {}
    for one in earlier if len(table.order) else ():
        note(f"comparing the documents with {one.name}")
        bit = IN_VALIDATION if one.name in validation else IN_VERSION
        hits = np.zeros(len(table.hashes), dtype=bool)
        for source in one.sources:
            if (found := files.of(source.prefix, source.fingerprint, one)) is not None:
                for hashes in _blocks_of(found, source, block):
                    table.mark(hashes, hits)
        by_slice[one.name] = table.flag(hits, bit)
    flags = table.flags_by_document()
    later = int(np.count_nonzero(flags & LATER_COPY))
    repeats = int(np.count_nonzero(flags & REPEAT))
    by_dataset = {one.fingerprint: np.zeros(len(one.free), dtype=np.uint8) for one in new}
    start = 0
    for dataset, _ in known:
        count = int(np.count_nonzero(dataset.free))
        by_dataset[dataset.fingerprint][dataset.free] = flags[start : start + count]
        start += count
    names = tuple(name for name in by_slice if name in validation)
    return Duplicates(by_dataset, by_slice, names, len(flags), later, repeats, tuple(files.missing))


def require_hashes(found: Duplicates) -> None:
    """Raise UserError with the names of the datasets if some duplicates cannot be known."""
    if found.missing:
        names = listing([*map(str, found.missing)], 3)
        raise UserError(
            f"--drop-duplicates: {names}: no hashes of the documents. Write them first: tools/check_dataset.py "
            f"{found.missing[0]} --tokenizer-model MODEL --record (with --record-in FOLDER of the slices, where the "
            "data are read-only)"
        )


class _Files:
    """The hash files in use, each verified once. `missing`: the prefixes of datasets without one."""

    def __init__(self, records: Path | None) -> None:
        self.records = records
        self.missing: dict[Path, None] = {}
        self._found: dict[str, HashFile | None] = {}
        self._first: HashFile | None = None

    def of(self, prefix: Path, fingerprint: str, one: Slice | None = None) -> HashFile | None:
        """Return the hashes of a dataset, new or of the slice `one`; None if it has none."""
        if fingerprint not in self._found:
            folder = one.path.resolve().parent if one is not None and one.path else self.records
            found = recorded_hashes(prefix, fingerprint, folder)
            if found is None:
                self.missing[prefix] = None
            else:
                found.verify()
                self._first = self._first or found
                if found.eod != self._first.eod:
                    raise UserError(
                        f"{self._first.path} leaves out the end-of-document token {self._first.eod}, {found.path} "
                        f"{found.eod}: their hashes cannot be compared. Remove the wrong one, and write it "
                        "again: tools/check_dataset.py PREFIX --tokenizer-model MODEL --record"
                    )
            self._found[fingerprint] = found
        return self._found[fingerprint]


def _chosen(found: HashFile, free: Mask) -> Hashes:
    """Return the hashes of a mask's documents. Raise UserError if the file belongs to another dataset."""
    if found.documents != len(free):
        raise UserError(
            f"{found.path}: has {found.documents:,} hashes, and the dataset {len(free):,} documents; remove it, and "
            "write it again with tools/check_dataset.py … --record"
        )
    chosen = np.empty(int(np.count_nonzero(free)), dtype=np.uint64)
    place = 0
    for start, block in found.blocks():
        part = block[free[start : start + len(block)]]
        chosen[place : place + len(part)] = part
        place += len(part)
    return chosen


def _blocks_of(found: HashFile, source: SliceSource, block: int) -> Iterator[Hashes]:
    """Yield the hashes of a slice's documents, block by block of the dataset."""
    place = 0
    for start, hashes in found.blocks(block):
        end = int(np.searchsorted(source.documents, start + len(hashes)))
        if end > place:
            yield hashes[source.documents[place:end] - start]
        place = end
    if place < len(source.documents):
        raise UserError(f"{found.path}: has fewer hashes than the slices of {source.prefix} have documents")


@dataclass
class _Table:
    """The hashes of all new documents.

    `hashes`: sorted, without duplicates, uint64 (different,). `order`: the documents in the order of their
    hashes, int64 (documents,). `begins`: whether a document of `order` is the first with its hash. `flags`:
    in the order of `order`.
    """

    hashes: Hashes
    order: npt.NDArray[np.int64]
    begins: Mask
    flags: Flags

    @classmethod
    def of(cls, parts: Sequence[Hashes]) -> _Table:
        """Return the table of all datasets' hashes; documents with equal hashes stay in their order."""
        hashes = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint64)
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        begins = np.ones(len(hashes), dtype=bool)
        np.not_equal(hashes[1:], hashes[:-1], out=begins[1:])
        flags = np.where(begins, np.uint8(0), np.uint8(LATER_COPY))
        flags[:-1][begins[:-1] & ~begins[1:]] |= np.uint8(FIRST_COPY)
        return cls(hashes[begins], order, begins, flags)

    def mark(self, hashes: Hashes, hits: Mask) -> None:
        """Set `hits`, one for each different hash, for those in `hashes`, which are sorted in place."""
        hashes.sort()
        places = np.searchsorted(self.hashes, hashes)
        places[places == len(self.hashes)] -= 1
        hits[places[self.hashes[places] == hashes]] = True

    def flag(self, hits: Mask, bit: int) -> int:
        """Set a bit of all documents whose hash was hit; return their number."""
        count, before = 0, 0
        for start in range(0, len(self.order), BLOCK):
            part = slice(start, start + BLOCK)
            numbers = np.cumsum(self.begins[part]) + (before - 1)
            found = hits[numbers]
            self.flags[part][found] |= np.uint8(bit)
            count += int(np.count_nonzero(found))
            before = int(numbers[-1]) + 1
        return count

    def flags_by_document(self) -> Flags:
        """Return the flags in the order of the documents."""
        flags = np.empty_like(self.flags)
        flags[self.order] = self.flags
        return flags

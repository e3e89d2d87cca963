"""Draw version slices from indexed datasets: by tokens, without replacement, in given proportions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from megatron_lrpath.data.draw_random import permutation
from megatron_lrpath.data.draw_request import DrawRequest, SourceRequest, default_domain
from megatron_lrpath.data.duplicates import (
    REPEAT,
    Duplicates,
    Flags,
    NewDocuments,
    find_duplicates,
    require_hashes,
)
from megatron_lrpath.data.indexed import blocks, document_lengths, fingerprint_source
from megatron_lrpath.data.record import one_tokenizer, read_record
from megatron_lrpath.data.slice import ENDING, Slice, SliceSource, is_validation, slice_path
from megatron_lrpath.data.slice_codec import Documents
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_write_bytes, atomic_write_text, sweep_abandoned, sync_folder
from megatron_lrpath.wording import listing

ANY = 255  # all bits of a document's flags
UNFINISHED = ".unfinished"  # lists the slices of a draw until all of them are written


class SourcePool:
    """One dataset: its free documents and their tokens. Uses one byte of memory per document.

    Documents without tokens belong to no slice. `weight` None: in proportion to the free tokens. `records`
    is a further folder for the record of the tokenizer.

    Raises:
        UserError: it is not a dataset of documents, or an existing slice was drawn from another state of it.
    """

    def __init__(
        self,
        prefix: Path,
        domain: str,
        weight: Fraction | None,
        existing: Sequence[Slice],
        records: Path | None = None,
    ) -> None:
        self.prefix, self.domain, self.weight = prefix, domain, weight
        self.lengths = document_lengths(prefix)
        self.fingerprint = fingerprint_source(prefix)
        self.tokenizer = read_record(prefix, self.fingerprint, records)
        self.flags: Flags | None = None  # of duplicates, if known
        self.free = np.empty(len(self.lengths), dtype=bool)
        self.free_tokens = 0
        for start, block in blocks(self.lengths):
            self.free[start : start + len(block)] = block > 0
            self.free_tokens += int(block.sum(dtype=np.int64))
        for one in existing:
            for source in one.sources:
                if source.fingerprint == self.fingerprint:
                    self.take(source.documents)
                elif source.prefix.resolve() == self.prefix.resolve():
                    raise UserError(
                        f"{self.prefix}: has changed since {one.path or one.name} was drawn from it, so that "
                        f"new documents cannot be identified; restore the old dataset, and give new data "
                        f"a name of its own"
                    )

    def take(self, documents: Documents) -> None:
        """Mark free documents as taken."""
        self.free[documents] = False
        self.free_tokens -= int(self.lengths[documents].sum(dtype=np.int64))

    def drop(self, flags: int) -> None:
        """Take the documents with one of these flags, so that they cannot be drawn."""
        if self.flags is not None:
            self.take(np.flatnonzero(self.free & (self.flags & flags != 0)).astype(np.int32))

    def take_range(self, first: int, end: int | None, version: str, dropped: bool) -> Documents:
        """Take the documents `first` … `end` - 1, except those without tokens and, if `dropped`, duplicates.

        A validation set never has duplicates.

        Raises:
            UserError: the dataset has fewer documents, or some are already in a slice.
        """
        end = len(self.free) if end is None else end
        where = f"--documents {version}={self.prefix}:{first}-{end}"
        if end > len(self.free) or first >= end:
            raise UserError(f"{where}: the dataset has {len(self.free):,} documents")
        chosen = first + np.flatnonzero(self.lengths[first:end] > 0).astype(np.int32)
        if self.flags is not None and (dropped or is_validation(version)):
            chosen = chosen[self.flags[chosen] & (REPEAT if dropped else ANY) == 0]
        used = chosen[~self.free[chosen]]
        if len(used):
            raise UserError(
                f"{where}: {len(used):,} of these documents are in a slice already "
                f"(the first is number {used[0]})"
            )
        self.take(chosen)
        return chosen

    def draw(self, targets: Sequence[int | None], seed: int, held_out: bool = False) -> list[Documents]:
        """Draw disjoint sets of free documents, each with at least the given number of tokens.

        All sets follow one random order of the dataset, determined by the seed and the dataset's content:
        later draws do not change earlier ones, and another call continues in that order. If the free
        documents barely suffice, a set can end one document early, so that the rest is enough for those
        after it; None as the last means the rest. Sorted int32 arrays. With `held_out` the first set is for
        validation: duplicates come after it.
        """
        order: np.ndarray = permutation(len(self.free), "draw", seed, self.fingerprint)
        order = order[self.free[order]]
        if held_out and targets[0]:
            order = self._unique_first(order, targets[0])
        ends = np.cumsum(self.lengths[order], dtype=np.int64)
        sets = []
        done = 0
        for place, target in enumerate(targets):
            end = len(order) if target is None else done
            if target:
                before = int(ends[done - 1]) if done else 0
                later = sum(target or 0 for target in targets[place + 1 :])
                end = int(np.searchsorted(ends, before + target)) + 1
                if end > len(ends) or int(ends[-1] - ends[end - 1]) < later:
                    end -= 1
            sets.append(np.sort(order[done:end]).astype(np.int32))
            done = end
        return sets

    def _unique_first(self, order: np.ndarray, tokens: int) -> np.ndarray:
        """Return the order, starting with documents of at least `tokens` tokens that do not repeat others.

        Raises:
            UserError: there are too few such documents.
        """
        if self.flags is None or not (repeated := self.flags[order] != 0).any():
            return order
        unique = order[~repeated]
        ends = np.cumsum(self.lengths[unique], dtype=np.int64)
        if not len(ends) or ends[-1] < tokens:
            raise UserError(
                f"{self.prefix}: {tokens:,} tokens were asked for validation, and the documents that repeat no other "
                f"have {int(ends[-1]) if len(ends) else 0:,}; ask for fewer tokens of validation, or look at the "
                "delivery: most of it was delivered before"
            )
        first = unique[: int(np.searchsorted(ends, tokens)) + 1]
        chosen = np.zeros(len(self.free), dtype=bool)
        chosen[first] = True
        return np.concatenate([first, order[~chosen[order]]])

    def source(self, documents: Documents) -> SliceSource:
        """Return these documents as a source of a slice."""
        tokens = int(self.lengths[documents].sum(dtype=np.int64))
        return SliceSource(self.prefix, self.fingerprint, self.domain, documents, tokens, self.tokenizer)


@dataclass(frozen=True)
class Shortage:
    """The required and the available tokens of a source."""

    prefix: Path
    domain: str
    free_documents: int
    free_tokens: int
    asked: int

    @property
    def missing(self) -> int:
        """The missing tokens."""
        return max(self.asked - self.free_tokens, 0)


class ShortageError(UserError):
    """The request exceeds the available tokens; `table` has a row for every source."""

    def __init__(self, wanted: int, table: list[Shortage]) -> None:
        self.table = table
        lacking = sorted((row for row in table if row.missing), key=lambda row: -row.missing)
        names = listing([f"{row.prefix} ({row.missing:,} tokens)" for row in lacking], 3)
        super().__init__(
            f"asked for {wanted:,} tokens, and "
            f"{sum(row.free_tokens for row in table):,} are not yet in a slice; too little in {names}: "
            f"ask for fewer tokens or versions, give those sources a smaller weight, or add data"
        )


@dataclass(frozen=True)
class Drawn:
    """The new slices (not yet written), by domain the sources' tokens that are in no slice, and duplicates.

    With `drop_duplicates` the tokens of dropped documents do not count as remaining.
    """

    slices: list[Slice]
    left: dict[str, int]
    duplicates: Duplicates


def draw(
    request: DrawRequest,
    existing: Sequence[Slice],
    note: Callable[[str], None] = lambda text: None,
    records: Path | None = None,
    held_out: Sequence[Slice] = (),
    known: Duplicates | None = None,
) -> Drawn:
    """Draw the requested slices from documents that are in no existing slice.

    Validation is drawn first, then the versions in their order. Each takes, from each source, the shortest
    range of that source's random order with its share of tokens. So the mixture is exact to within one
    document per source, and a version has the requested tokens or up to a document per source more (or less,
    if a source is nearly used up). Memory: five bytes per document, and 24 more per
    document of the largest source. `note` receives messages on the progress. `records` is a further folder for the
    records of the datasets' tokenizers, which the slices contain. `held_out` are validation sets in other folders.
    `known` are the duplicates, if the same documents were compared before.

    Documents that repeat one of an existing slice, of `held_out` or of the sources are never drawn for validation, as
    far as the datasets have hashes; with `request.drop_duplicates` they are not drawn at all.

    Raises:
        UserError: a name exists, a source is given twice, has changed, is not a dataset of documents, or was
            made by a different tokenizer than the others.
        ShortageError: there are too few tokens.
        UserError: `drop_duplicates` is set, and a dataset has no hashes of its documents.
    """
    request.check()
    there = {one.name.casefold(): one for one in existing}
    for one in (there[name.casefold()] for name in request.names if name.casefold() in there):
        raise UserError(
            f"{one.path or one.name}: exists already, and slices are never changed; --append continues "
            f"behind the last version, --names gives other names (if an interrupted draw left it, remove it "
            f"and draw again: the same seed draws the same)"
        )
    pools = _open_pools(request, existing, note, records)
    one_tokenizer(
        [
            *(
                (f"{source.prefix} (in {one.path or one.name})", source.tokenizer)
                for one in existing
                for source in one.sources
            ),
            *((str(pool.prefix), pool.tokenizer) for pool in pools),
        ],
        "A model reads one tokenizer's data: tokenize the text again with the first one.",
    )
    found = known or _duplicates(pools, existing, held_out, records, note)
    for pool in pools:
        pool.flags = found.flags[pool.fingerprint]
    if request.drop_duplicates:
        require_hashes(found)
    chosen = _take_ranges(request, pools)
    if request.drop_duplicates:
        for pool in pools:
            pool.drop(REPEAT)
            pool.flags = None  # the first of several copies is the only one now
    mixture = pools[: len(request.sources)]
    names = [name for name in request.names if name not in chosen]
    if names:
        chosen = {name: {} for name in names} | chosen
        targets = _targets(request, mixture)
        for pool, asked in zip(mixture, targets, strict=True):
            note(f"drawing from {pool.prefix}")
            for name, drawn in zip(
                names, pool.draw(asked, request.seed, request.valid_tokens is not None), strict=True
            ):
                pool.take(drawn)
                chosen[name][pool.prefix] = drawn
    slices = []
    for name in request.names:
        documents = chosen[name]
        sources = tuple(
            pool.source(documents[pool.prefix]) for pool in pools if len(documents.get(pool.prefix, ()))
        )
        if not sources:
            what = "validation" if name == request.valid_name else f"version {name}"
            if any(pool.free.any() for pool in mixture):
                raise UserError(f"{what}: too few tokens were asked for to draw a document; ask for more")
            raise UserError(
                f"nothing is left for {what}: every document of the sources is in a slice already"
            )
        slices.append(Slice(name, request.seed if name in names else None, sources))
    left: dict[str, int] = {}
    for pool in pools:
        left[pool.domain] = left.get(pool.domain, 0) + pool.free_tokens
    return Drawn(slices, left, found)


def _duplicates(
    pools: Sequence[SourcePool],
    existing: Sequence[Slice],
    held_out: Sequence[Slice],
    records: Path | None,
    note: Callable[[str], None],
) -> Duplicates:
    """Compare the free documents of the pools with all slices."""
    here = {one.fingerprint for one in existing}
    elsewhere = [one for one in held_out if one.fingerprint not in here]
    validation = [*(one.name for one in existing if is_validation(one.name)), *(one.name for one in held_out)]
    new = [NewDocuments(pool.prefix, pool.fingerprint, pool.free) for pool in pools]
    return find_duplicates(new, [*existing, *elsewhere], validation, records, note)


def existing_slices(folder: Path | str) -> list[Slice]:
    """Return all slices of a folder by name (none if it does not exist).

    Raises:
        UserError: one of them is damaged.
    """
    return [Slice.load(path) for path in sorted(Path(folder).glob(f"*{ENDING}"))]


def write_slices(slices: Sequence[Slice], folder: Path | str) -> list[Path]:
    """Write new slices into `folder` (each file atomically) and return their paths.

    Raises:
        UserError: one of the files exists; then nothing is written.
    """
    paths = [slice_path(folder, one.name) for one in slices]
    for path in paths:
        if path.exists():
            raise UserError(
                f"{path}: exists already, and slices are never changed; use another name or folder"
            )
    contents = [one.to_bytes(path.parent) for one, path in zip(slices, paths, strict=True)]
    marker = Path(folder) / UNFINISHED
    atomic_write_text(marker, "".join(f"{path.name}\n" for path in paths))
    for path, content in zip(paths, contents, strict=True):
        atomic_write_bytes(path, content)
    marker.unlink()
    sync_folder(Path(folder))
    return paths


def remove_unfinished(folder: Path) -> None:
    """Remove the slices of an interrupted draw; only for the holder of the folder's lock."""
    marker = folder / UNFINISHED
    if not marker.exists():
        return
    for name in marker.read_text(encoding="utf-8").splitlines():
        path = folder / Path(name).name
        sweep_abandoned(path)
        path.unlink(missing_ok=True)
    marker.unlink()


def _open_pools(
    request: DrawRequest, existing: Sequence[Slice], note: Callable[[str], None], records: Path | None
) -> list[SourcePool]:
    """Return the pools of the mixture's sources, then of datasets that only ranges name."""
    requests = list(request.sources)
    known = {source.prefix.resolve() for source in requests}
    for part in request.ranges:
        if part.prefix.resolve() not in known:
            known.add(part.prefix.resolve())
            requests.append(SourceRequest(part.prefix, Fraction(0), default_domain(part.prefix)))
    pools: list[SourcePool] = []
    for source in requests:
        note(f"reading {source.prefix}")
        pool = SourcePool(source.prefix, source.domain, source.weight, existing, records)
        for other in pools:
            if other.fingerprint == pool.fingerprint:
                raise UserError(
                    f"--source: {other.prefix} and {pool.prefix} are one and the same dataset; name it once"
                )
        pools.append(pool)
    return pools


def _take_ranges(request: DrawRequest, pools: Sequence[SourcePool]) -> dict[str, dict[Path, Documents]]:
    """Return the documents of explicit ranges, by version and prefix; they are removed from the pools."""
    by_path = {pool.prefix.resolve(): pool for pool in pools}
    chosen: dict[str, dict[Path, Documents]] = {}
    for part in request.ranges:
        pool = by_path[part.prefix.resolve()]
        documents = pool.take_range(part.first, part.end, part.version, request.drop_duplicates)
        held = chosen.setdefault(part.version, {})
        held[pool.prefix] = np.sort(np.concatenate([held.get(pool.prefix, documents[:0]), documents]))
    return chosen


def _targets(request: DrawRequest, pools: Sequence[SourcePool]) -> list[list[int | None]]:
    """Return for each source the tokens for validation and for every version; None: all the rest."""
    weights = [Fraction(pool.free_tokens) if pool.weight is None else pool.weight for pool in pools]
    whole = sum(weights)
    if not whole:
        raise UserError(
            "--source: nothing to draw: all weights are 0, or every document is in a slice already"
        )
    targets = [
        _targets_of(request, pool, weight / whole) for pool, weight in zip(pools, weights, strict=True)
    ]
    asked = [sum(target or 0 for target in row) for row in targets]
    table = [
        Shortage(pool.prefix, pool.domain, int(np.count_nonzero(pool.free)), pool.free_tokens, tokens)
        for pool, tokens in zip(pools, asked, strict=True)
    ]
    if any(row.missing for row in table):
        wanted = (request.valid_tokens or 0) + sum(tokens or 0 for _, tokens in request.versions)
        raise ShortageError(wanted, table)
    return targets


def _targets_of(request: DrawRequest, pool: SourcePool, share: Fraction) -> list[int | None]:
    """Return one source's row of `_targets`; rounded up, or down if the source would not suffice otherwise."""
    valid = [] if request.valid_tokens is None else [Fraction(request.valid_tokens) * share]
    if any(tokens is None for _, tokens in request.versions):
        count = len(request.versions)
        rest = max(pool.free_tokens - math.ceil(sum(valid)), 0)
        return [*map(math.ceil, valid), *[rest // count] * (count - 1), None]
    exact = [Fraction(tokens or 0) * share for _, tokens in request.versions]
    if request.seq_length:
        # the fewest tokens that yield ceil(tokens / seq_length) samples; the last label needs one more
        length = request.seq_length
        exact = [tokens and Fraction(math.ceil(tokens / length) * length + 1) for tokens in exact]
    wanted = [*valid, *exact]
    up = sum(map(math.ceil, wanted)) <= pool.free_tokens or sum(wanted) > pool.free_tokens
    return [math.ceil(tokens) if up else math.floor(tokens) for tokens in wanted]

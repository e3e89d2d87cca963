"""Draws version slices out of indexed datasets: by tokens, without replacement, in given proportions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from megatron_lrpath.data.draw_pool import SourcePool
from megatron_lrpath.data.draw_request import VALIDATION, DrawRequest, SourceRequest, default_domain
from megatron_lrpath.data.slice import ENDING, Slice, slice_path
from megatron_lrpath.data.slice_codec import Documents
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_write_bytes


@dataclass(frozen=True)
class Shortage:
    """What a source would have to give and what it has, in tokens."""

    prefix: Path
    domain: str
    free_documents: int
    free_tokens: int
    asked: int

    @property
    def missing(self) -> int:
        """Tokens that it lacks."""
        return max(self.asked - self.free_tokens, 0)


class ShortageError(UserError):
    """More tokens are asked for than there are; `table` has a row for every source."""

    def __init__(self, wanted: int, table: list[Shortage]) -> None:
        self.table = table
        lacking = sorted((row for row in table if row.missing), key=lambda row: -row.missing)
        names = ", ".join(f"{row.prefix} ({row.missing:,} tokens)" for row in lacking[:3])
        names += f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        super().__init__(
            f"asked for {wanted:,} tokens, and "
            f"{sum(row.free_tokens for row in table):,} are not yet in a slice; too little in {names}: "
            f"ask for fewer tokens or versions, give those sources a smaller weight, or add data"
        )


@dataclass(frozen=True)
class Drawn:
    """The new slices (not yet written), and by domain the tokens of the sources that are in no slice yet."""

    slices: list[Slice]
    left: dict[str, int]


def draw(
    request: DrawRequest, existing: Sequence[Slice], note: Callable[[str], None] = lambda text: None
) -> Drawn:
    """Draw what is requested, from documents that no existing slice holds.

    Validation is drawn first, then the versions in their order. Each gets, of each source, the shortest run
    of that source's random order that holds its share of tokens: so the mixture is right to within one
    document per source, and a version's tokens are what was asked for or up to a document per source more
    (or, where a source is about to be used up, less). Memory: five bytes per document, and 24 more per
    document of the largest source. `note` hears what is being done.

    Raises:
        UserError: a name is taken, a source is given twice, has changed or is no dataset of documents.
        ShortageError: there are too few tokens.
    """
    request.check()
    _check_names(request, existing)
    pools = _open_pools(request, existing, note)
    chosen = _take_ranges(request, pools)
    mixture = pools[: len(request.sources)]
    names = [name for name in request.names if name not in chosen]
    if names:
        chosen = {name: {} for name in names} | chosen
        targets = _targets(request, mixture)
        _check_enough(request, mixture, targets)
        for pool, asked in zip(mixture, targets, strict=True):
            note(f"drawing from {pool.prefix}")
            for name, documents in zip(names, pool.draw(asked, request.seed), strict=True):
                pool.take(documents)
                chosen[name][pool.prefix] = documents
    drawn = set(names)
    slices = [
        _as_slice(name, request.seed if name in drawn else None, pools, chosen[name])
        for name in request.names
    ]
    left: dict[str, int] = {}
    for pool in pools:
        left[pool.domain] = left.get(pool.domain, 0) + pool.free_tokens
    return Drawn(slices, left)


def existing_slices(folder: Path | str) -> list[Slice]:
    """All slices of a folder (none if it is not there yet), by name.

    Raises:
        UserError: one of them is damaged.
    """
    return [Slice.load(path) for path in sorted(Path(folder).glob(f"*{ENDING}"))]


def write_slices(slices: Sequence[Slice], folder: Path | str) -> list[Path]:
    """Write new slices into `folder` (each file atomically) and return their paths.

    Raises:
        UserError: one of the files is there already; then nothing is written.
    """
    paths = [slice_path(folder, one.name) for one in slices]
    for path in paths:
        if path.exists():
            raise UserError(
                f"{path}: is there already, and slices are never changed; use another name or folder"
            )
    contents = [one.to_bytes(path.parent) for one, path in zip(slices, paths, strict=True)]
    for path, content in zip(paths, contents, strict=True):  # nothing slow between the first and the last
        atomic_write_bytes(path, content)
    return paths


def _check_names(request: DrawRequest, existing: Sequence[Slice]) -> None:
    """Refuse names of slices that exist."""
    taken = {one.name: one for one in existing}
    for name in request.names:
        if name in taken:
            raise UserError(
                f"{taken[name].path or name}: is there already, and slices are never changed; --append "
                f"goes on behind the last version, --names gives other names (if an interrupted draw left "
                f"it, remove it and draw again: the same seed draws the same)"
            )


def _open_pools(
    request: DrawRequest, existing: Sequence[Slice], note: Callable[[str], None]
) -> list[SourcePool]:
    """The pools of the mixture's sources, then of datasets that only ranges name."""
    requests = list(request.sources)
    known = {source.prefix.resolve() for source in requests}
    for part in request.ranges:
        if part.prefix.resolve() not in known:
            known.add(part.prefix.resolve())
            requests.append(SourceRequest(part.prefix, Fraction(0), default_domain(part.prefix)))
    pools: list[SourcePool] = []
    for source in requests:
        note(f"reading {source.prefix}")
        pool = SourcePool(source.prefix, source.domain, source.weight, existing)
        for other in pools:
            if other.fingerprint == pool.fingerprint:
                raise UserError(
                    f"--source: {other.prefix} and {pool.prefix} are one and the same dataset; name it once"
                )
        pools.append(pool)
    return pools


def _take_ranges(request: DrawRequest, pools: Sequence[SourcePool]) -> dict[str, dict[Path, Documents]]:
    """The documents of explicit ranges, by version and prefix, taken out of the pools."""
    by_path = {pool.prefix.resolve(): pool for pool in pools}
    chosen: dict[str, dict[Path, Documents]] = {}
    for part in request.ranges:
        pool = by_path[part.prefix.resolve()]
        documents = pool.take_range(part.first, part.end, part.version)
        held = chosen.setdefault(part.version, {})
        held[pool.prefix] = _merged(held.get(pool.prefix), documents)
    return chosen


def _merged(one: Documents | None, other: Documents) -> Documents:
    """Two disjoint sets of documents as one, sorted."""
    return other if one is None else np.sort(np.concatenate([one, other]))


def _targets(request: DrawRequest, pools: Sequence[SourcePool]) -> list[list[int | None]]:
    """For each source the tokens that validation and every version are to get of it; None: all the rest."""
    weights = [Fraction(pool.free_tokens) if pool.weight is None else pool.weight for pool in pools]
    whole = sum(weights)
    if not whole:
        raise UserError(
            "--source: nothing to draw: all weights are 0, or every document is in a slice already"
        )
    return [_targets_of(request, pool, weight / whole) for pool, weight in zip(pools, weights, strict=True)]


def _targets_of(request: DrawRequest, pool: SourcePool, share: Fraction) -> list[int | None]:
    """One source's row of `_targets`; rounded up, or down where the source would not suffice otherwise."""
    valid = [] if request.valid_tokens is None else [Fraction(request.valid_tokens) * share]
    if any(tokens is None for _, tokens in request.versions):
        count = len(request.versions)
        rest = max(pool.free_tokens - math.ceil(sum(valid)), 0)
        return [*map(math.ceil, valid), *[rest // count] * (count - 1), None]
    exact = [Fraction(tokens or 0) * share for _, tokens in request.versions]
    if request.seq_length:
        exact = [_whole_samples(tokens, request.seq_length) for tokens in exact]
    wanted = [*valid, *exact]
    up = sum(map(math.ceil, wanted)) <= pool.free_tokens or sum(wanted) > pool.free_tokens
    return [math.ceil(tokens) if up else math.floor(tokens) for tokens in wanted]


def _whole_samples(tokens: Fraction, seq_length: int) -> Fraction:
    """The least tokens that yield ceil(tokens / seq_length) samples: the last label takes one more."""
    return Fraction(math.ceil(tokens / seq_length) * seq_length + 1) if tokens else tokens


def _check_enough(request: DrawRequest, pools: Sequence[SourcePool], targets: list[list[int | None]]) -> None:
    """Refuse what cannot be drawn."""
    asked = [sum(target or 0 for target in row) for row in targets]
    if all(tokens <= pool.free_tokens for tokens, pool in zip(asked, pools, strict=True)):
        return
    raise ShortageError(
        (request.valid_tokens or 0) + sum(tokens or 0 for _, tokens in request.versions),
        [
            Shortage(pool.prefix, pool.domain, pool.free_documents, pool.free_tokens, tokens)
            for pool, tokens in zip(pools, asked, strict=True)
        ],
    )


def _as_slice(
    name: str, seed: int | None, pools: Sequence[SourcePool], chosen: dict[Path, Documents]
) -> Slice:
    """The slice of the documents chosen for `name`; sources that gave none are left out.

    Raises:
        UserError: nothing was left for it.
    """
    sources = [pool.source(chosen[pool.prefix]) for pool in pools if len(chosen.get(pool.prefix, ()))]
    if not sources:
        what = "validation" if name == VALIDATION else f"version {name}"
        raise UserError(f"nothing is left for {what}: every document of the sources is in a slice already")
    return Slice(name, seed, tuple(sources))

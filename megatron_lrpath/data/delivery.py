"""A delivery of new data as slices: the version, and a share of it as a separate validation set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from pathlib import Path

from megatron_lrpath.data.draw import draw
from megatron_lrpath.data.draw_request import DrawRequest, SourceRequest
from megatron_lrpath.data.duplicates import Duplicates
from megatron_lrpath.data.indexed import fingerprint_source
from megatron_lrpath.data.slice import Slice, slice_path, valid_name
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_write_bytes

LARGEST_SHARE = 5_000_000
"""Default maximum of tokens in a validation set; every version's model is evaluated on it."""


@dataclass(frozen=True)
class Delivery:
    """The data to draw from: `tokens` in total (None: all that are in no slice); the fraction `share` of them is
    for validation.

    `share` None: 1%, at most `LARGEST_SHARE` tokens; 0: no validation.
    """

    sources: tuple[SourceRequest, ...]
    tokens: int | None
    share: Fraction | None
    seed: int
    folder: Path
    drop_duplicates: bool = False

    def slices(self, name: str, existing: Sequence[Slice], held_out: Sequence[Slice] = ()) -> Delivered:
        """Return the version `name` and its validation set `valid-NAME`; existing slices with these names are
        ignored.

        `held_out` are validation sets in other folders than `existing`.

        Raises:
            UserError: as `draw`.
        """
        valid = valid_name(name)
        others = [one for one in existing if one.name not in (name, valid)]
        held_out = [one for one in held_out if one.name not in (name, valid)]
        request = DrawRequest(
            self.sources, ((name, self.tokens),), None, (), self.seed, drop_duplicates=self.drop_duplicates
        )
        tokens, known = self.tokens, None
        if tokens is None:
            first = draw(request, others, records=self.folder, held_out=held_out)
            tokens, known = first.slices[0].tokens, first.duplicates
        held = ceil(tokens * (Fraction(1, 100) if self.share is None else self.share))
        held = min(held, LARGEST_SHARE) if self.share is None else held
        if held:
            rest = None if self.tokens is None else tokens - held
            request = replace(request, valid_tokens=held, valid_name=valid, versions=((name, rest),))
        drawn = draw(request, others, records=self.folder, held_out=held_out, known=known)
        slices = {one.name: one for one in drawn.slices}
        return Delivered(slices[name], slices.get(valid), drawn.duplicates)

    def is_of(self, one: Slice) -> bool:
        """Return whether a slice is drawn from these datasets. Raise UserError if a dataset is missing."""
        prints = {fingerprint_source(source.prefix) for source in self.sources}
        return all(source.fingerprint in prints for source in one.sources)


@dataclass(frozen=True)
class Delivered:
    """The drawn slices: the version, its validation set (None: none), and the duplicates in the delivery."""

    version: Slice
    valid: Slice | None
    duplicates: Duplicates

    @property
    def slices(self) -> tuple[Slice, ...]:
        """The version, then its validation set."""
        return (self.version,) if self.valid is None else (self.version, self.valid)


def is_drawn(slices: Sequence[Slice], existing: Sequence[Slice]) -> bool:
    """Return whether all of these slices exist with the same content."""
    there = {one.name: one.fingerprint for one in existing}
    return all(there.get(one.name) == one.fingerprint for one in slices)


def keep(slices: Sequence[Slice], existing: Sequence[Slice], folder: Path) -> None:
    """Write the missing slices, each atomically, in order.

    Raises:
        UserError: one exists with different content; then nothing is written.
    """
    there = {one.name: one for one in existing}
    for one in slices:
        if one.name in there and there[one.name].fingerprint != one.fingerprint:
            raise UserError(
                f"{slice_path(folder, one.name)}: exists already, drawn from other data; give the version another "
                "--name, or remove the file if no plan uses it"
            )
    for one in slices:
        if one.name not in there:
            path = slice_path(folder, one.name)
            atomic_write_bytes(path, one.to_bytes(path.parent))

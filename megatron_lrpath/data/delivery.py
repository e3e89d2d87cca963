"""A delivery of new data as slices: the version, and a share of it as a separate validation set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from pathlib import Path

from megatron_lrpath.data.draw import draw
from megatron_lrpath.data.draw_request import DrawRequest, SourceRequest
from megatron_lrpath.data.slice import Slice, slice_path
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_write_bytes

LARGEST_SHARE = 5_000_000
"""Tokens of a validation set, unless the user says: a model is evaluated on them for every version."""


@dataclass(frozen=True)
class Delivery:
    """The data to draw from: `tokens` in total (None: all that are in no slice), of which `share` is for
    validation.

    `share` None: 1%, at most `LARGEST_SHARE` tokens; 0: no validation.
    """

    sources: tuple[SourceRequest, ...]
    tokens: int | None
    share: Fraction | None
    seed: int
    folder: Path

    def slices(self, name: str, existing: Sequence[Slice]) -> tuple[Slice, Slice | None]:
        """Return the version `name` and its validation set `valid-NAME`; existing slices with these names are
        ignored.

        Raises:
            UserError: as `draw`.
        """
        valid = valid_name(name)
        others = [one for one in existing if one.name not in (name, valid)]
        request = DrawRequest(self.sources, ((name, self.tokens),), None, (), self.seed)
        tokens = self.tokens
        if tokens is None:
            tokens = draw(request, others, records=self.folder).slices[0].tokens
        held = ceil(tokens * (Fraction(1, 100) if self.share is None else self.share))
        held = min(held, LARGEST_SHARE) if self.share is None else held
        if held:
            rest = None if self.tokens is None else tokens - held
            request = replace(request, valid_tokens=held, valid_name=valid, versions=((name, rest),))
        drawn = {one.name: one for one in draw(request, others, records=self.folder).slices}
        return drawn[name], drawn.get(valid)


def valid_name(version: str) -> str:
    """Return the name of a version's own validation set."""
    return f"valid-{version}"


def is_drawn(slices: Sequence[Slice], existing: Sequence[Slice]) -> bool:
    """Return whether all of these slices exist with the same content."""
    there = {one.name: one.fingerprint for one in existing}
    return all(there.get(one.name) == one.fingerprint for one in slices)


def keep(slices: Sequence[Slice], existing: Sequence[Slice], folder: Path) -> None:
    """Write the missing slices, each atomically, in order.

    Raises:
        UserError: one exists with other content; then nothing is written.
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

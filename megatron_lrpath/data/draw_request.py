"""What to draw: sources, ranges of documents, versions and their tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from megatron_lrpath.errors import UserError

VALIDATION = "valid"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class SourceRequest:
    """One dataset of the mixture; `weight` None: in proportion to the tokens that no slice has yet."""

    prefix: Path
    weight: Fraction | None
    domain: str


@dataclass(frozen=True)
class RangeRequest:
    """Documents `first` up to but not including `end` (None: to the last) of a dataset, for one version."""

    version: str
    prefix: Path
    first: int
    end: int | None


@dataclass(frozen=True)
class DrawRequest:
    """All of one call.

    `versions` are names and tokens of those drawn at random, in order; None as tokens: everything that is
    left, in equal parts. With `seq_length` each source gets what its share needs in whole samples.
    """

    sources: tuple[SourceRequest, ...]
    versions: tuple[tuple[str, int | None], ...]
    valid_tokens: int | None
    ranges: tuple[RangeRequest, ...]
    seed: int
    seq_length: int | None = None

    @property
    def names(self) -> list[str]:
        """Names of the slices to be made: validation, then versions as drawn, then those of ranges."""
        drawn = [VALIDATION] if self.valid_tokens is not None else []
        drawn += [name for name, _ in self.versions]
        return drawn + list(dict.fromkeys(part.version for part in self.ranges))

    def check(self) -> None:
        """Refuse names that cannot be file names or occur twice, and requests for nothing.

        Raises:
            UserError: naming the option.
        """
        for name in self.names:
            if not NAME.fullmatch(name):
                raise UserError(f"{name!r} cannot be a slice's name; use letters, digits, `.`, `_` and `-`")
        twice = [name for name in self.names if self.names.count(name) > 1]
        if twice:
            raise UserError(f"the slice {twice[0]!r} is asked for twice; give each a name of its own")
        if not self.names:
            raise UserError(
                "nothing to draw; say --tokens-per-version, --valid-tokens, --documents or --append"
            )
        if not self.sources and (self.versions or self.valid_tokens is not None):
            raise UserError("no --source to draw from")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and any(tokens is None for _, tokens in self.versions):
            raise UserError("--source: weights mean nothing where everything is taken; leave them out")
        if any(weighted) and not all(weighted):
            raise UserError("--source: some have a weight and some have none; give all of them one, or none")


def default_domain(prefix: Path) -> str:
    """The domain of a dataset that was given none: its name, less the ending that preprocess_data.py adds."""
    return prefix.name.removesuffix("_document").removesuffix("_text")

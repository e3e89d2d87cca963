"""A request to draw: sources, ranges and token counts, parsed from text and checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from megatron_lrpath.data.indexed import strip_ending
from megatron_lrpath.data.slice import VALIDATION, is_validation
from megatron_lrpath.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}


@dataclass(frozen=True)
class SourceRequest:
    """One dataset of the mixture; `weight` None: in proportion to the tokens that are in no slice yet."""

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
    """The arguments of one call.

    `versions` are names and tokens of those drawn at random, in order; None as tokens: everything that is
    the rest, in equal parts. With `seq_length` each source gets what its share needs in whole samples. With
    `drop_duplicates` documents that repeat others are excluded.
    """

    sources: tuple[SourceRequest, ...]
    versions: tuple[tuple[str, int | None], ...]
    valid_tokens: int | None
    ranges: tuple[RangeRequest, ...]
    seed: int
    seq_length: int | None = None
    valid_name: str = VALIDATION
    drop_duplicates: bool = False

    @property
    def names(self) -> list[str]:
        """Return the names of the new slices: validation, then versions as drawn, then those of ranges."""
        drawn = [self.valid_name] if self.valid_tokens is not None else []
        drawn += [name for name, _ in self.versions]
        return drawn + list(dict.fromkeys(part.version for part in self.ranges))

    def check(self) -> None:
        """Refuse names that cannot be file names or are repeated, and empty requests.

        Raises:
            UserError: with the name of the option.
        """
        for name in self.names:
            if not NAME.fullmatch(name):
                raise UserError(f"{name!r} cannot be a slice's name; use letters, digits, `.`, `_` and `-`")
        folded = [name.casefold() for name in self.names]  # files of one name on some disks
        twice = [name for name in self.names if folded.count(name.casefold()) > 1]
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


def parse_source(text: str) -> SourceRequest:
    """Parse `PREFIX[:WEIGHT[:DOMAIN]]` from the right, because a prefix can contain colons.

    Of the valid readings, the longest prefix that exists on disk is used: a dataset that is really called
    `crawl:2` is found. An empty weight (`PREFIX::DOMAIN`) means no weight.
    """
    parts = text.split(":")
    readings: list[tuple[str, str | None, str | None]] = [(text, None, None)]
    if len(parts) >= 2 and _weight(parts[-1]) is not None:
        readings.append((":".join(parts[:-1]), parts[-1], None))
    if len(parts) >= 3 and (parts[-2] == "" or _weight(parts[-2]) is not None) and parts[-1]:
        readings.append((":".join(parts[:-2]), parts[-2], parts[-1]))
    there = [reading for reading in readings if Path(f"{strip_ending(reading[0])}.idx").exists()]
    prefix, weight, domain = there[0] if there else readings[-1]
    path = Path(strip_ending(prefix))
    number = _weight(weight) if weight else None
    return SourceRequest(path, number, domain or default_domain(path))


def default_domain(prefix: Path) -> str:
    """Return the default domain of a dataset: its name, without the suffix that preprocess_data.py adds."""
    return prefix.name.removesuffix("_document").removesuffix("_text")


def parse_range(text: str) -> RangeRequest:
    """Parse `VERSION=PREFIX:FROM-TO` or `VERSION=PREFIX:FROM-`: documents counted from 0, TO not included.

    Raises:
        UserError: another format, or an empty range.
    """
    match = re.fullmatch(r"([^=]+)=(.+):(\d+)-(\d*)", text)
    if not match:
        raise UserError(
            f"--documents {text}: not of the form VERSION=PREFIX:FROM-TO, as in v2=data/web:100-2000"
        )
    version, prefix, first, end = match.groups()
    found = RangeRequest(version, Path(strip_ending(prefix)), int(first), int(end) if end else None)
    if found.end is not None and found.end <= found.first:
        raise UserError(f"--documents {text}: holds no document (TO is not included)")
    return found


def parse_tokens(text: str) -> int:
    """Parse a number of tokens: `10500000000`, `10_500_000_000`, `10.5e9` or `10.5B` (K, M, B or G, T).

    Raises:
        UserError: not a number, not an integer, or not positive.
    """
    match = re.fullmatch(r"([0-9_.]+(?:[eE][+-]?[0-9]+)?)([kKmMbBgGtT]?)", text.strip())
    try:
        number = Fraction(match[1]) * UNITS[match[2].lower()] if match else None
    except ValueError:
        number = None
    if number is None or number <= 0 or number.denominator != 1:
        raise UserError(f"{text!r} is not a number of tokens; write it as 10500000000, 10.5e9 or 10.5B")
    return int(number)


def version_requests(
    tokens: Sequence[str], count: int | None, names: Sequence[str] | None, taken: Sequence[str], append: bool
) -> tuple[tuple[str, int | None], ...]:
    """Return names and tokens of the versions to draw at random.

    `tokens` as given (one for all, or one each), `count` of --versions, `names` of --names, `taken` the
    names of existing slices. Unnamed versions are v1, v2, …, continuing after the existing ones with
    `append`.

    Raises:
        UserError: the numbers disagree, or the number of tokens is not given.
    """
    amounts: list[int | None] = [parse_tokens(text) for text in tokens]
    if not amounts and not append:
        raise UserError("--tokens-per-version is missing (with --append it is then everything not yet drawn)")
    number = count if count is not None else len(names) if names else max(len(amounts), 1)
    if number < 1 or len(amounts) not in (0, 1, number):
        raise UserError(
            f"--tokens-per-version: {len(amounts)} numbers for {number} versions; give one, or one each"
        )
    if names and len(names) != number:
        raise UserError(f"--names: {len(names)} names for {number} versions")
    amounts = amounts * number if len(amounts) == 1 else amounts or [None] * number
    # With `append`: the first k such that v<k> and later names are free, and above the number of versions.
    versions = [name for name in taken if append and not is_validation(name)]
    numbers = [int(name[1:]) for name in versions if re.fullmatch(r"v[0-9]+", name)]
    first = max([len(versions), *numbers]) + 1
    return tuple(zip(names or [f"v{first + i}" for i in range(number)], amounts, strict=True))


def _weight(text: str) -> Fraction | None:
    """Return a weight (not negative), or None if the text is not a weight."""
    try:
        number = Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None
    return number if number >= 0 else None

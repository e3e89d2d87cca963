"""Version slices: the documents of indexed datasets that form a data version, and their checks."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lrpath.data.indexed import fingerprint_source, map_lengths, read_header
from megatron_lrpath.data.slice_codec import DamagedError, Documents, decode, encode, read_slice_bytes
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_write_bytes
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.plan.mix import Mix, MixPart
from megatron_lrpath.plan.spec import Data
from megatron_lrpath.tokenizers.prints import Facts, check_facts

ENDING = ".slice"
VALIDATION = "valid"
"""Name of the first validation slice; a version's own one is `valid_name`."""


@dataclass(frozen=True)
class SliceSource:
    """Documents of one indexed dataset.

    `prefix` is the dataset's present path, `fingerprint` identifies it (see `fingerprint_source`),
    `documents` are sorted int32 numbers of documents in it, `tokens` the total of their tokens. `tokenizer`
    are the facts of its tokenizer, if they were recorded; they are not part of the slice's fingerprint.
    """

    prefix: Path
    fingerprint: str
    domain: str
    documents: Documents
    tokens: int
    tokenizer: Facts | None = field(default=None, compare=False)

    def described(self, prefix: Path | str) -> dict[str, Any]:
        """Return JSON-serializable values without the documents' numbers; `prefix` is the path to write."""
        return {
            "prefix": str(prefix),
            "domain": self.domain,
            "fingerprint": self.fingerprint,
            "documents": len(self.documents),
            "tokens": self.tokens,
            **({} if self.tokenizer is None else {"tokenizer": self.tokenizer}),
        }

    @cached_property
    def digest(self) -> str:
        """Return the hash (hex) of the selection itself: the dataset's fingerprint and the documents, not
        their path.
        """
        numbers = hashlib.sha256(np.ascontiguousarray(self.documents, dtype="<i4")).hexdigest()
        return hashlib.sha256(f"{self.fingerprint}\n{numbers}".encode()).hexdigest()


@dataclass(frozen=True)
class Slice:
    """A data version; `seed` was used to draw it (None if its documents were named)."""

    name: str
    seed: int | None
    sources: tuple[SliceSource, ...]
    path: Path | None = field(default=None, compare=False)

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(source.tokens for source in self.sources)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return sum(len(source.documents) for source in self.sources)

    @property
    def tokens_by_domain(self) -> dict[str, int]:
        """Return tokens of each domain, in the order of the sources."""
        counts: dict[str, int] = {}
        for source in self.sources:
            counts[source.domain] = counts.get(source.domain, 0) + source.tokens
        return counts

    @cached_property
    def fingerprint(self) -> str:
        """Return the hash (hex) of the content: datasets, documents, tokens, domains; not of name, seed and
        path.
        """
        content = [[source.digest, source.domain, source.tokens] for source in self.sources]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @classmethod
    def load(cls, path: Path | str) -> Slice:
        """Read a slice file; relative prefixes are resolved against its real folder.

        Raises:
            UserError: the file is missing, foreign, damaged, or was renamed.
        """
        path = Path(path)
        try:
            header, lists = decode(read_slice_bytes(path))
            loaded = _from_header(header, lists, path)
        except FileNotFoundError:
            raise UserError(f"{path}: there is no such slice; draw it with tools/slice_versions.py") from None
        except IsADirectoryError:
            raise UserError(f"{path}: a folder, not a slice file") from None
        except DamagedError as error:
            raise UserError(
                f"{path}: not a whole slice file: {error}; copy it again, or draw it again from the same "
                f"sources with the same seed"
            ) from None
        if loaded.name != path.name.removesuffix(ENDING):
            raise UserError(
                f"{path}: holds the slice {loaded.name!r}; a slice's name decides its order of samples, so "
                f"rename the file back to {loaded.name}{ENDING}"
            )
        return loaded

    def save(self, path: Path | str) -> None:
        """Write the slice file atomically; its name must be the slice's. Replaces an existing file."""
        path = Path(path)
        if path.name != self.name + ENDING:
            raise ValueError(f"slice {self.name!r} cannot be saved as {path.name}")
        atomic_write_bytes(path, self.to_bytes(path.parent))

    def to_bytes(self, folder: Path) -> bytes:
        """Return the content of a slice file for `folder`."""
        folder = folder.resolve()
        sources = [source.described(_prefix_to_store(source.prefix, folder)) for source in self.sources]
        header = {"name": self.name, "seed": self.seed, "fingerprint": self.fingerprint, "sources": sources}
        return encode(header, [source.documents for source in self.sources])


def _from_header(header: dict[str, Any], lists: list[Documents], path: Path) -> Slice:
    """Build a slice from a decoded file; raise DamagedError if the header is not in the form that `save`
    writes.
    """
    folder = path.resolve().parent
    try:
        sources = tuple(
            SliceSource(
                prefix=Path(os.path.normpath(folder / described["prefix"])),
                fingerprint=str(described["fingerprint"]),
                domain=str(described["domain"]),
                documents=documents,
                tokens=int(described["tokens"]),
                tokenizer=None if described.get("tokenizer") is None else check_facts(described["tokenizer"]),
            )
            for described, documents in zip(header["sources"], lists, strict=True)
        )
        seed = header["seed"]
        loaded = Slice(str(header["name"]), None if seed is None else int(seed), sources, path)
        counts = [int(described["documents"]) for described in header["sources"]]
        whole = header["fingerprint"] == loaded.fingerprint and counts == [len(part) for part in lists]
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"its header lacks something ({error!r})") from None
    if not whole:
        raise DamagedError("its fingerprint is not that of its content")
    return loaded


def _prefix_to_store(prefix: Path, folder: Path) -> str:
    """Return `prefix` relative to the slice's folder, so that a tree can be moved; absolute if only / is
    shared.
    """
    absolute = prefix.parent.resolve() / prefix.name
    if len(Path(os.path.commonpath([absolute, folder])).parts) <= 1:
        return str(absolute)
    return os.path.relpath(absolute, folder)


def slice_path(folder: Path | str, name: str) -> Path:
    """Return the file of the slice `name` in `folder`."""
    return Path(folder) / (name + ENDING)


def open_slices(data: Data, versions: Iterable[str], verify: bool = True) -> list[Slice]:
    """Load the slices of `versions`, in their order, and check that no document is in two, or in validation.

    With `verify` every source is compared with its fingerprint (once per dataset): needed in one process of
    a node. Loading and checking 10 million documents takes a second or two.

    Raises:
        UserError: a slice or source is missing, damaged or replaced, or two slices share documents.
    """
    slices = [Slice.load(slice_path(data.slices, name)) for name in versions]
    everything = [*slices, *held_out(data)]
    if verify:
        verify_slices(everything)
    check_disjoint(everything)
    return slices


def valid_name(version: str) -> str:
    """Return the name of a version's own validation set."""
    return f"{VALIDATION}-{version}"


def is_validation(name: str) -> bool:
    """Return whether a slice of this name is a validation set."""
    return name == VALIDATION or name.startswith(valid_name(""))


def validation_path(data: Data) -> Path:
    """Return the validation slice's file: the named one (with or without its suffix), else `valid`."""
    return _with_ending(Path(data.valid) if data.valid else Path(data.slices) / VALIDATION)


def validation_paths(data: Data) -> list[Path]:
    """Return the files of all validation slices, the first one first."""
    return [validation_path(data), *(_with_ending(Path(path)) for path in data.more_valid)]


def _with_ending(path: Path) -> Path:
    return path if path.name.endswith(ENDING) else path.with_name(path.name + ENDING)


def open_validations(data: Data) -> list[Slice]:
    """Load all validation slices, the first one first."""
    return [Slice.load(path) for path in validation_paths(data)]


def open_validation(data: Data) -> Slice:
    """Load the first validation slice (`open_slices` verifies its sources)."""
    return Slice.load(validation_path(data))


def held_out(data: Data) -> list[Slice]:
    """Return the validation slices that exist or are named in the plan."""
    return open_validations(data) if data.valid or validation_path(data).exists() else []


def verify_slices(slices: Iterable[Slice]) -> None:
    """Check that every dataset is at its path in the slices and is unchanged since they were drawn from it.

    Reads all of every .idx and 256 KiB of every .bin once: call it in one process of a node, not in all.

    Raises:
        UserError: datasets are missing or have changed, all of them in one message.
    """
    if problems := source_problems(slices):
        raise UserError("; ".join(problem.text for problem in problems))


@dataclass(frozen=True)
class SourceProblem:
    """The problem with a dataset that a slice names, as a sentence, and whether it is only missing."""

    text: str
    is_missing: bool


def source_problems(
    slices: Iterable[Slice], largest: float = math.inf, known: dict[Path, str] | None = None
) -> list[SourceProblem]:
    """Return the problems of the datasets that the slices name, one for each dataset.

    Args:
        slices: the slices.
        largest: of a larger .idx (bytes) only the header and the lengths of the slice's documents are read.
        known: fingerprints of datasets that have been read; new ones are added.
    """
    known = {} if known is None else known
    problems: dict[Path, SourceProblem] = {}
    for one in slices:
        for source in one.sources:
            if source.prefix not in problems and (found := _source_problem(one, source, largest, known)):
                problems[source.prefix] = found
    return list(problems.values())


def _source_problem(
    one: Slice, source: SliceSource, largest: float, known: dict[Path, str]
) -> SourceProblem | None:
    prefix, where = source.prefix, one.path or one.name
    try:
        if _index_bytes(prefix) > largest:
            same, found = _has_documents(source), ""
        else:
            if prefix not in known:
                known[prefix] = fingerprint_source(prefix)
            same = known[prefix] == source.fingerprint
            found = f" (fingerprint {known[prefix][:12]}, not {source.fingerprint[:12]})"
    except UserError as error:
        text = f"{where}: names the indexed dataset {error}; put it (or a link) back, or move slices and data together"
        return SourceProblem(text, is_missing=_index_bytes(prefix) == 0)
    if same:
        return None
    text = (
        f"{where}: the indexed dataset {prefix} is not the one this slice was drawn from{found}; bring the old one "
        "back, or give new data a name of its own"
    )
    return SourceProblem(text, is_missing=False)


def _index_bytes(prefix: Path) -> int:
    try:
        return os.path.getsize(f"{prefix}.idx")
    except OSError:
        return 0  # the check of the fingerprint reports the reason


def _has_documents(source: SliceSource) -> bool:
    """Return whether the documents of a slice exist and have the tokens that it counts."""
    lengths = map_lengths(read_header(str(source.prefix)))
    if not len(source.documents):
        return True
    is_there = int(source.documents[-1]) < len(lengths)
    return is_there and int(lengths[source.documents].sum(dtype=np.int64)) == source.tokens


def check_disjoint(slices: Sequence[Slice]) -> None:
    """Check that no document is in two slices (or twice in one).

    Datasets are identified by fingerprint, so that a copy under another name is detected. Uses a byte per
    document of the largest dataset.

    Raises:
        UserError: with two slices and the number of shared documents.
    """
    by_source: dict[str, list[tuple[Slice, Documents]]] = {}
    for one in slices:
        for source in one.sources:
            by_source.setdefault(source.fingerprint, []).append((one, source.documents))
    for holders in by_source.values():
        size = max((int(documents[-1]) + 1 for _, documents in holders if len(documents)), default=0)
        seen = np.zeros(size, dtype=bool)
        for position, (one, documents) in enumerate(holders):
            if seen[documents].any():
                held = [(other, np.intersect1d(part, documents)) for other, part in holders[:position]]
                other, shared = next((other, shared) for other, shared in held if len(shared))
                raise UserError(
                    f"the slices {other.path or other.name} and {one.path or one.name} share {len(shared):,} "
                    f"documents (the first is number {shared[0]}); slices must be disjoint, "
                    f"draw one of them again"
                )
            seen[documents] = True


def available_samples(one: Slice, seq_length: int) -> int:
    """Return the samples of `seq_length` tokens in one epoch of the slice.

    A sample needs one token more than its length (the last label, with which the next sample begins), and
    samples do not cross from one source into another: the rest of each source is unused.
    """
    return sum(max(source.tokens - 1, 0) // seq_length for source in one.sources)


def require_samples(one: Slice, samples: int, seq_length: int) -> None:
    """Refuse a slice with fewer than `samples` samples (of `seq_length` tokens) for its version's steps.

    Raises:
        UserError: with the required and the available samples and tokens.
    """
    available = available_samples(one, seq_length)
    if available < samples:
        raise UserError(
            f"version {one.name}: its steps need {samples:,} samples of {seq_length:,} tokens "
            f"({samples * seq_length:,} tokens), and {one.path or 'its slice'} has {available:,} "
            f"({one.tokens:,} tokens in {len(one.sources)} sources); give the version fewer steps, or draw "
            f"it with at least that many tokens (slice_versions.py --seq-length {seq_length} adds what the "
            f"ends of its sources cost)"
        )


def require_versions(plan: Plan, slices: Iterable[Slice]) -> None:
    """Refuse slices with too few samples for their versions' steps.

    Raises:
        UserError: lists all of them, a line each.
    """
    samples = {version.name: plan.samples_of(index) for index, version in enumerate(plan.versions)}
    problems = []
    for one in slices:
        try:
            require_samples(one, samples[one.name], plan.batch.seq_length)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def require_mix_samples(
    slices: Sequence[Slice], mix: Mix, batch: int, steps: int, seq_length: int
) -> list[int]:
    """Return the number of samples of each slice that a branch reads.

    Raises:
        UserError: a slice has too few; the message gives the plan's line.
    """
    needed = list(mix.samples(batch, steps).values())
    for one, part, count in zip(slices, mix.parts, needed, strict=True):
        available = available_samples(one, seq_length)
        if available < count:
            raise UserError(
                f"{part.place}: its share of {steps:,} steps is {count:,} samples of {seq_length:,} tokens, and "
                f"{one.path or 'the slice'} has {available:,} ({one.tokens:,} tokens); give a smaller share, "
                "or draw the slice with more tokens"
            )
    return needed


def mix_path(data: Data, part: MixPart) -> Path:
    """Return the file of a mix's slice: next to the versions', or at the path in its name."""
    return slice_path(Path(part.slice).parent if "/" in part.slice else data.slices, part.name)


def open_mix(data: Data, mix: Mix, verify: bool = True) -> list[Slice]:
    """Load a mix's slices, in its order, and check that no document is in two, or in validation.

    They may share documents with the versions: curated data may be a part of them, or an old version is
    read again. With `verify` every source is compared with its fingerprint, as in `open_slices`.

    Raises:
        UserError: a slice or source is missing, damaged or replaced, or documents are shared.
    """
    slices = []
    for part in mix.parts:
        try:
            slices.append(Slice.load(mix_path(data, part)))
        except UserError as error:
            raise UserError(f"{part.place}: {error}") from None
    checked = [*slices, *open_validations(data)] if validation_path(data).exists() else slices
    if verify:
        verify_slices(slices)
    check_disjoint(checked)
    return slices


def check_mixes(plan: Plan, runs: Iterable[Run]) -> None:
    """Check, before a training of days, that the slices of every branch's mix exist and are long enough.

    Raises:
        UserError: see `open_mix` and `require_mix_samples`.
    """
    opened: dict[Mix, list[Slice]] = {}
    for run in runs:
        if run.mix is None:
            continue
        if run.mix not in opened:
            opened[run.mix] = open_mix(plan.data, run.mix, verify=False)
        batch = plan.batch_of(run)
        require_mix_samples(opened[run.mix], run.mix, batch.global_batch_size, run.steps, batch.seq_length)

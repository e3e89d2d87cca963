"""Process a chunk in a worker: parse, check, tokenize, pack; or give the reason for a rejection."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from megatron_lrpath.data.document_hashes import Hashes, hash_documents
from megatron_lrpath.data.preprocess.readers import Chunk
from megatron_lrpath.exits import FAILED, leave_at_once
from megatron_lrpath.tokenizers.encoders import Encoder, TextError

type Texts = list[str]  # one document of one key: its text, or its sentences
PR_SET_PDEATHSIG = 1
NAMED_KEYS, NAMED_KEYS_LENGTH = 6, 80  # keys of a document without the wanted key, in the message
decoder = json.JSONDecoder()


@dataclass(frozen=True)
class DocumentOptions:
    """How documents are parsed and assembled; the same for a whole run."""

    keys: tuple[str, ...]
    append_eod: bool
    keep_empty: bool
    sentence_lists: bool
    partitions: int


@dataclass
class Packed:
    """Documents of one key and partition: ids, tokens per sequence, sequences per document, hashes of sequences."""

    tokens: npt.NDArray[np.integer[Any]]
    lengths: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]
    hashes: Hashes | None = None


@dataclass
class Figures:
    """Documents, tokens of all keys, tokens of answers (for chats only), bytes of text (UTF-8), rejects.

    `empty` counts blank lines and documents without text, which are skipped and are not rejects.
    """

    documents: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    text_bytes: int = 0
    rejected: int = 0
    empty: int = 0

    def add(self, other: Figures) -> None:
        """Add the counts of another part."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class ChunkResult:
    """The result of a chunk. `packed[output][partition]`; `rejects` are (line or row, reason)."""

    name: str
    position: int
    figures: Figures = field(default_factory=Figures)
    packed: list[list[Packed]] = field(default_factory=list)
    rejects: list[tuple[int, str]] = field(default_factory=list)


class Rejected(Exception):
    """A document cannot be used; the text is the reason."""


class Empty(Rejected):
    """A document has no text; it is skipped and counted."""


@dataclass(frozen=True)
class Worker:
    """The state of a worker process, created before the fork so that the tokenizer is loaded once."""

    options: DocumentOptions
    encoder: Encoder

    def process(self, chunk: Chunk) -> ChunkResult:
        """Encode all documents of a chunk, column by column, without those that fail in any column."""
        result = ChunkResult(chunk.name, chunk.position)
        numbers: list[int] = []
        columns: list[list[Texts]] = [[] for _ in self.options.keys]
        empty = 0
        for number, document in enumerate(texts_of(chunk, self.options)):
            if isinstance(document, Empty):
                empty += 1
                continue
            if isinstance(document, Rejected):
                result.rejects.append((chunk.first + number, str(document)))
                continue
            numbers.append(number)
            for column, texts in zip(columns, document, strict=True):
                column.append(texts)
        encoded = [self._encode(column) for column in columns]
        failed: dict[int, Rejected] = {}
        for key, column in zip(self.options.keys, encoded, strict=True):
            for at, reason in self._problems(key, column).items():
                if at not in failed or isinstance(failed[at], Empty):
                    failed[at] = reason
        wrong = {at: reason for at, reason in failed.items() if not isinstance(reason, Empty)}
        result.rejects += [(chunk.first + numbers[at], str(reason)) for at, reason in wrong.items()]
        result.rejects.sort()
        self._fill(result, [chunk.index + number for number in numbers], columns, encoded, failed.keys())
        result.figures.empty = empty + len(failed) - len(wrong)
        return result

    def _encode(self, column: list[Texts]) -> list[list[Any]]:
        """Return the ids, or the problem, of each sentence of each document."""
        flat = self.encoder.encode_many([text for texts in column for text in texts])
        if len(flat) == len(column):
            return [[ids] for ids in flat]
        encoded = iter(flat)
        return [[next(encoded) for _ in texts] for texts in column]

    def _problems(self, key: str, column: list[list[Any]]) -> dict[int, Rejected]:
        """Return the problems of documents of a column, by their position in it."""
        found: dict[int, Rejected] = {}
        for at, sentences in enumerate(column):
            for ids in sentences:
                if type(ids) is TextError:
                    found[at] = Rejected(f"{key!r}: {ids}")
                    break
            else:
                if not any(map(len, sentences)) and not self.options.keep_empty:
                    found[at] = Empty(f"{key!r}: the tokenizer makes no token of it")
        return found

    def _fill(
        self,
        result: ChunkResult,
        numbers: list[int],
        columns: list[list[Texts]],
        encoded: list[list[list[Any]]],
        failed: Collection[int],
    ) -> None:
        """Pack the good documents, each into the partition given by its number over all files."""
        kept = [at for at in range(len(numbers)) if at not in failed]
        groups: list[list[int]] = [[] for _ in range(self.options.partitions)]
        for at in kept:
            groups[numbers[at] % self.options.partitions].append(at)
        result.packed = [[self._pack([column[at] for at in group]) for group in groups] for column in encoded]
        texts = (text for column in columns for at in kept for text in column[at])
        result.figures = Figures(
            documents=len(kept),
            tokens=sum(len(part.tokens) for parts in result.packed for part in parts),
            text_bytes=sum(len(text) if text.isascii() else len(text.encode()) for text in texts),
            rejected=len(result.rejects),
        )

    def _pack(self, documents: list[list[Any]]) -> Packed:
        """Join documents; sentences without a token are dropped, as in Megatron-LM."""
        pieces: list[Any] = []
        lengths: list[int] = []
        counts: list[int] = []
        eod = np.array([self.encoder.eod if self.options.append_eod else 0], dtype=np.int64)
        for sentences in documents:
            sizes = [len(ids) for ids in sentences if len(ids)]
            pieces += sentences
            if sizes and self.options.append_eod:
                pieces.append(eod)
                sizes[-1] += 1
            lengths += sizes
            counts.append(len(sizes))
        tokens = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
        sizes_of = np.array(lengths, dtype=np.int32)
        hashes = hash_documents(tokens, sizes_of, self.encoder.eod)
        return Packed(tokens, sizes_of, np.array(counts, dtype=np.int32), hashes)


def texts_of(chunk: Chunk, options: DocumentOptions) -> Iterator[list[Texts] | Rejected]:
    """Yield the texts of each key of each document of a chunk, or the reason for a rejection (`Empty`: no
    text).
    """
    rows = map(list, zip(*chunk.rows, strict=True)) if chunk.rows is not None else None
    for value in _json_values(chunk.lines, options.keys) if rows is None else rows:
        if isinstance(value, Rejected):
            yield value
            continue
        if len(value) == 1 and type(value[0]) is str and value[0]:
            yield [value]  # the usual case, without the checks
            continue
        yield _all_texts(value, options)


def _all_texts(values: list[Any], options: DocumentOptions) -> list[Texts] | Rejected:
    """Return the texts of every key; a document with an unusable and an empty text is unusable."""
    found: list[Texts] = []
    empty: Empty | None = None
    for key, value in zip(options.keys, values, strict=True):
        try:
            found.append(_texts(key, value, options))
        except Empty as reason:
            empty = reason
        except Rejected as reason:
            return reason
    return empty or found


def _texts(key: str, value: Any, options: DocumentOptions) -> Texts:
    if isinstance(value, str) and value:
        return [value]
    if isinstance(value, bytes) and value:
        return [_decode(value)]
    if isinstance(value, list) and options.sentence_lists and all(isinstance(x, str) for x in value):
        if any(value) or options.keep_empty:
            return value
        raise Empty(f"{key!r} is empty")
    if value in ("", b""):
        if options.keep_empty:
            return [""]
        raise Empty(f"{key!r} is empty")
    hint = " (--sentence-lists takes lists of sentences)" if isinstance(value, list) else ""
    raise Rejected(f"{key!r} is {_json_type(value)}, not a string{hint}")


def _json_values(lines: bytes, keys: Sequence[str]) -> Iterator[list[Any] | Rejected]:
    """Yield the values of the keys on each line, or the reason for a rejection."""
    try:
        texts: list[Any] = lines.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        texts = list(lines.split(b"\n"))
    if not texts[-1]:
        texts.pop()
    for text in texts:
        try:
            yield _pick(_parse(_decode(text) if isinstance(text, bytes) else text), keys)
        except Rejected as reason:
            yield reason
        except (ValueError, RecursionError) as error:
            yield Rejected(f"not JSON: {error}") if text.strip() else Empty("a blank line")


def _parse(text: str) -> Any:
    """Parse JSON by the inner function of `json.loads` if nothing surrounds the value."""
    try:
        value, end = decoder.raw_decode(text)
    except ValueError:
        return json.loads(text)
    return value if end == len(text) else json.loads(text)


def _pick(document: Any, keys: Sequence[str]) -> list[Any]:
    if not isinstance(document, dict):
        raise Rejected(f"the line is {_json_type(document)}, not an object")
    for key in keys:
        if key not in document:
            has = ", ".join(map(repr, sorted(document)[:NAMED_KEYS])) or "none"
            raise Rejected(f"no key {key!r}, it has {has:.{NAMED_KEYS_LENGTH}}")
    return [document[key] for key in keys]


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Rejected(f"invalid UTF-8 at byte {error.start + 1}: {error.reason}") from None


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", str: "a string", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


class WorkerProcess:
    """A process of the pool. `process` is inherited by the fork, with its tokenizer, without pickling."""

    process: ClassVar[Callable[[Chunk], ChunkResult]]

    @classmethod
    def start(cls, parent: int, process: Callable[[Chunk], ChunkResult]) -> None:
        """Make the process end with its parent (even a killed one), ignore Ctrl-C, and keep the function to
        call.
        """
        cls.process = process
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent ended before that took effect
            leave_at_once(FAILED)

    @classmethod
    def run(cls, chunk: Chunk) -> ChunkResult:
        """Return the result of a chunk."""
        return cls.process(chunk)

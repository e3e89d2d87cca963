"""What a worker does with a chunk: parse, check, tokenize, pack; documents that are rejected are listed."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lrpath.data.preprocess.readers import Chunk
from megatron_lrpath.data.preprocess.writer import open_locked
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_open
from megatron_lrpath.tokenizers.encoders import Encoder, TextError


class RejectLog:
    """The list of rejected documents of one run, written beside the output when there are any.

    Until `close`, no other run can have the same output.
    """

    def __init__(self, path: Path, limit: int, option: str = "--max-rejects") -> None:
        self.path = path
        self.limit = limit
        self.option = option
        self.count = 0
        self.first = ""
        self._aside = Path(f"{path}.partial")
        self._aside.parent.mkdir(parents=True, exist_ok=True)
        self._stream = open_locked(str(self._aside), str(path.with_suffix("")))

    def add(self, name: str, line: int, reason: str) -> None:
        """Note one document: the input file, its line or row (from 1) and what is wrong with it."""
        entry = f"{'<stdin>' if name == '-' else name}:{line}: {reason}"
        self.first = self.first or entry
        self.count += 1
        self._stream.write((entry + "\n").encode("utf-8", "backslashreplace"))

    def publish(self) -> None:
        """Give the list its final name, or remove the one of an earlier run when nothing was rejected."""
        self._stream.flush()
        if self.count:
            with atomic_open(self.path) as target, open(self._aside, "rb") as source:
                while block := source.read(1 << 20):
                    target.write(block)
        else:
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove what is temporary and let other runs have the output."""
        if self._stream.closed:
            return
        self._aside.unlink(missing_ok=True)
        self._stream.close()

    def verdict(self, documents: int) -> None:
        """Raise `UserError` when more were rejected than the option allows."""
        if self.count > self.limit:
            raise UserError(
                f"{self.count:,} of {self.count + documents:,} documents were rejected, {self.option} allows "
                f"{self.limit:,}; nothing was written. They are listed in {self.path}, the first is\n"
                f"  {self.first}\n"
                f"Mend them, or allow them with {self.option} {self.count}"
            )


type Texts = list[str]  # one document of one key: its text, or its sentences
PR_SET_PDEATHSIG = 1
decoder = json.JSONDecoder()


@dataclass(frozen=True)
class Task:
    """What every chunk is treated with; the same for a whole run."""

    keys: tuple[str, ...]
    append_eod: bool
    keep_empty: bool
    sentence_lists: bool
    partitions: int


@dataclass
class Packed:
    """Documents of one key and partition: ids, tokens per sequence, sequences per document."""

    tokens: npt.NDArray[np.integer[Any]]
    lengths: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]


@dataclass
class Result:
    """What became of a chunk. `packed[key][partition]`; `rejects` are (line or row, reason)."""

    name: str
    position: int
    documents: int = 0
    text_bytes: int = 0
    packed: list[list[Packed]] = field(default_factory=list)
    rejects: list[tuple[int, str]] = field(default_factory=list)


class Rejected(Exception):
    """One document cannot be used; the text is the reason."""


class Worker:
    """Lives in each worker process, made before the fork so that the tokenizer is loaded once."""

    def __init__(self, task: Task, encoder: Encoder) -> None:
        self.task = task
        self.encoder = encoder

    def process(self, chunk: Chunk) -> Result:
        """Encode all documents of a chunk: column by column, without those that fail in any."""
        result = Result(chunk.name, chunk.position)
        numbers: list[int] = []
        columns: list[list[Texts]] = [[] for _ in self.task.keys]
        for number, document in enumerate(texts_of(chunk, self.task)):
            if isinstance(document, Rejected):
                result.rejects.append((chunk.first + number, str(document)))
                continue
            numbers.append(number)
            for column, texts in zip(columns, document, strict=True):
                column.append(texts)
        encoded = [self._encode(column) for column in columns]
        failed: dict[int, str] = {}
        for key, column in zip(self.task.keys, encoded, strict=True):
            failed = self._problems(key, column) | failed
        result.rejects += [(chunk.first + numbers[at], reason) for at, reason in failed.items()]
        result.rejects.sort()
        self._fill(result, [chunk.index + number for number in numbers], columns, encoded, failed)
        return result

    def _encode(self, column: list[Texts]) -> list[list[Any]]:
        """The ids, or what is wrong, for each sentence of each document."""
        flat = self.encoder.encode_many([text for texts in column for text in texts])
        if len(flat) == len(column):
            return [[ids] for ids in flat]
        encoded = iter(flat)
        return [[next(encoded) for _ in texts] for texts in column]

    def _problems(self, key: str, column: list[list[Any]]) -> dict[int, str]:
        """What is wrong with documents of a column, by their place in it."""
        found: dict[int, str] = {}
        for at, sentences in enumerate(column):
            for ids in sentences:
                if type(ids) is TextError:
                    found[at] = f"{key!r}: {ids}"
                    break
            else:
                if not any(map(len, sentences)) and not self.task.keep_empty:
                    found[at] = f"{key!r} is empty: the tokenizer makes no token of it"
        return found

    def _fill(
        self,
        result: Result,
        numbers: list[int],
        columns: list[list[Texts]],
        encoded: list[list[list[Any]]],
        failed: dict[int, str],
    ) -> None:
        """Pack the good documents, each into the partition that its number over all files decides."""
        kept = [at for at in range(len(numbers)) if at not in failed]
        groups: list[list[int]] = [[] for _ in range(self.task.partitions)]
        for at in kept:
            groups[numbers[at] % self.task.partitions].append(at)
        result.packed = [[self._pack([column[at] for at in group]) for group in groups] for column in encoded]
        result.documents = len(kept)
        texts = (text for column in columns for at in kept for text in column[at])
        result.text_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)

    def _pack(self, documents: list[list[Any]]) -> Packed:
        """Join documents; sentences without a token leave no trace, as in Megatron-LM."""
        pieces: list[Any] = []
        lengths: list[int] = []
        counts: list[int] = []
        eod = np.array([self.encoder.eod if self.task.append_eod else 0], dtype=np.int64)
        for sentences in documents:
            sizes = [len(ids) for ids in sentences if len(ids)]
            pieces += sentences
            if sizes and self.task.append_eod:
                pieces.append(eod)
                sizes[-1] += 1
            lengths += sizes
            counts.append(len(sizes))
        tokens = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
        return Packed(tokens, np.array(lengths, dtype=np.int32), np.array(counts, dtype=np.int32))


def texts_of(chunk: Chunk, task: Task) -> Iterator[list[Texts] | Rejected]:
    """The texts of each key of each document of a chunk, or why it is turned away."""
    for value in _json_values(chunk.lines, task.keys) if chunk.rows is None else _row_values(chunk.rows):
        if isinstance(value, Rejected):
            yield value
            continue
        if len(value) == 1 and type(value[0]) is str and value[0]:
            yield [value]  # the usual case, without the checks
            continue
        try:
            yield [_texts(key, text, task) for key, text in zip(task.keys, value, strict=True)]
        except Rejected as reason:
            yield reason


def _texts(key: str, value: Any, task: Task) -> Texts:
    if isinstance(value, str) and value:
        return [value]
    if isinstance(value, bytes) and value:
        return [_decode(value)]
    if isinstance(value, list) and task.sentence_lists and all(isinstance(x, str) for x in value):
        if any(value) or task.keep_empty:
            return value
        raise Rejected(f"{key!r} is empty")
    if value in ("", b""):
        if task.keep_empty:
            return [""]
        raise Rejected(f"{key!r} is empty")
    hint = " (--sentence-lists takes lists of sentences)" if isinstance(value, list) else ""
    raise Rejected(f"{key!r} is {_json_type(value)}, not a string{hint}")


def _json_values(lines: bytes, keys: Sequence[str]) -> Iterator[list[Any] | Rejected]:
    """The values of the keys on each line."""
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
            yield Rejected(f"not JSON: {error}" if text.strip() else "a blank line")


def _parse(text: str) -> Any:
    """`json.loads`, by its inner function where nothing stands around the value."""
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
            raise Rejected(f"no key {key!r}")
    return [document[key] for key in keys]


def _row_values(rows: list[list[Any]]) -> Iterator[list[Any]]:
    for values in zip(*rows, strict=True):
        yield list(values)


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Rejected(f"invalid UTF-8 at byte {error.start + 1}: {error.reason}") from None


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", str: "a string", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


_worker: Worker | None = None


def install(worker: Worker) -> None:
    """Make `worker` this process's own; called before the fork and inherited by it."""
    global _worker
    _worker = worker


def start_process(parent: int) -> None:
    """First thing in a worker process: end with the parent (even a killed one), leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that took effect
        os._exit(1)


def process(chunk: Chunk) -> Result:
    """Run the installed worker on a chunk."""
    assert _worker is not None
    return _worker.process(chunk)

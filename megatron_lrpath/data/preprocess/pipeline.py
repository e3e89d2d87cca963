"""Run a preprocessing: chunks to workers and back in order, progress, atomic publication of the output."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from megatron_lrpath.data.preprocess.readers import (
    NONE_USABLE,
    Chunk,
    expand_inputs,
    none_usable,
    read_chunks,
    total_bytes,
)
from megatron_lrpath.data.preprocess.worker import (
    ChunkResult,
    DocumentOptions,
    Figures,
    Worker,
    WorkerProcess,
)
from megatron_lrpath.data.preprocess.writer import (
    PairWriter,
    RejectLog,
    concatenate,
    optimal_dtype,
    publish_all,
    refuse_existing,
    remove_left_overs,
)
from megatron_lrpath.data.record import hashes_of, inputs_of, write_record
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import check_prefix
from megatron_lrpath.tokenizers.encoders import Encoder, build_encoder
from megatron_lrpath.tokenizers.prints import Facts, TokenizerSpec


class Interruption:
    """While entered, the first Ctrl-C is only recorded; `check` raises `KeyboardInterrupt` for it.

    A second Ctrl-C acts immediately. In threads other than the main one this has no effect, because Python
    delivers signals only there.
    """

    def __init__(self) -> None:
        self.asked = False
        self._previous: Any = None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if Ctrl-C was pressed."""
        if self.asked:
            raise KeyboardInterrupt


class ConversionProgress:
    """Shows the progress of a run on standard error.

    `total`: bytes of input, None if unknown; `log_interval`: documents between two lines if standard error
    is not a terminal (and at most one line in ten seconds).
    """

    def __init__(self, total: int | None, log_interval: int) -> None:
        self.total = total
        self.log_interval = log_interval
        self.started = time.monotonic()
        self._last_line = self.started
        self._last_documents = 0
        self._bar: Any = _terminal_bar(total) if sys.stderr.isatty() else None

    def note(self, text: str) -> None:
        """Print a message for the user."""
        if self._bar:
            self._bar.console.print(text, style="yellow")
        else:
            print(text, file=sys.stderr)

    def update(self, position: int, documents: int, tokens: int) -> None:
        """Show the progress; `position`: bytes of input processed; `documents` and `tokens` so far."""
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=position, tokens=f"{tokens:,} tokens")
            return
        now = time.monotonic()
        if now - self._last_line < 10.0 or documents - self._last_documents < self.log_interval:
            return
        self._last_line, self._last_documents = now, documents
        elapsed = now - self.started
        left = ""
        if self.total and position:
            left = (
                f", {100 * position / self.total:.0f} %, {elapsed * (self.total / position - 1):.0f} s left"
            )
        rate = position / elapsed / 1e6
        print(f"{documents:,} documents, {tokens:,} tokens, {rate:.1f} MB/s{left}", file=sys.stderr)

    def stop(self) -> None:
        """Remove the bar."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def finish(self, figures: Figures) -> None:
        """Remove the bar and print the final figures."""
        seconds = time.monotonic() - self.started
        print(
            f"{figures.documents:,} documents, {figures.tokens:,} tokens, "
            f"{figures.text_bytes / max(figures.tokens, 1):.2f} bytes per token, "
            f"{figures.text_bytes / 1e6 / max(seconds, 1e-9):.1f} MB/s, {seconds:.1f} s"
            + (f"; {figures.rejected:,} rejected" if figures.rejected else "")
            + (f"; {figures.empty:,} without text passed over" if figures.empty else ""),
            file=sys.stderr,
        )


def _terminal_bar(total: int | None) -> Any:
    from rich import progress
    from rich.console import Console

    bar = progress.Progress(
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[tokens]}"),
        console=Console(stderr=True),
        transient=True,
    )
    bar.add_task("", total=total, tokens="")
    bar.start()
    return bar


TOOL = "preprocess_data.py"
# Options that affect the ids of a text, for the record.
TEXT_OPTIONS = (
    "parse_special_tokens", "tokenizer_sentencepiece_legacy", "tokenizer_hf_no_use_fast",
    "tokenizer_hf_no_include_special_tokens", "sentence_lists", "keep_empty",
)  # fmt: skip
# A file of at least FEW documents fails if more than NEARLY_ALL of them are rejected; after SOON documents at once.
FEW, NEARLY_ALL, SOON = 50, 0.95, 10_000
CHUNKS_IN_FLIGHT = 3  # per worker: one being processed, one waiting, one being written


def preprocess(args: Namespace) -> None:
    """Turn `args.input` into one indexed dataset per JSON key.

    Raises:
        UserError: inputs, tokenizer or output cannot be used, or too many documents were rejected; then
            nothing appears under the final names.
    """
    _check_arguments(args)
    names = expand_inputs(args.input)
    prefix = Path(args.output_prefix)
    outputs = [f"{prefix}_{key}_document" for key in args.json_keys]
    marker = prefix.parent / f".{prefix.name}.publishing"
    # from here on, the output is locked
    with closing(RejectLog(Path(f"{prefix}.rejects"), args.max_rejects, NONE_USABLE)) as rejects:
        remove_left_overs(outputs)
        refuse_existing(outputs, marker, args.overwrite)
        encoder = build_encoder(args)
        if args.append_eod and encoder.eod is None:
            raise UserError("--append-eod: this tokenizer has no end-of-document token")
        progress = ConversionProgress(total_bytes(names), args.log_interval)
        if encoder.notice:
            progress.note(encoder.notice)
        options = DocumentOptions(
            tuple(args.json_keys),
            args.append_eod,
            args.keep_empty,
            args.sentence_lists,
            1 if args.keep_sequential_samples else args.partitions,
        )
        conversion = Conversion(encoder.vocab_size, options.partitions, rejects, progress)
        datasets = dict.fromkeys(outputs, optimal_dtype(encoder.vocab_size))
        process = Worker(options, encoder).process
        unusual = {name: True for name in TEXT_OPTIONS if getattr(args, name)}
        details = {"options": unusual, "inputs": inputs_of(names)}
        facts = facts_of(args, encoder)
        conversion.record = lambda prefix: write_record(
            prefix, TOOL, facts, details | hashes_of(prefix, encoder.eod)
        )
        with Interruption() as interruption:
            conversion.run(datasets, names, args.json_keys, args.workers, process, interruption, marker)


def facts_of(args: Namespace, encoder: Encoder) -> Facts:
    """Return the facts of the tokenizer in use; size and end token are the encoder's, with added tokens."""
    spec = TokenizerSpec.of_arguments(args)
    try:
        facts = spec.facts
    except UserError:  # only if it has custom code, which is not executed a second time
        facts = spec.described
    own = {"vocab_size": encoder.vocab_size, "eod": encoder.eod, "append_eod": args.append_eod}
    return own | facts if facts.get("vocabulary") else facts | own


def _check_arguments(args: Namespace) -> None:
    if args.split_sentences:
        raise UserError(
            "--split-sentences is for BERT and done by Megatron-LM's own tool; texts that are lists of "
            "sentences already are taken with --sentence-lists"
        )
    if args.find_optimal_num_workers:
        raise UserError("--find-optimal-num-workers: use as many --workers as there are cores")
    if len(set(args.json_keys)) < len(args.json_keys):
        raise UserError("--json-keys: a key is named twice")
    for name in ("workers", "partitions", "log_interval"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if args.max_rejects < 0:
        raise UserError("--max-rejects must be at least 0")
    check_prefix(args.output_prefix)


@dataclass
class UsableShare:
    """Stops at a file with nearly all documents rejected: its format is wrong at any `max_rejects`."""

    name: str = ""
    documents: int = 0
    rejected: int = 0

    def add(self, result: ChunkResult) -> None:
        """Count a chunk; `judge` the file before it at its end, and this file after `SOON` rejects."""
        if result.name != self.name:
            self.judge()
            self.name, self.documents, self.rejected = result.name, 0, 0
        self.documents += result.figures.documents
        self.rejected += result.figures.rejected
        if self.rejected >= SOON:
            self.judge()

    def judge(self) -> None:
        """Raise UserError if nearly all documents of the file so far were rejected."""
        total = self.documents + self.rejected
        if total >= FEW and self.rejected > NEARLY_ALL * total:
            raise UserError(
                f"{self.name}: {self.rejected:,} of {total:,} documents are unusable, so that the file is hardly what "
                "it was taken for; nothing was written. Look at its first lines, convert it to JSON lines, or "
                "leave it out"
            )


@dataclass
class Conversion:
    """One run's output: a pair of files for each dataset (or partition of one), and the list of rejects."""

    vocab_size: int
    partitions: int
    rejects: RejectLog
    progress: ConversionProgress
    targets: list[PairWriter] = field(default_factory=list)
    parts: list[list[PairWriter]] = field(default_factory=list)
    record: Callable[[str], object] | None = None  # writes the record of a published dataset

    def run(
        self,
        outputs: dict[str, np.dtype[Any]],
        names: Sequence[str],
        keys: Sequence[str],
        workers: int,
        process: Callable[[Chunk], ChunkResult],
        interruption: Interruption,
        marker: Path,
    ) -> Figures:
        """Convert the inputs `names` by `process` in worker processes, publish the outputs, return figures.

        `outputs` are the datasets' prefixes and the types of their tokens; they have temporary names until
        all are written. While `marker` exists, not all of them are published.

        Raises:
            UserError: an input cannot be read, too many documents were rejected (at once, not at the end), or
                none is left.
        """
        try:
            for output, dtype in outputs.items():
                self.targets.append(PairWriter(output, dtype))
                self.parts.append([])
                for number in range(self.partitions if self.partitions > 1 else 0):
                    self.parts[-1].append(PairWriter(f"{output}.part{number}", dtype))
            figures = Figures()
            share = UsableShare()
            with closing(in_order(read_chunks(names, keys), workers, process)) as results:
                for result in results:
                    self._write(result)
                    figures.add(result.figures)
                    if self.rejects.count > self.rejects.limit:
                        self._judge(names, figures)
                    share.add(result)
                    self.progress.update(result.position, figures.documents, figures.tokens)
                    interruption.check()
            share.judge()
            self._judge(names, figures)
            for target, parts in zip(self.targets, self.parts, strict=True):
                concatenate(parts, target)  # in Megatron-LM's order
                for part in parts:
                    part.discard()
            publish_all(self.targets, marker, self.record)
        finally:
            self.progress.stop()
            for pair in [*self.targets, *(part for parts in self.parts for part in parts)]:
                pair.discard()
        self.progress.finish(figures)
        return figures

    def _judge(self, names: Sequence[str], figures: Figures) -> None:
        """Publish the rejects. Raise UserError if there are too many, or no documents."""
        if not figures.documents and not figures.rejected:
            empty = f": {figures.empty:,} lines or rows, none with a text" if figures.empty else ""
            raise UserError(f"no documents in {', '.join(names)}{empty}")
        self.rejects.publish()
        self.rejects.verdict(figures.documents)
        if not figures.documents:
            raise UserError(none_usable(names, self.rejects.first, self.rejects.none_usable))

    def _write(self, result: ChunkResult) -> None:
        for target, parts, packed in zip(self.targets, self.parts, result.packed, strict=True):
            for part, documents in zip(parts or [target], packed, strict=True):
                try:
                    part.append(documents.tokens, documents.lengths, documents.counts, documents.hashes)
                except OverflowError as error:
                    size = self.vocab_size
                    raise UserError(f"{error}, though the tokenizer names {size} entries") from None
        for line, reason in result.rejects:
            self.rejects.add(result.name, line, reason)


def in_order(
    chunks: Iterable[Chunk], workers: int, process: Callable[[Chunk], ChunkResult]
) -> Generator[ChunkResult]:
    """Yield `process` of every chunk, in order, from worker processes, with a bounded number in memory.

    Raises:
        UserError: a worker process died.
    """
    context = multiprocessing.get_context("fork")
    executor = ProcessPoolExecutor(
        workers, mp_context=context, initializer=WorkerProcess.start, initargs=(os.getpid(), process)
    )
    waiting: deque[Future[ChunkResult]] = deque()
    try:
        executor.submit(int)  # forks all processes at once, before a reader starts a thread
        for chunk in chunks:
            waiting.append(executor.submit(WorkerProcess.run, chunk))
            while waiting and (len(waiting) >= CHUNKS_IN_FLIGHT * workers or waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, perhaps of a lack of memory; nothing was written. "
            "Fewer --workers need less memory"
        ) from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)

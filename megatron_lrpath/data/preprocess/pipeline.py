"""One run of preprocessing: chunks to workers and back in order, rejects counted, output published whole."""

from __future__ import annotations

import multiprocessing
import os
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from megatron_lrpath.data.preprocess import worker as work
from megatron_lrpath.data.preprocess.encoders import Encoder, build_encoder
from megatron_lrpath.data.preprocess.interrupt import Interruption
from megatron_lrpath.data.preprocess.progress import Progress
from megatron_lrpath.data.preprocess.readers import Chunk, expand_inputs, read_chunks, total_bytes
from megatron_lrpath.data.preprocess.rejects import RejectLog
from megatron_lrpath.data.preprocess.writer import (
    PairWriter,
    concatenate,
    optimal_dtype,
    publish_all,
    refuse_existing,
    remove_left_overs,
)
from megatron_lrpath.errors import UserError

CHUNKS_IN_FLIGHT = 3  # per worker: one being worked on, one waiting for it, one being written


@dataclass
class Figures:
    """What a run did: documents, tokens of all keys, bytes of their text (UTF-8), rejects, seconds."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    rejected: int = 0
    seconds: float = 0.0


def preprocess(args: Namespace) -> Figures:
    """Turn `args.input` into one indexed dataset per JSON key.

    Raises:
        UserError: inputs, tokenizer or output cannot be used, or too many documents were rejected; then
            nothing appears under the final names.
    """
    started = time.monotonic()
    _check_arguments(args)
    names = expand_inputs(args.input)
    prefix = Path(args.output_prefix)
    outputs = [f"{prefix}_{key}_document" for key in args.json_keys]
    marker = prefix.parent / f".{prefix.name}.publishing"
    with closing(
        RejectLog(Path(f"{prefix}.rejects"), args.max_rejects)
    ) as rejects:  # from here on, ours alone
        remove_left_overs(outputs)
        refuse_existing(outputs, marker, args.overwrite)
        encoder = build_encoder(args)
        if args.append_eod and encoder.eod is None:
            raise UserError("--append-eod: this tokenizer has no end-of-document token")
        progress = Progress(total_bytes(names), args.log_interval)
        if encoder.notice:
            progress.note(encoder.notice)
        with Interruption() as interruption, closing(_Run(args, encoder, rejects, progress)) as run:
            run.open(outputs)
            figures = run.carry_out(names, interruption)
            publish_all(run.finished(), marker)
    figures.seconds = time.monotonic() - started
    progress.finish(figures.documents, figures.tokens, figures.text_bytes, figures.rejected)
    return figures


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


class _Run:
    """The open files of one run."""

    def __init__(self, args: Namespace, encoder: Encoder, rejects: RejectLog, progress: Progress) -> None:
        self.args, self.encoder, self.rejects, self.progress = args, encoder, rejects, progress
        partitions = 1 if args.keep_sequential_samples else args.partitions
        self.task = work.Task(
            tuple(args.json_keys), args.append_eod, args.keep_empty, args.sentence_lists, partitions
        )
        self.targets: list[PairWriter] = []
        self.parts: list[list[PairWriter]] = []

    def open(self, outputs: list[str]) -> None:
        """Open all outputs under temporary names."""
        dtype = optimal_dtype(self.encoder.vocab_size)
        for output in outputs:
            self.targets.append(PairWriter(output, dtype))
            self.parts.append([])
            for number in range(self.task.partitions if self.task.partitions > 1 else 0):
                self.parts[-1].append(PairWriter(f"{output}.part{number}", dtype))

    def carry_out(self, names: list[str], interruption: Interruption) -> Figures:
        """Read, tokenize and write everything; what it came to."""
        figures = Figures()
        work.install(work.Worker(self.task, self.encoder))
        chunks = read_chunks(names, self.task.keys)
        for result in in_order(chunks, self.args.workers, work.process):
            for target, parts, packed in zip(self.targets, self.parts, result.packed, strict=True):
                for part, documents in zip(parts or [target], packed, strict=True):
                    self._append(part, documents)
                    figures.tokens += len(documents.tokens)
            for line, reason in result.rejects:
                self.rejects.add(result.name, line, reason)
            figures.documents += result.documents
            figures.text_bytes += result.text_bytes
            self.progress.update(result.position, figures.documents, figures.tokens)
            interruption.check()
        figures.rejected = self.rejects.count
        if not figures.documents and not figures.rejected:
            raise UserError(f"no documents in {', '.join(names)}")
        self.rejects.publish()
        self.rejects.verdict(figures.documents)
        if not figures.documents:
            raise UserError(f"no usable documents in {', '.join(names)}; see {self.rejects.path}")
        return figures

    def _append(self, part: PairWriter, documents: work.Packed) -> None:
        try:
            part.append(documents.tokens, documents.lengths, documents.counts)
        except OverflowError as error:
            size = self.encoder.vocab_size
            raise UserError(f"{error}, though the tokenizer names {size} entries") from None

    def finished(self) -> list[PairWriter]:
        """The pairs to publish, partitions put together in Megatron-LM's order."""
        for target, parts in zip(self.targets, self.parts, strict=True):
            concatenate(parts, target)
            for part in parts:
                part.discard()
        return self.targets

    def close(self) -> None:
        """Remove what is still temporary; harmless after success."""
        self.progress.stop()
        for pair in [*self.targets, *(part for parts in self.parts for part in parts)]:
            pair.discard()


def in_order[Done](chunks: Iterable[Chunk], workers: int, process: Callable[[Chunk], Done]) -> Iterator[Done]:
    """`process` of every chunk in worker processes: results in their order, only so many in memory at a time.

    Raises:
        UserError: a worker process died.
    """
    context = multiprocessing.get_context("fork")
    executor = ProcessPoolExecutor(
        workers, mp_context=context, initializer=work.start_process, initargs=(os.getpid(),)
    )
    waiting: deque[Future[Done]] = deque()
    try:
        executor.submit(int)  # forks all processes at once, before a reader starts a thread
        for chunk in chunks:
            waiting.append(executor.submit(process, chunk))
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

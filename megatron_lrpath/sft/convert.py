"""Chat lines to two parallel indexed datasets, tokens and a mask of the answers; bad lines are listed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_lrpath.data.preprocess.pipeline import Interruption, Progress, in_order
from megatron_lrpath.data.preprocess.readers import Chunk, expand_inputs, read_chunks, total_bytes
from megatron_lrpath.data.preprocess.worker import RejectLog
from megatron_lrpath.data.preprocess.writer import PairWriter, optimal_dtype, publish_all, remove_left_overs
from megatron_lrpath.errors import UserError
from megatron_lrpath.plan.sft import Sft
from megatron_lrpath.sft.encode import ChatEncoder, Example
from megatron_lrpath.sft.prepared import ANSWERS, TOKENS
from megatron_lrpath.sft.template import RejectedLineError, messages_of


@dataclass
class Encoded:
    """What became of a chunk: its examples, and the rejected lines with their reasons."""

    name: str
    position: int
    text_bytes: int = 0
    examples: list[Example] = field(default_factory=list)
    rejects: list[tuple[int, str]] = field(default_factory=list)


@dataclass
class Part:
    """A finished pair of datasets."""

    examples: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    text_bytes: int = 0
    rejected: int = 0


_task: tuple[ChatEncoder, int, str] | None = None  # encoder, seq_length, too_long; inherited by the workers


def convert(
    patterns: Sequence[str],
    prefix: Path,
    encoder: ChatEncoder,
    sft: Sft,
    workers: int,
    interruption: Interruption,
) -> Part:
    """One part: `PREFIX_tokens` and `PREFIX_answers`, parallel indexed datasets, and `PREFIX.rejects`."""
    global _task
    names = expand_inputs(patterns)
    refuse_parquet(names)
    _task = (encoder, sft.batch.seq_length, sft.too_long)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are processes already
    outputs = [f"{prefix}_{kind}" for kind in (TOKENS, ANSWERS)]
    part = Part()
    with closing(RejectLog(Path(f"{prefix}.rejects"), sft.max_rejects, "sft.max_rejects")) as rejects:
        remove_left_overs(outputs)
        dtype = optimal_dtype(encoder.vocab_size + len(encoder.added))
        writers = [PairWriter(outputs[0], dtype), PairWriter(outputs[1], np.dtype(np.uint8))]
        progress = Progress(total_bytes(names), 1000)
        try:
            for result in in_order(read_chunks(names, ()), workers, encode_chunk):
                append(writers, result.examples, part)
                part.text_bytes += result.text_bytes
                for line, reason in result.rejects:
                    rejects.add(result.name, line, reason)
                progress.update(result.position, part.examples, part.tokens)
                interruption.check()
            part.rejected = rejects.count
            rejects.publish()
            rejects.verdict(part.examples)
            if not part.examples:
                raise UserError(f"no usable examples in {', '.join(names)}; see {rejects.path}")
            publish_all(writers, prefix.parent / f".{prefix.name}.publishing")
        finally:
            progress.stop()
            for writer in writers:
                writer.discard()
    progress.finish(part.examples, part.tokens, part.text_bytes, part.rejected)
    return part


def append(writers: Sequence[PairWriter], examples: Sequence[Example], part: Part) -> None:
    """Write examples to both datasets and count them."""
    if not examples:
        return
    lengths = np.array([len(example.tokens) for example in examples], dtype=np.int32)
    ones = np.ones(len(examples), dtype=np.int32)
    tokens = np.concatenate([example.tokens for example in examples])
    answers = np.concatenate([example.answers for example in examples])
    writers[0].append(tokens, lengths, ones)
    writers[1].append(answers, lengths, ones)
    part.examples += len(examples)
    part.tokens += len(tokens)
    part.answer_tokens += int(answers.sum(dtype=np.int64))


def encode_chunk(chunk: Chunk) -> Encoded:
    """The examples of a chunk of lines."""
    assert _task is not None
    encoder, seq_length, too_long = _task
    result = Encoded(chunk.name, chunk.position, len(chunk.lines))
    lines = chunk.lines.split(b"\n")
    for number, line in enumerate(lines[: chunk.count], start=chunk.first):
        try:
            if not line.strip():
                raise RejectedLineError("a blank line")
            result.examples.append(fitted(encoder.encode(messages_of(line)), seq_length, too_long))
        except RejectedLineError as reason:
            result.rejects.append((number, str(reason)))
    return result


def fitted(example: Example, seq_length: int, too_long: str) -> Example:
    """The example, cut where it is longer than a sample and may be cut.

    A sample of n positions holds n+1 tokens: the last one is only predicted.

    Raises:
        RejectedLineError: it is too long, or nothing of an answer is left.
    """
    if len(example.tokens) > seq_length + 1:
        if too_long == "reject":
            raise RejectedLineError(
                f"has {len(example.tokens):,} tokens, a sample holds {seq_length + 1:,} (too_long: cut takes the first)"
            )
        example = Example(example.tokens[: seq_length + 1], example.answers[: seq_length + 1])
    if not example.answers[1:].any():
        raise RejectedLineError("no token of an answer is left within a sample")
    return example


def refuse_parquet(names: Sequence[str]) -> None:
    """Stop at input that is no text."""
    for name in names:
        with open(name, "rb") as stream:
            if stream.read(4) == b"PAR1":
                raise UserError(
                    f"{name}: is Parquet; fine-tuning reads JSON lines (plain, gzip or zstandard)"
                )

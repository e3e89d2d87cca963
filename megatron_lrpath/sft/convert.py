"""Chat lines to two parallel indexed datasets, tokens and a mask of the answers; bad lines are listed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from megatron_lrpath.data.preprocess.pipeline import Conversion, ConversionProgress, Interruption
from megatron_lrpath.data.preprocess.readers import PARQUET_MAGIC, Chunk, expand_inputs, total_bytes
from megatron_lrpath.data.preprocess.worker import ChunkResult, Figures, Packed, Rejected
from megatron_lrpath.data.preprocess.writer import RejectLog, optimal_dtype, publish_all, remove_left_overs
from megatron_lrpath.errors import UserError
from megatron_lrpath.plan.sft import Sft
from megatron_lrpath.sft.encode import ChatEncoder, Example
from megatron_lrpath.sft.prepared import ANSWERS, TOKENS
from megatron_lrpath.sft.template import messages_of


def convert(
    patterns: Sequence[str],
    prefix: Path,
    encoder: ChatEncoder,
    sft: Sft,
    workers: int,
    interruption: Interruption,
) -> Figures:
    """One part: `PREFIX_tokens` and `PREFIX_answers`, parallel indexed datasets, and `PREFIX.rejects`."""
    names = expand_inputs(patterns)
    refuse_parquet(names)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are processes already
    vocab_size = encoder.vocab_size + len(encoder.added)
    outputs = {
        f"{prefix}_{TOKENS}": optimal_dtype(vocab_size),
        f"{prefix}_{ANSWERS}": np.dtype(np.uint8),
    }
    with closing(RejectLog(Path(f"{prefix}.rejects"), sft.max_rejects, "sft.max_rejects")) as rejects:
        remove_left_overs(list(outputs))
        progress = ConversionProgress(total_bytes(names), 1000)
        with closing(Conversion(vocab_size, 1, rejects, progress)) as conversion:
            conversion.open(list(outputs.items()))
            process = partial(encode_chunk, encoder, sft)
            figures = conversion.carry_out(names, (), workers, process, interruption)
            publish_all(conversion.finished(), prefix.parent / f".{prefix.name}.publishing")
    progress.finish(figures)
    return figures


def encode_chunk(encoder: ChatEncoder, sft: Sft, chunk: Chunk) -> ChunkResult:
    """The examples of a chunk of lines."""
    result = ChunkResult(chunk.name, chunk.position)
    examples: list[Example] = []
    for number, line in enumerate(chunk.lines.split(b"\n")[: chunk.count], start=chunk.first):
        try:
            if not line.strip():
                raise Rejected("a blank line")
            examples.append(fitted(encoder.encode(messages_of(line)), sft.batch.seq_length, sft.too_long))
        except Rejected as reason:
            result.rejects.append((number, str(reason)))
    tokens = np.concatenate([np.empty(0, np.int32), *(example.tokens for example in examples)])
    answers = np.concatenate([np.empty(0, np.uint8), *(example.answers for example in examples)])
    lengths = np.array([len(example.tokens) for example in examples], dtype=np.int32)
    counts = np.ones(len(examples), dtype=np.int32)
    result.packed = [[Packed(tokens, lengths, counts)], [Packed(answers, lengths, counts)]]
    learned = int(answers.sum(dtype=np.int64))
    result.figures = Figures(len(examples), len(tokens), learned, len(chunk.lines), len(result.rejects))
    return result


def fitted(example: Example, seq_length: int, too_long: str) -> Example:
    """The example, cut where it is longer than a sample and may be cut.

    A sample of n positions holds n+1 tokens: the last one is only predicted.

    Raises:
        Rejected: it is too long, or nothing of an answer is left.
    """
    if len(example.tokens) > seq_length + 1:
        if too_long == "reject":
            raise Rejected(
                f"has {len(example.tokens):,} tokens, a sample holds {seq_length + 1:,} (too_long: cut takes the first)"
            )
        example = Example(example.tokens[: seq_length + 1], example.answers[: seq_length + 1])
    if not example.answers[1:].any():
        raise Rejected("no token of an answer is left within a sample")
    return example


def refuse_parquet(names: Sequence[str]) -> None:
    """Stop at input that is no text."""
    for name in names:
        with open(name, "rb") as stream:
            if stream.read(4) == PARQUET_MAGIC:
                raise UserError(
                    f"{name}: is Parquet; fine-tuning reads JSON lines (plain, gzip or zstandard)"
                )

"""Chat data to indexed datasets, once: tokens and a mask of the answers side by side, and `prepared.json`."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lrpath.data.preprocess.interrupt import Interruption
from megatron_lrpath.data.preprocess.pipeline import in_order
from megatron_lrpath.data.preprocess.progress import Progress
from megatron_lrpath.data.preprocess.readers import Chunk, expand_inputs, read_chunks, total_bytes
from megatron_lrpath.data.preprocess.rejects import RejectLog
from megatron_lrpath.data.preprocess.writer import PairWriter, optimal_dtype, publish_all, remove_left_overs
from megatron_lrpath.data.slice_source import fingerprint_source, open_source
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_write_json
from megatron_lrpath.locks import FolderLock, LockHeldError
from megatron_lrpath.plan import Plan
from megatron_lrpath.plan.sft import PREPARED, Sft, prepared_record, sft_folder
from megatron_lrpath.sft.encode import ChatEncoder, Example, build_encoder
from megatron_lrpath.sft.packing import held_out, pack
from megatron_lrpath.sft.records import RejectedLineError, messages_of

FORMAT = 1
TRAIN, VALID = "train", "valid"
TOKENS, ANSWERS = "tokens", "answers"
SAMPLED_BYTES, SAMPLES = 64 * 1024, 64


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


def prepare(plan: Plan, workers: int = 1) -> dict[str, Any]:
    """Prepare the plan's chat data where that is not done; what `prepared.json` says.

    Raises:
        UserError: data, tokenizer or template cannot be used, too many lines were rejected, or the data have
            changed under fine-tunings that were begun with them.
    """
    sft = plan.sft
    if sft is None:
        raise UserError(f"{plan.path}: has no section `sft`; docs/sft.md shows one")
    folder = sft_folder(plan)
    encoder = build_encoder(plan)
    wanted = settings(plan, sft, encoder)
    found = prepared_record(plan)
    changed = None if found is None else difference(found, wanted, sft)
    if found is not None and changed is None:
        return found
    if changed and (begun := begun_runs(plan)):
        raise UserError(
            f"{folder / PREPARED}: {changed} since {begun[0]} was begun with these data. Bring the old ones back, "
            "or give the plan another `output`."
        )
    try:
        lock = FolderLock.acquire(folder)
    except LockHeldError as owner:
        raise UserError(f"{folder}: {owner} is preparing the data there now") from None
    with closing(lock), Interruption() as interruption:
        return build(plan, sft, encoder, wanted, workers, interruption)


def build(
    plan: Plan,
    sft: Sft,
    encoder: ChatEncoder,
    wanted: dict[str, Any],
    workers: int,
    interruption: Interruption,
) -> dict[str, Any]:
    """Tokenize, publish, and write the record last."""
    folder = sft_folder(plan)
    (folder / PREPARED).unlink(missing_ok=True)
    record: dict[str, Any] = {"format": FORMAT, "settings": wanted, "inputs": input_prints(sft)}
    for name, patterns in inputs(sft).items():
        part = convert(patterns, folder / name, encoder, sft, workers, interruption)
        record[name] = vars(part) | {"fingerprints": fingerprints(folder / name)}
    record |= {
        "control_tokens": encoder.added,
        "chat_template": encoder.template.source,
        "stop_token": encoder.stop_token(),
    }
    count_samples(record, folder, sft)
    atomic_write_json(folder / PREPARED, record)
    return record


def inputs(sft: Sft) -> dict[str, tuple[str, ...]]:
    """The files' patterns by the part that they make."""
    parts = {TRAIN: sft.data}
    return parts | ({VALID: sft.valid} if isinstance(sft.valid, tuple) else {})


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


def settings(plan: Plan, sft: Sft, encoder: ChatEncoder) -> dict[str, Any]:
    """What the prepared data depend on, beside the input files."""
    model = Path(plan.tokenizer.model or "")
    files = [model] if model.is_file() else sorted(model.glob("*.json")) if model.is_dir() else []
    return {
        "tokenizer": [hashlib.sha256(path.read_bytes()).hexdigest() for path in files],
        "chat_template": hashlib.sha256(encoder.template.source.encode()).hexdigest(),
        "control_tokens": encoder.added,
        "seq_length": sft.batch.seq_length,
        "too_long": sft.too_long,
        "valid": sft.valid if isinstance(sft.valid, float) else list(sft.valid or ()),
        "data": list(sft.data),
        "seed": sft.seed,
    }


def difference(found: dict[str, Any], wanted: dict[str, Any], sft: Sft) -> str | None:
    """What has changed since the data were prepared, in words; files that are gone are not missed."""
    if found.get("format") != FORMAT:
        return "the form of prepared data has changed"
    old = found.get("settings", {})
    names = [name for name in wanted if old.get(name) != wanted[name]]
    if names:
        return f"{', '.join(names)} changed"
    try:
        same = found.get("inputs") == input_prints(sft)
    except UserError:
        return None
    return None if same else "the content of the data files changed"


def input_prints(sft: Sft) -> dict[str, str]:
    """A digest of every input file: its size and 64 blocks of 64 KiB spread over it."""
    names = [name for patterns in inputs(sft).values() for name in expand_inputs(patterns)]
    found = {}
    for name in names:
        digest = hashlib.sha256()
        with open(name, "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            digest.update(f"{size}\n".encode())
            for number in range(SAMPLES):
                stream.seek(max(size - SAMPLED_BYTES, 0) * number // (SAMPLES - 1))
                digest.update(stream.read(SAMPLED_BYTES))
        found[name] = digest.hexdigest()
    return found


def fingerprints(prefix: Path) -> list[str]:
    """The fingerprints of a part's two datasets."""
    return [fingerprint_source(f"{prefix}_{kind}") for kind in (TOKENS, ANSWERS)]


def count_samples(record: dict[str, Any], folder: Path, sft: Sft) -> None:
    """Add how many packed samples an epoch and the validation set have."""
    lengths = open_source(folder / f"{TRAIN}_{TOKENS}").lengths - 1
    if isinstance(sft.valid, float):
        if len(lengths) < 2:
            raise UserError(f"{sft.place}.valid: a share needs at least two examples, there is one")
        train, valid = held_out(len(lengths), sft.valid, sft.seed)
        record[VALID] = {"examples": len(valid), "samples": len(pack(lengths[valid], sft.batch.seq_length))}
        lengths = lengths[train]
    elif VALID in record:
        other = open_source(folder / f"{VALID}_{TOKENS}").lengths - 1
        record[VALID]["samples"] = len(pack(other, sft.batch.seq_length))
    samples = pack(lengths, sft.batch.seq_length)
    record[TRAIN]["samples"] = len(samples)
    record[TRAIN]["filled"] = float(lengths.sum(dtype=np.int64)) / (len(samples) * sft.batch.seq_length)


def begun_runs(plan: Plan) -> list[Path]:
    """The folders of fine-tunings that were begun."""
    found = Path(plan.output).glob("*/sft-*/lineage.json")
    return sorted(path.parent for path in found)


def tell(record: dict[str, Any], folder: Path) -> None:
    """The prepared data in a line."""
    train = record[TRAIN]
    valid = f", {record[VALID]['samples']:,} for validation" if VALID in record else ""
    print(
        f"{folder}: {train['examples']:,} examples, {train['tokens']:,} tokens "
        f"({train['answer_tokens']:,} in answers), "
        f"{train['samples']:,} packed samples an epoch, {train['filled']:.1%} filled{valid}",
        file=sys.stderr,
    )

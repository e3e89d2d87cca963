"""Convert chat data once to parallel indexed datasets, tokens and a mask of the answers, with a record."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lrpath.data.content_sums import KEY, content_sums
from megatron_lrpath.data.indexed import document_lengths, fingerprint_source, spread_blocks
from megatron_lrpath.data.preprocess.pipeline import Conversion, ConversionProgress, Interruption
from megatron_lrpath.data.preprocess.readers import PARQUET_MAGIC, Chunk, expand_inputs, total_bytes
from megatron_lrpath.data.preprocess.worker import ChunkResult, Figures, Packed, Rejected
from megatron_lrpath.data.preprocess.writer import RejectLog, optimal_dtype
from megatron_lrpath.data.record import inputs_of, prepared_difference, write_record
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import named_twice, sync_folder
from megatron_lrpath.locks import FolderLock, LockHeldError
from megatron_lrpath.plan import Plan
from megatron_lrpath.plan.sft import PREPARED, Sft
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.sealed import write_sealed
from megatron_lrpath.sft.encode import ChatEncoder, Example, build_encoder
from megatron_lrpath.sft.prepared import ANSWERS, DATA, TOKENS, TRAIN, VALID, data_folder, held_out, pack
from megatron_lrpath.sft.template import FORMS, messages_of
from megatron_lrpath.tokenizers.prints import TokenizerSpec

FORMAT = 1
STAGING = ".partial"  # folder in which the data are made; used by the holder of the lock of its parent

NONE_USABLE = f"A line must be a JSON object with {FORMS}; `lrpath docs sft` describes them and the limits"


def prepare(plan: Plan, workers: int = 1) -> dict[str, Any]:
    """Prepare the plan's chat data unless that is done; return the content of `prepared.json`.

    Raises:
        UserError: data, tokenizer or template cannot be used, too many lines were rejected, or the data have
            changed under fine-tunings that were begun with them.
    """
    sft = plan.sft
    if sft is None:
        raise UserError(f"{plan.path}: has no section `sft`; see docs/sft.md")
    folder = plan.sft_folder
    encoder = build_encoder(plan)
    wanted = settings(plan, sft, encoder)
    found = plan.prepared_record()
    record = copy.deepcopy(found)
    if record is not None and resaved(plan, record):
        record["settings"]["tokenizer"] = wanted["tokenizer"]
    changed = None if record is None else difference(record, wanted, sft)
    if record is not None and changed is None:
        if unused(folder, record):
            with suppress(LockHeldError), closing(FolderLock.acquire(folder)):
                remove_unused(folder, record)
        return record
    fine_tunings = sorted(Path(plan.output).glob("*/sft-*")) if changed else []
    if begun := [path for path in fine_tunings if RunFolder(path).lineage.exists()]:
        raise UserError(
            f"{folder / PREPARED}: {changed} since {begun[0]} was begun with these data. Restore the old "
            "data, or set another `output` in the plan."
        )
    try:
        lock = FolderLock.acquire(folder)
    except LockHeldError as owner:
        raise UserError(f"{folder}: {owner} is preparing the data there now") from None
    with closing(lock), Interruption() as interruption:
        if plan.prepared_record() == found:
            staging = folder / STAGING
            shutil.rmtree(staging, ignore_errors=True)  # of a killed process
            staging.mkdir()
            try:
                made = build(plan, sft, encoder, wanted, workers, interruption, staging)
                return publish(staging, folder, made, record)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    return prepare(plan, workers)  # another process has prepared the data in the meantime


def build(
    plan: Plan,
    sft: Sft,
    encoder: ChatEncoder,
    wanted: dict[str, Any],
    workers: int,
    interruption: Interruption,
    folder: Path,
) -> dict[str, Any]:
    """Tokenize the data into `folder`; return the record."""
    record: dict[str, Any] = {"format": FORMAT, "settings": wanted, "inputs": input_prints(sft)}
    record["tokenizer"] = facts = TokenizerSpec.of_plan(plan).facts
    for name, files in inputs(sft).items():
        rejects = RejectLog(
            plan.sft_folder / f"{name}.rejects", sft.max_rejects, NONE_USABLE, "sft.max_rejects"
        )
        with closing(rejects):
            figures = convert(files, folder / name, encoder, sft, workers, interruption, rejects)
        details = {"control_tokens": encoder.added, "inputs": inputs_of(files)}
        write_record(f"{folder / name}_{TOKENS}", "lrpath sft", facts, details)
        record[name] = {
            "examples": figures.documents,
            "tokens": figures.tokens,
            "answer_tokens": figures.answer_tokens,
            "text_bytes": figures.text_bytes,
            "rejected": figures.rejected,
            "fingerprints": [fingerprint_source(f"{folder / name}_{kind}") for kind in (TOKENS, ANSWERS)],
            KEY: {kind: content_sums(Path(f"{folder / name}_{kind}.bin")) for kind in (TOKENS, ANSWERS)},
        }
    record |= {
        "control_tokens": encoder.added,
        "chat_template": encoder.template.source,
        "stop_token": encoder.stop_token(),
    }
    count_samples(record, folder, sft)
    return record


def publish(
    staging: Path, folder: Path, record: dict[str, Any], old: dict[str, Any] | None
) -> dict[str, Any]:
    """Replace the old data by the new by one rename, that of the record, which names their folder.

    Args:
        staging: the folder with the new data.
        folder: the folder of the record.
        record: the record of the new data.
        old: the record of the current data.

    Returns:
        The record as written.
    """
    remove_unused(folder, old)
    numbers = [int(match[1]) for path in folder.iterdir() if (match := DATA.fullmatch(path.name))]
    record = record | {"folder": f"data-{max(numbers, default=0) + 1}"}
    sync_folder(staging)
    staging.rename(folder / record["folder"])
    sync_folder(folder)
    write_sealed(folder / PREPARED, record)
    remove_unused(folder, record)
    return record


def unused(folder: Path, record: dict[str, Any] | None) -> list[Path]:
    """Return data in `folder` that its record does not describe: older data, leftovers of a killed call."""
    used = None if record is None else data_folder(folder, record)
    sets = [path for path in folder.iterdir() if DATA.fullmatch(path.name)]
    flat = [
        path
        for part in (TRAIN, VALID)
        for kind in (TOKENS, ANSWERS)
        for path in folder.glob(f"{part}_{kind}.*")
    ]
    return [path for path in sets if path != used] + ([] if used == folder else flat)


def remove_unused(folder: Path, record: dict[str, Any] | None) -> None:
    """Remove `unused` data. Only the holder of the folder's lock may call it."""
    for path in unused(folder, record):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def convert(
    names: Sequence[str],
    prefix: Path,
    encoder: ChatEncoder,
    sft: Sft,
    workers: int,
    interruption: Interruption,
    rejects: RejectLog,
) -> Figures:
    """Convert one part to `PREFIX_tokens` and `PREFIX_answers`, parallel indexed datasets; return figures."""
    for name in names:
        with open(name, "rb") as stream:
            if stream.read(4) == PARQUET_MAGIC:
                raise UserError(
                    f"{name}: is Parquet; fine-tuning reads JSON lines (plain, gzip or zstandard)"
                )
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are processes already
    vocab_size = encoder.vocab_size + len(encoder.added)
    outputs = {
        f"{prefix}_{TOKENS}": optimal_dtype(vocab_size),
        f"{prefix}_{ANSWERS}": np.dtype(np.uint8),
    }
    progress = ConversionProgress(total_bytes(names), 1000)
    process = partial(encode_chunk, encoder, sft)
    marker = prefix.parent / f".{prefix.name}.publishing"
    conversion = Conversion(vocab_size, 1, rejects, progress)
    return conversion.run(outputs, names, (), workers, process, interruption, marker)


def encode_chunk(encoder: ChatEncoder, sft: Sft, chunk: Chunk) -> ChunkResult:
    """Return the examples of a chunk of lines, packed, with their figures and rejects."""
    result = ChunkResult(chunk.name, chunk.position)
    examples: list[Example] = []
    blank = 0
    for number, line in enumerate(chunk.lines.split(b"\n")[: chunk.count], start=chunk.first):
        if not line.strip():
            blank += 1
            continue
        try:
            examples.append(fitted(encoder.encode(messages_of(line)), sft.batch.seq_length, sft.too_long))
        except Rejected as reason:
            result.rejects.append((number, str(reason)))
    tokens = np.concatenate([np.empty(0, np.int32), *(example.tokens for example in examples)])
    answers = np.concatenate([np.empty(0, np.uint8), *(example.answers for example in examples)])
    lengths = np.array([len(example.tokens) for example in examples], dtype=np.int32)
    counts = np.ones(len(examples), dtype=np.int32)
    result.packed = [[Packed(tokens, lengths, counts)], [Packed(answers, lengths, counts)]]
    learned = int(answers.sum(dtype=np.int64))
    result.figures = Figures(
        len(examples), len(tokens), learned, len(chunk.lines), len(result.rejects), blank
    )
    return result


def fitted(example: Example, seq_length: int, too_long: str) -> Example:
    """Return the example, truncated if it is longer than a sample and may be truncated.

    A sample of n positions has n+1 tokens: the last one is only predicted.

    Raises:
        Rejected: it is too long, or has no answer's token left.
    """
    if len(example.tokens) > seq_length + 1:
        if too_long == "reject":
            raise Rejected(
                f"has {len(example.tokens):,} tokens, a sample holds {seq_length + 1:,} (too_long: cut takes "
                "the first)"
            )
        example = Example(example.tokens[: seq_length + 1], example.answers[: seq_length + 1])
    if not example.answers[1:].any():
        raise Rejected("no token of an answer fits in a sample")
    return example


def inputs(sft: Sft) -> dict[str, list[str]]:
    """Return the files by the part that they make.

    Raises:
        UserError: a name matches no file, or a file is named twice, also as data to learn from and as held out.
    """
    parts = {TRAIN: expand_inputs(sft.data, f"{sft.place}.data")}
    if isinstance(sft.valid, tuple):
        parts[VALID] = expand_inputs(sft.valid, f"{sft.place}.valid")
        if twice := named_twice([*parts[TRAIN], *parts[VALID]]):
            raise UserError(
                f"{sft.place}.valid: {twice[1]} is in `data` as well, so the model learns what it is evaluated on; "
                "name other files, or give a share of the examples that is held out, like 0.01"
            )
    return parts


def settings(plan: Plan, sft: Sft, encoder: ChatEncoder) -> dict[str, Any]:
    """Return everything that the prepared data depend on, except the input files."""
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


def resaved(plan: Plan, record: dict[str, Any]) -> bool:
    """Return whether the data were prepared with the plan's tokenizer, even if its files were saved again since."""
    return bool(record.get("tokenizer")) and prepared_difference(plan, record) is None


def difference(record: dict[str, Any], wanted: dict[str, Any], sft: Sft) -> str | None:
    """Return what has changed since the data were prepared, for a message; missing files do not count."""
    if record.get("format") != FORMAT:
        return "the format of prepared data has changed"
    old = record.get("settings", {})
    names = [name for name in wanted if old.get(name) != wanted[name]]
    if names:
        return f"{', '.join(names)} changed"
    try:
        same = record.get("inputs") == input_prints(sft)
    except UserError:
        return None
    return None if same else "the content of the data files changed"


def input_prints(sft: Sft) -> dict[str, str]:
    """Return a digest of every input file: its size and 64 blocks of 64 KiB spread over it."""
    digests = {}
    for name in (name for names in inputs(sft).values() for name in names):
        with open(name, "rb") as stream:
            digest = hashlib.sha256(f"{os.fstat(stream.fileno()).st_size}\n".encode())
            for block in spread_blocks(stream, 64, 64 * 1024):
                digest.update(block)
        digests[name] = digest.hexdigest()
    return digests


def count_samples(record: dict[str, Any], folder: Path, sft: Sft) -> None:
    """Add the number of packed samples of an epoch and of the validation set to the record."""
    lengths = document_lengths(folder / f"{TRAIN}_{TOKENS}") - 1
    if isinstance(sft.valid, float):
        if len(lengths) < 2:
            raise UserError(f"{sft.place}.valid: a share needs at least two examples, there is one")
        train, valid = held_out(len(lengths), sft.valid, sft.seed)
        record[VALID] = {"examples": len(valid), "samples": len(pack(lengths[valid], sft.batch.seq_length))}
        lengths = lengths[train]
    elif VALID in record:
        other = document_lengths(folder / f"{VALID}_{TOKENS}") - 1
        record[VALID]["samples"] = len(pack(other, sft.batch.seq_length))
    samples = pack(lengths, sft.batch.seq_length)
    record[TRAIN]["samples"] = len(samples)
    record[TRAIN]["filled"] = float(lengths.sum()) / (len(samples) * sft.batch.seq_length)


def print_summary(record: dict[str, Any], folder: Path) -> None:
    """Print the prepared data's figures in a line."""
    train = record[TRAIN]
    valid = f", {record[VALID]['samples']:,} for validation" if VALID in record else ""
    print(
        f"{folder}: {train['examples']:,} examples, {train['tokens']:,} tokens "
        f"({train['answer_tokens']:,} in answers), "
        f"{train['samples']:,} packed samples an epoch, {train['filled']:.1%} filled{valid}",
        file=sys.stderr,
    )

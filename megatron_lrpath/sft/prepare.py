"""Chat data to indexed datasets, once: tokens and a mask of the answers side by side, and `prepared.json`."""

from __future__ import annotations

import hashlib
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from megatron_lrpath.data.preprocess.pipeline import Interruption
from megatron_lrpath.data.preprocess.readers import expand_inputs
from megatron_lrpath.data.slice_source import fingerprint_source, open_source
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_write_json
from megatron_lrpath.locks import FolderLock, LockHeldError
from megatron_lrpath.plan import Plan
from megatron_lrpath.plan.sft import PREPARED, Sft, prepared_record, sft_folder
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.sft.convert import convert
from megatron_lrpath.sft.encode import ChatEncoder, build_encoder
from megatron_lrpath.sft.prepared import ANSWERS, TOKENS, TRAIN, VALID, held_out, pack

FORMAT = 1
SAMPLED_BYTES, SAMPLES = 64 * 1024, 64


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
    record[TRAIN]["filled"] = float(lengths.sum()) / (len(samples) * sft.batch.seq_length)


def begun_runs(plan: Plan) -> list[Path]:
    """The folders of fine-tunings that were begun."""
    found = Path(plan.output).glob("*/sft-*")
    return sorted(folder for folder in found if RunFolder(folder).lineage.exists())


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

"""The prepared data of a plan's fine-tuning: `prepared.json`, compared with the plan and the files."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lrpath.data.content_sums import AT_A_START_IF_NEWER, KEY, check_form, sampled, wrong_blocks
from megatron_lrpath.data.draw_random import permutation
from megatron_lrpath.data.index_cache import Arrays, CacheEntry
from megatron_lrpath.data.indexed import fingerprint_source
from megatron_lrpath.data.record import prepared_difference
from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import Plan
from megatron_lrpath.plan.sft import PREPARED, Sft

FORMAT = 1  # part of every key: increase it when packing changes
Lengths = npt.NDArray[np.integer]


def pack(lengths: Lengths, capacity: int) -> list[list[int]]:
    """Put items of these lengths, each at most `capacity`, into as few bins as best-fit decreasing finds.

    The longest item is placed first, each in the fullest bin with room; items of equal length keep their
    order. The number of bins depends only on the lengths, not on their order.
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins by their remaining room
    rooms = 0  # bit r: some bin has room r
    for item in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        length = int(lengths[item])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        left = room - length
        with_room[left].append(chosen)
        rooms |= 1 << left
    return bins


def packed_entry(
    digest: str,
    examples: npt.NDArray[np.uint32],
    lengths: Lengths,
    capacity: int,
    epoch: tuple[int, int] | None = None,
) -> CacheEntry:
    """Return the cache entry of packed samples: `examples` in order, and `bounds` of the samples in them.

    Args:
        digest: of the prepared data and of the used part.
        examples: the numbers of the used examples.
        lengths: their lengths (positions).
        capacity: the positions of a sample.
        epoch: (seed, epoch), which determine the shuffle of examples and samples; None (validation) keeps
            their order.
    """

    def build() -> Arrays:
        order = (
            np.arange(len(examples)) if epoch is None else permutation(len(examples), "sft-examples", *epoch)
        )
        bins = pack(lengths[order], capacity)
        if epoch is not None:
            bins = [bins[number] for number in permutation(len(bins), "sft-samples", *epoch).tolist()]
        bounds = np.cumsum([0, *map(len, bins)], dtype=np.int64)
        return {"examples": examples[order[np.concatenate(bins)]], "bounds": bounds}

    key = ["sft-valid"] if epoch is None else ["sft"]
    return CacheEntry([*key, FORMAT, digest, capacity, *(epoch or ())], ("examples", "bounds"), build)


def held_out(examples: int, share: float, seed: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Return (for training, for validation) the examples' numbers; round(share · examples) are held out.

    At least one example is held out, and one is left for training.
    """
    count = min(max(1, round(share * examples)), examples - 1)
    order = permutation(examples, "sft-held-out", seed)
    return np.sort(order[count:]), np.sort(order[:count])


TRAIN, VALID, TOKENS, ANSWERS = "train", "valid", "tokens", "answers"
DATA = re.compile(r"data-([1-9]\d{0,8})")
"""A set of prepared data next to `prepared.json`, which names the valid set; earlier versions had no folder."""


def data_folder(folder: Path, record: dict[str, Any]) -> Path:
    """Return the folder of the data that a record describes; `folder` is the record's.

    Raises:
        UserError: the record names no such folder.
    """
    name = record.get("folder")
    if name is None:
        return folder
    if not isinstance(name, str) or not DATA.fullmatch(name):
        raise UserError(f"{folder / PREPARED}: is damaged (`folder`); remove it and prepare the data again.")
    return folder / name


@dataclass(frozen=True)
class Prepared:
    """The prepared data of a plan's fine-tuning, as `prepared.json` describes them.

    The prepared data of a plan's fine-tuning, as described in `prepared.json`.
        folder: of the record and the index cache.
        data: the folder of the datasets.
    """

    folder: Path
    data: Path
    sft: Sft
    record: dict[str, Any]

    @property
    def identity(self) -> dict[str, list[str]]:
        """The fingerprints of the datasets, by part."""
        parts = {name: self.record.get(name, {}) for name in (TRAIN, VALID)}
        return {name: part["fingerprints"] for name, part in parts.items() if "fingerprints" in part}

    @property
    def chat(self) -> dict[str, Any]:
        """The chat format: Jinja template, new control tokens with their ids, end token of an answer."""
        return {
            "template": str(self.record["chat_template"]),
            "control_tokens": dict(self.record["control_tokens"]),
            "stop_token": self.record["stop_token"],
        }

    def examples(self, part: str) -> tuple[Path, np.ndarray]:
        """Return the prefix of a part's datasets, and the numbers of its examples in them."""
        if isinstance(self.sft.valid, float):
            both = held_out(int(self.record[TRAIN]["examples"]), self.sft.valid, self.sft.seed)
            return self.data / TRAIN, both[part == VALID]
        return self.data / part, np.arange(int(self.record[part]["examples"]), dtype=np.uint32)

    def digest(self, part: str) -> str:
        """Return a digest that determines, with a seed, the samples made from a part."""
        return hashlib.sha256(repr((self.identity, part, self.sft.valid, self.sft.seed)).encode()).hexdigest()


def _wrong_content(prefix: str, recorded: Any, kind: str) -> bool:
    """Return whether 64 blocks (mostly of a MiB) of the data differ from their sums; False without sums."""
    if not isinstance(recorded, dict):
        return False
    path = Path(f"{prefix}.bin")
    try:
        sums = check_form(recorded.get(kind))
    except ValueError:
        return True
    return bool(wrong_blocks(path, sums, sampled(path, sums, AT_A_START_IF_NEWER)))


def open_prepared(plan: Plan, verify: bool) -> Prepared:
    """Return the plan's prepared data. `verify` (needed once per node): compare files and tokenizer.

    Raises:
        UserError: they are not prepared, have changed, or were prepared for another sequence length, seed,
            share of validation or tokenizer.
    """
    assert plan.sft is not None
    record, sft = plan.prepared_record(), plan.sft
    if record is None:
        raise UserError(f"{plan.sft_folder}: the data are not prepared yet: lrpath sft {plan.path} --prepare")
    held = sft.valid if isinstance(sft.valid, float) else list(sft.valid or ())
    now = {"seq_length": sft.batch.seq_length, "seed": sft.seed, "valid": held}
    wrong = [name for name, value in now.items() if record["settings"].get(name) != value]
    if wrong:
        raise UserError(
            f"{plan.sft_folder / PREPARED}: was prepared with another {', '.join(wrong)} than {sft.place} says: "
            f"lrpath sft {plan.path} --prepare"
        )
    if verify and (difference := prepared_difference(plan, record)):
        raise UserError(difference)
    prepared = Prepared(plan.sft_folder, data_folder(plan.sft_folder, record), sft, record)
    for name, prints in prepared.identity.items() if verify else ():
        for kind, wanted in zip((TOKENS, ANSWERS), prints, strict=True):
            prefix = f"{prepared.data / name}_{kind}"
            if fingerprint_source(prefix) != wanted or _wrong_content(prefix, record[name].get(KEY), kind):
                raise UserError(
                    f"{prefix}: is not what was prepared; remove {prepared.folder / PREPARED} "
                    "and prepare the data again"
                )
    return prepared

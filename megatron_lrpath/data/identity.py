"""Everything that a run's result depends on in addition to its plan: slices, the tokenizer file, prepared
chats, further arguments.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_lrpath.data.slice import Slice
from megatron_lrpath.plan import Plan, Run, run_identity


def training_identity(
    plan: Plan,
    run: Run,
    slices: Iterable[Slice],
    mix: Iterable[Slice] = (),
    chats: Any = None,
    arguments: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the whole identity of a run of a plan, JSON-serializable, which the lineage stores and later
    starts compare.

    Args:
        plan: the plan.
        run: the run in it.
        slices: the slices of the versions from the first to the run's own; a fine-tuning has none.
        mix: the slices that a branch reads in addition.
        chats: the identity of a fine-tuning's prepared data.
        arguments: Megatron's arguments that a result depends on, in addition to the plan's.
    """
    data: dict[str, Any] = {"slices": {one.name: one.fingerprint for one in slices}}
    if mixed := {one.name: one.fingerprint for one in mix}:
        data["mix_slices"] = mixed
    if chats is not None:
        data["sft_data"] = chats
    return run_identity(plan, run) | data | trainer_facts(plan, arguments)


def trainer_facts(plan: Plan, arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the part that each start determines: the current tokenizer file, and the arguments in addition
    to the plan's.
    """
    model = plan.tokenizer.model
    digest = file_digest(Path(model)) if model else None
    return {"tokenizer_model": digest, "arguments": dict(arguments or {})}


def file_digest(path: Path) -> str | None:
    """Return the SHA-256 of a file; None for a folder or a name that a tokenizer library resolves."""
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

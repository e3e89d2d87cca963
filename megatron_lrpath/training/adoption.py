"""Check that the checkpoint of another training fits a plan's main path: model, optimizer, tokenizer, rate.

Imports Megatron: activate the device first.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.training.arguments import parse_args

from megatron_lrpath.checkpoints.reader import load_common
from megatron_lrpath.errors import UserError
from megatron_lrpath.paradigms import MAIN, OURS
from megatron_lrpath.plan import Plan
from megatron_lrpath.runs.checkpoints import weights_folder
from megatron_lrpath.tokenizers.imported import found_again
from megatron_lrpath.tokenizers.prints import TokenizerSpec, family
from megatron_lrpath.training.checkpoints import parent as parents
from megatron_lrpath.training.options.arguments import arguments_provider
from megatron_lrpath.training.options.from_arguments import DATA, FILES, STABLE
from megatron_lrpath.training.options.from_plan import PlannedRun, apply_defaults

DERIVED = ("ffn_hidden_size", "kv_channels")  # Megatron's validation computes them if they are not given
TOKENIZER = ("tokenizer_type", "vocab_size")


@dataclass(frozen=True)
class Trained:
    """The samples, rate and settings of a checkpoint of another training.

    `samples` are those consumed, `rate` is that of the next step (None if the checkpoint does not record it). `notes`
    are settings in which the main path differs from it, and what could not be compared, a clause each.
    """

    samples: int
    rate: float | None
    notes: tuple[str, ...]


def main_arguments(path: Path) -> Any:
    """Return Megatron's arguments of the main path of the plan `path`, before their validation."""
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    planned = PlannedRun.read({"plan": path, "paradigm": OURS.name, "run": MAIN.prefix})
    sys.argv[1:] = planned.flags
    args = parse_args(arguments_provider())
    apply_defaults(args, planned.explicit)
    return args


def examine(plan: Plan, folder: Path, step: int) -> Trained:
    """Compare the checkpoint of `step` in `folder` (of that step alone) with the plan's main path.

    Raises:
        UserError: it is of another model, tokenizer or optimizer, or its content does not match its name.
    """
    common = load_common(folder)
    stored, args = parents.model_arguments(common, folder), main_arguments(plan.path)
    if common.get("iteration") != step:
        raise UserError(
            f"{folder}: holds step {common.get('iteration')}; give --step {common.get('iteration')}"
        )
    for name in DERIVED:
        if getattr(args, name, None) is None:
            setattr(args, name, getattr(stored, name, None))
    free = ("global_batch_size", *TOKENIZER, *(["vocab_size"] if args.vocab_size is None else []))
    tokenizer = TokenizerSpec.of_arguments(stored)
    wrong, notes = tokenizer_problems(tokenizer, TokenizerSpec.of_plan(plan))
    if wrong := parents.differences(stored, args, free) + wrong:
        raise UserError(
            f"{folder}: does not fit {plan.path}: {'; '.join(wrong)}. Give the plan the model, the tokenizer and the "
            "seq_length that the checkpoint was trained with."
        )
    parents.check_optimizer(args, stored, str(folder))
    samples = getattr(stored, "consumed_train_samples", 0)
    if not isinstance(samples, int) or samples < 1:
        raise UserError(f"{folder}: does not say how many samples it was trained on; it cannot be adopted")
    return Trained(samples, rate_of(common), (*notes, *other_settings(stored, args)))


def tokenizer_problems(theirs: TokenizerSpec, ours: TokenizerSpec) -> tuple[list[str], list[str]]:
    """Return why the plan's tokenizer `ours` is not the checkpoint's, and what was not compared, as clauses.

    Compare vocabularies and texts if the files of both exist, otherwise types and sizes.
    """
    if family(theirs.kind) != family(ours.kind):
        return [f"its tokenizer is {theirs.kind}, the plan's {ours.kind}"], []
    if theirs.is_null or theirs.is_missing:
        if theirs.vocab_size and ours.vocab_size and theirs.vocab_size != ours.vocab_size:
            return [f"its tokenizer has {theirs.vocab_size} tokens, the plan's {ours.vocab_size}"], []
        unseen = [] if theirs.is_null else [f"the tokenizer was not compared: {theirs.model} is not there"]
        return [], unseen
    difference = ours.difference(theirs.facts)
    return (
        [f"its tokenizer {theirs.model} is not the plan's {ours.model}: {difference}"] if difference else []
    ), []


def rate_of(common: Mapping[str, Any]) -> float | None:
    """Return the rate of the next step, from the optimizer's parameter groups."""
    groups = list(parameter_groups(common.get("optimizer")))
    chosen = [group for group in groups if group.get("default_config")] or groups
    rate = chosen[0].get("lr") if chosen else None
    return None if rate is None else float(rate)


def parameter_groups(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the parameter groups in an optimizer's state, at any depth."""
    if not isinstance(value, Mapping):
        return
    for name, inner in value.items():
        if name == "param_groups" and isinstance(inner, list):
            yield from (group for group in inner if isinstance(group, Mapping))
        else:
            yield from parameter_groups(inner)


def other_settings(stored: Any, args: Any) -> Iterator[str]:
    """Yield the settings of the training that differ, a clause each."""
    for name in sorted((STABLE - DATA - FILES - set(TOKENIZER)) | {"weight_decay", "global_batch_size"}):
        before, now = (copy.copy(getattr(one, name, None)) for one in (stored, args))
        if hasattr(stored, name) and before != now and name not in ("split", "dataloader_type", "optimizer"):
            yield f"differs: {name} was {before}, is {now}"


def examine_weights(plan: Plan, root: Path) -> list[str]:
    """Compare an imported model in `root` with the plan's model and tokenizer.

    Returns:
        The differences that are allowed, and what could not be compared, a clause each.

    Raises:
        UserError: there are other differences; the message lists them.
    """
    folder = weights_folder(root)
    stored, args = parents.stored_arguments(folder), main_arguments(plan.path)
    for name in DERIVED:
        if getattr(args, name, None) is None:
            setattr(args, name, getattr(stored, name, None))
    theirs, ours = TokenizerSpec.of_arguments(stored), TokenizerSpec.of_plan(plan)
    theirs = replace(theirs, model=found_again(theirs.model, root))
    wrong: list[str] = []
    if theirs.model is None:
        notes = [f"the tokenizer was not compared: {root} has none"]
    else:
        wrong, notes = tokenizer_problems(theirs, ours)
    rows = stored.padded_vocab_size
    if ours.size is not None and ours.size > rows:
        wrong.append(f"its embeddings have {rows:,} rows, the plan's tokenizer {ours.size:,} tokens")
    if wrong := parents.weights_differences(stored, args) + wrong:
        raise UserError(
            f"{folder}: does not fit {plan.path}: {'; '.join(wrong)}. Give the plan the lines of {root / 'plan.yaml'}."
        )
    trained = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    saved = str(stored.params_dtype).removeprefix("torch.")
    return (
        notes
        if saved == trained
        else [*notes, f"differs: the weights are stored in {saved}, trained in {trained}"]
    )

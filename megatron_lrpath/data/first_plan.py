"""A first plan for existing slices: its steps follow from their tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_lrpath.data.slice import VALIDATION, Slice, available_samples, is_validation
from megatron_lrpath.errors import UserError
from megatron_lrpath.models import RECIPES, parameter_count, resolve_model
from megatron_lrpath.models import ModelSpec as Spec
from megatron_lrpath.schedule.curves import tenth

TOKENS_A_PARAMETER = 20
"""Fewer tokens are too few for a model of that size (Hoffmann et al. 2022)."""
VOCABULARY = 32_000  # only for the choice of a recipe
FEWEST_STEPS = 50  # of a version; the batch is halved until the versions have as many
SMALL, LARGE = (16, 16, 128), (512, 4, 2048)
"""Samples of a step and of a micro batch, and tokens of a sample: of the quickstart, and of the paper."""
ALPHA = 0.6

TEMPLATE = """\
# Written by `lrpath init` from the slices in {slices}. Paths are relative to the folder in which
# commands are called.
name: {name}
seed: 1234                       # of the weights and of every shuffle
model: {model}{model_room}# a recipe: {recipes}
schedule: {{style: cosine, max_lr: {max_lr!r}, min_lr: {min_lr!r}, warmup_steps: {warmup}}}
alpha: {alpha}                       # the last {percent:.0f}% of a version's steps decay on a branch of their own
paradigms: [ours]                # add ptfs and cpt to train both others for a comparison
batch: {{global_batch_size: {batch}, micro_batch_size: {micro}, seq_length: {length}}}  # {step:,} tokens a step
tokenizer: {{type: {kind}, model: {tokenizer}}}
data: {{slices: {slices}, valid: {valid}}}{valid_note}
megatron:
  bf16: true
  save_interval: {interval}{interval_room}# steps between checkpoints: what a failed machine loses at most
  save_retain_interval: {retain}{retain_room}# checkpoints at multiples of this stay; of the others, the newest two
versions:                        # oldest first; `lrpath update` appends the next; steps: whole steps in its tokens
{versions}
output: runs/{name}
"""


def first_plan(slices: Sequence[Slice], folder: Path, tokenizer: str, recipe: str | None, name: str) -> str:
    """Return the text of the plan. `slices`: those in `folder`; `recipe` None: chosen by their tokens; `name`
    is replaced by "model" if a plan cannot have it.

    Raises:
        UserError: the slices contain no version, or one has too few tokens for a step.
    """
    versions = sorted(
        (one for one in slices if not is_validation(one.name)), key=lambda one: natural(one.name)
    )
    if not versions:
        raise UserError(f"{folder}: holds no slice of a version; draw some with tools/slice_versions.py")
    model = recipe or fitting(sum(one.tokens for one in versions))
    batch, micro, length = sizes(model, versions)
    steps = {one.name: available_samples(one, length) // batch for one in versions}
    if short := [name for name, count in steps.items() if count < 4]:
        raise UserError(
            f"{', '.join(short)}: too few tokens for steps of {batch} samples of {length:,} tokens; draw larger "
            "versions, or name a smaller --model"
        )
    first = steps[versions[0].name]
    interval = max(1, min(500, first // 4))
    retain = interval * (first // interval)  # Megatron accepts only a multiple
    sets = sorted((one.name for one in slices if is_validation(one.name)), key=natural)
    listed = [text(str(folder / name)) for name in sets] or [text(str(folder / VALIDATION))]
    return TEMPLATE.format(
        slices=text(str(folder)),
        name=name if re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]{0,60}", name) else "model",
        model=model,
        model_room=" " * (26 - len(model)),
        recipes=", ".join(RECIPES),
        max_lr=RECIPES[model].max_lr,
        min_lr=tenth(RECIPES[model].max_lr),
        warmup=min(2000, first // 5),
        alpha=ALPHA,
        percent=100 * ALPHA,
        batch=batch,
        micro=micro,
        length=length,
        step=batch * length,
        kind=tokenizer_type(tokenizer),
        tokenizer=text(tokenizer),
        valid=listed[0] if len(listed) == 1 else f"[{', '.join(listed)}]",
        valid_note="" if sets else "  # is not there yet: draw it with --valid-tokens",
        interval=interval,
        interval_room=" " * max(1, 16 - len(str(interval))),
        retain=retain,
        retain_room=" " * max(1, 9 - len(str(retain))),
        versions="\n".join(f"  - {{name: {text(name)}, steps: {count}}}" for name, count in steps.items()),
    )


def natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Return a sort key by which v10 follows v9, and the first validation set precedes those of versions."""
    return tuple((1, int(part)) if part.isdigit() else (0, part) for part in re.split(r"([0-9]+)", name))


def fitting(tokens: int) -> str:
    """Return the largest recipe for which the tokens suffice, or `tiny`."""
    counts = {
        name: parameter_count(resolve_model(Spec(name)), VOCABULARY)
        for name in RECIPES
        if name[0].isdigit()  # the paper's LLaMA models
    }
    fit = {name: count for name, count in counts.items() if TOKENS_A_PARAMETER * count <= tokens}
    return max(fit, key=lambda name: fit[name], default="tiny")


def sizes(model: str, versions: Sequence[Slice]) -> tuple[int, int, int]:
    """Return samples of a step and of a micro batch, and tokens of a sample; halved until every version has
    some steps.
    """
    batch, micro, length = SMALL if model == "tiny" else LARGE
    fewest = min(available_samples(one, length) for one in versions)
    while batch > 1 and fewest // batch < FEWEST_STEPS:
        batch //= 2
    return batch, min(micro, batch), length


def tokenizer_type(tokenizer: str) -> str:
    """Return Megatron's type for a SentencePiece file or a Hugging Face folder (or name)."""
    return "SentencePieceTokenizer" if tokenizer.endswith(".model") else "HuggingFaceTokenizer"


def text(value: str) -> str:
    """Return the text in YAML, quoted if necessary."""
    return value if re.fullmatch(r"[A-Za-z_/.][A-Za-z0-9_/.-]*[A-Za-z0-9]", value) else json.dumps(value)

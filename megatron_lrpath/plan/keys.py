"""The keys of a plan file as data: type, range, default and meaning, for the checks and the docs."""

from __future__ import annotations

from typing import Any

from megatron_lrpath.models import RECIPES
from megatron_lrpath.plan.key import (
    ALPHA,
    MIN_RATE,
    NAME,
    RATE,
    REQUIRED,
    SEED,
    SHARE,
    STEPS,
    TEXT,
    Key,
    choice,
    whole,
)
from megatron_lrpath.plan.sft_keys import SFT_KEYS
from megatron_lrpath.schedule import STYLES, WSD_DECAY_SHAPES

CPT_VARIANTS = ("reset-max", "rewarm-max", "keep-min")
RUN_KINDS_WITH_CYCLE = ("scratch", "continual", "branch")
TOKENIZERS = (
    "BertWordPieceLowerCase",
    "BertWordPieceCase",
    "GPT2BPETokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "HuggingFaceTokenizer",
    "Llama2Tokenizer",
    "TikTokenizer",
    "MultimodalTokenizer",
    "NullTokenizer",
    "NullMultimodalTokenizer",
    "SFTTokenizer",
)
CYCLE_LENGTH = {"anyOf": [STEPS, {"enum": ["inf"]}]}
CYCLE = {
    "anyOf": [
        *CYCLE_LENGTH["anyOf"],
        {
            "type": "object",
            "properties": dict.fromkeys(RUN_KINDS_WITH_CYCLE, CYCLE_LENGTH),
            "additionalProperties": False,
        },
    ]
}
_SCALAR = {"type": ["boolean", "number", "string"]}
ARGUMENTS = {
    "type": "object",
    "additionalProperties": {"anyOf": [_SCALAR, {"type": "array", "items": _SCALAR}]},
}
_RECIPE = choice(*RECIPES)
MODEL = {"anyOf": [_RECIPE, ARGUMENTS | {"properties": {"recipe": _RECIPE}}]}
MIX_KEYS = (
    Key(
        "slices",
        {"type": "object", "additionalProperties": SHARE},
        REQUIRED,
        "share of a branch's samples by slice: a name in the slices' folder, or a path, without `.slice`",
    ),
    Key("seed", SEED, None, "places the samples in the batches; default: the plan's seed"),
)

SCHEDULE_KEYS = (
    Key("style", choice(*STYLES), REQUIRED, "shape of the learning-rate schedule"),
    Key("max_lr", RATE, REQUIRED, "the maximum learning rate, the rate of the main path"),
    Key("min_lr", MIN_RATE, None, "where a decay ends; default: a tenth of max_lr"),
    Key("warmup_steps", whole(0, 10**9), 0, "steps of linear warm-up from 0 to max_lr"),
    Key(
        "cycle_steps",
        CYCLE,
        None,
        "length of the decay cycle in steps, counted from the start of a run with its warm-up; at least as "
        "long as the run; `inf`: never decays; a mapping gives it for `scratch`, `continual` or `branch` "
        "runs alone; default: the length of the run",
    ),
    Key(
        "knee_explore",
        {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
        0.5,
        "knee: share of the schedule after the warm-up that stays at max_lr",
    ),
    Key(
        "multi_step_fractions",
        {
            "type": "array",
            "items": {"type": "number", "minimum": 0, "maximum": 1},
            "minItems": 2,
            "maxItems": 2,
        },
        (0.8, 0.9),
        "multi-step: shares of the schedule after the warm-up at which the rate goes to √(max_lr·min_lr) "
        "and to min_lr",
    ),
    Key(
        "wsd_decay_fraction",
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        0.1,
        "wsd: the last share of the schedule after the warm-up, in which it decays",
    ),
    Key("wsd_decay_shape", choice(*WSD_DECAY_SHAPES), "linear", "wsd: how it decays there, and in a branch"),
)
BATCH_KEYS = (
    Key("global_batch_size", whole(1, 10**7), REQUIRED, "samples of a step, over all processes"),
    Key("micro_batch_size", whole(1, 10**7), REQUIRED, "samples that go through the model at once"),
    Key("seq_length", whole(1, 10**8), REQUIRED, "tokens of a sample"),
)
TOKENIZER_KEYS = (
    Key("type", choice(*TOKENIZERS), REQUIRED, "Megatron's --tokenizer-type"),
    Key("model", TEXT, None, "Megatron's --tokenizer-model: a file, a folder or a Hugging Face name"),
    Key("vocab_size", whole(1, 10**8), None, "tokens before padding; NullTokenizer needs it"),
)
DATA_KEYS = (
    Key("slices", TEXT, REQUIRED, "folder with one `<version>.slice` for each version"),
    Key("valid", TEXT, None, "the validation slice, without `.slice`; default: `valid` in that folder"),
)
VERSION_KEYS = (
    Key("name", NAME, REQUIRED, "letters, digits, `.`, `_` and `-`; runs and slices are named after it"),
    Key("steps", STEPS, REQUIRED, "T_i, the steps that its new data last"),
    Key("alpha", ALPHA, None, "alpha of this version alone"),
    Key("cycle_steps", CYCLE, None, "cycle_steps of this version's runs alone"),
    Key("branch_mix", {"type": "object"}, None, "branch_mix of this version's branch alone"),
)
PLAN_KEYS = (
    Key("name", NAME, REQUIRED, "name of the plan; jobs and the report are named after it"),
    Key("seed", SEED, 1234, "seed of the weights and of every shuffle"),
    Key("model", MODEL, REQUIRED, "a recipe, or Megatron's arguments, on top of `recipe:` if that is given"),
    Key("schedule", {"type": "object"}, REQUIRED, "learning-rate schedule, the same for all runs"),
    Key("alpha", ALPHA, 0.6, "share of a version's steps that its branch lasts: round(alpha · steps)"),
    Key("cpt_variant", choice(*CPT_VARIANTS), "reset-max", "how continual pre-training sets its rate"),
    Key("batch", {"type": "object"}, REQUIRED, "batch and sequence"),
    Key("tokenizer", {"type": "object"}, REQUIRED, "tokenizer"),
    Key("data", {"type": "object"}, REQUIRED, "version slices"),
    Key(
        "also_branch_at",
        {"type": "array", "items": STEPS, "minItems": 1, "maxItems": 10_000},
        (),
        "further steps at which the main path keeps a checkpoint, for branches of other plans off it; it "
        "goes on to the last of them",
    ),
    Key("versions", {"type": "array", "minItems": 1, "maxItems": 1000}, REQUIRED, "versions in order"),
    Key("branch_mix", {"type": "object"}, None, "other data in the branches, beside the main path's"),
    Key("sft", {"type": "object"}, None, "fine-tuning of the versions' models on chats or instructions"),
    Key("output", TEXT, None, "folder of all runs, `OUTPUT/<paradigm>/<run>`; default: `runs/NAME`"),
    Key(
        "megatron", ARGUMENTS, {}, "any other Megatron arguments, with `-` or `_`, without the dashes before"
    ),
)
SECTIONS = {
    "schedule": SCHEDULE_KEYS,
    "batch": BATCH_KEYS,
    "tokenizer": TOKENIZER_KEYS,
    "data": DATA_KEYS,
    "branch_mix": MIX_KEYS,
    "sft": SFT_KEYS,
}


def json_schema() -> dict[str, Any]:
    """The plan file's JSON schema (draft 2020-12), for editors; `load_plan` checks more, across keys."""
    properties = {}
    for key in PLAN_KEYS:
        schema = _section_schema(SECTIONS[key.name]) if key.name in SECTIONS else _key_schema(key)
        properties[key.name] = schema | {"description": key.about}
    version = _section_schema(VERSION_KEYS)
    version["properties"]["branch_mix"] |= _section_schema(MIX_KEYS)
    properties["versions"]["items"] = version
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Plan of version updates",
    } | _object_schema(PLAN_KEYS, properties)


def _section_schema(keys: tuple[Key, ...]) -> dict[str, Any]:
    return _object_schema(keys, {key.name: _key_schema(key) for key in keys})


def _object_schema(keys: tuple[Key, ...], properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [key.name for key in keys if key.required],
        "additionalProperties": False,
    }


def _key_schema(key: Key) -> dict[str, Any]:
    extra: dict[str, Any] = {"description": key.about}
    if not key.required and key.default is not None:
        extra["default"] = list(key.default) if isinstance(key.default, tuple) else key.default
    return key.schema | extra

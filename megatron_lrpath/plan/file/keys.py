"""The keys of a plan file as data: type, range, default and meaning, for the checks, the schema and the
documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_lrpath.models import RECIPES
from megatron_lrpath.paradigms import CPT_VARIANTS, CYCLE_KINDS, PARADIGMS, RESET_MAX
from megatron_lrpath.schedule.styles import KNOBS, STYLES

SAFE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
REQUIRED = object()


@dataclass(frozen=True)
class Key:
    """One key: `schema` is its JSON schema; `default` is its value when omitted, or REQUIRED."""

    name: str
    schema: dict[str, Any]
    default: Any
    about: str

    @property
    def required(self) -> bool:
        """Return whether a plan without this key is refused."""
        return self.default is REQUIRED


def whole(minimum: int, maximum: int) -> dict[str, Any]:
    """Return the schema of an integer from `minimum` to `maximum`."""
    return {"type": "integer", "minimum": minimum, "maximum": maximum}


def choice(*values: str) -> dict[str, Any]:
    """Return the schema of one of these texts."""
    return {"type": "string", "enum": list(values)}


TEXT = {"type": "string", "minLength": 1, "maxLength": 4096}
NAME = {"type": "string", "pattern": f"^{SAFE_NAME}$"}
ALPHA = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
LONG_ALPHA = {"type": "number", "exclusiveMinimum": 0, "maximum": 1000}
SHARE = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
SEED = whole(1, 2**31 - 1)
STEPS = whole(1, 10**9)
RATE = {"type": "number", "exclusiveMinimum": 0, "maximum": 1000}
MIN_RATE = {"type": "number", "minimum": 0, "maximum": 1000}
OBJECT = {"type": "object"}  # with its own keys, or a separate reader


TEMPLATES = ("plain", "chatml", "tokenizer")
_PATHS = {"anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 10_000}]}
_TEXTS = {"type": "array", "items": TEXT, "maxItems": 1000}

SFT_KEYS = (
    Key("data", _PATHS, REQUIRED, "JSON lines to learn from: a file, a pattern, or a list of them"),
    Key(
        "valid",
        {"anyOf": [SHARE, *_PATHS["anyOf"]]},
        None,
        "a share of the examples that is held out, or files of their own",
    ),
    Key("max_lr", RATE, REQUIRED, "the maximum learning rate"),
    Key("min_lr", MIN_RATE, None, "where the rate ends; default: a tenth of max_lr"),
    Key("style", {"type": "string"}, "cosine", "shape of the rate, one of the schedule's styles"),
    Key("warmup_steps", whole(0, 10**9), 0, "steps of linear warm-up from 0 to max_lr"),
    Key("epochs", whole(1, 10_000), None, "how often every example is seen; this or `steps`"),
    Key("steps", STEPS, None, "how many steps; this or `epochs`"),
    Key("global_batch_size", whole(1, 10**7), None, "packed samples of a step; default: the plan's"),
    Key("micro_batch_size", whole(1, 10**7), None, "packed samples at once; default: the plan's"),
    Key("seq_length", whole(2, 10**8), None, "positions of a packed sample; default: the plan's"),
    Key(
        "chat_template",
        TEXT,
        "plain",
        "`plain`, `chatml`, `tokenizer` (its own) or a file with a Jinja template",
    ),
    Key("special_tokens", _TEXTS, (), "control tokens that the template needs and the tokenizer lacks"),
    Key(
        "too_long",
        choice("reject", "cut"),
        "reject",
        "an example longer than a sample is rejected, or cut at its end",
    ),
    Key("max_rejects", whole(0, 10**12), 0, "how many unusable lines are accepted"),
    Key("versions", _TEXTS, None, "names of the versions that are fine-tuned; default: all"),
    Key("paradigms", _TEXTS, None, "the paradigms whose models are fine-tuned; default: all three"),
    Key("seed", SEED, None, "of the order, the packing and what is held out; default: the plan's"),
    Key("megatron", OBJECT, {}, "Megatron arguments of the fine-tuning alone, on top of the plan's"),
)


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
            "properties": dict.fromkeys(CYCLE_KINDS, CYCLE_LENGTH),
            "additionalProperties": False,
        },
    ]
}
RECIPE_NAME = choice(*RECIPES)
MIX_KEYS = (
    Key(
        "slices",
        {"type": "object", "additionalProperties": SHARE},
        REQUIRED,
        "share of a branch's samples by slice: a name in the slices' folder, or a path, without `.slice`",
    ),
    Key("seed", SEED, None, "places the samples in the batches; default: the plan's seed"),
)

FALLING_KEYS = (
    Key(
        "power",
        {"type": "number", "exclusiveMinimum": 0, "maximum": 10},
        REQUIRED,
        "the main path has max_lr · (from / step)^power",
    ),
    Key("from", STEPS, REQUIRED, "the step from which on it falls, at the earliest the warm-up's end"),
)

UNKNOWN = "unknown"
ADOPTED_KEYS = (
    Key(
        "checkpoint", TEXT, REQUIRED, "the folder of the checkpoint that was copied, or of the imported model"
    ),
    Key("step", whole(0, 10**9), REQUIRED, "its step, where the main path begins; 0: an imported model"),
    Key(
        "samples",
        whole(0, 10**15),
        REQUIRED,
        "the samples that had been consumed by then; 0: an imported model",
    ),
    Key("fingerprint", TEXT, REQUIRED, "of its files"),
    Key(
        "data",
        {"anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 1000}]},
        UNKNOWN,
        "names of the slices that it had read, or `unknown`",
    ),
)
SCHEDULE_KEYS = (
    Key("style", {"type": "string", "enum": STYLES}, REQUIRED, "shape of the learning-rate schedule"),
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
        "main",
        {
            "type": "object",
            "properties": {key.name: key.schema | {"description": key.about} for key in FALLING_KEYS},
            "required": [key.name for key in FALLING_KEYS],
            "additionalProperties": False,
        },
        None,
        "`{power: P, from: S}`: from step S on the main path's rate is max_lr · (S / step)^P; default: it stays at "
        "max_lr",
    ),
    *(Key(name, dict(knob.schema), knob.default, knob.about) for name, knob in KNOBS.items()),
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
    Key(
        "valid",
        {"anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 1000}]},
        None,
        "the validation slice, without `.slice`, or a list: the first, then one for a later delivery each; default: "
        "`valid` in that folder",
    ),
)
WEIGHT = whole(1, 1000)
REPLAY_KEYS = (
    Key("share", SHARE, REQUIRED, "share of the version's samples that is drawn again from earlier versions"),
    Key(
        "weights",
        {"type": "object", "additionalProperties": WEIGHT},
        None,
        "whole numbers by version: how often each is drawn; default: every earlier sample is equally likely",
    ),
)
VERSION_KEYS = (
    Key("name", NAME, REQUIRED, "letters, digits, `.`, `_` and `-`; runs and slices are named after it"),
    Key("steps", STEPS, REQUIRED, "T_i, the steps that its data last, replayed samples included"),
    Key(
        "alpha",
        LONG_ALPHA,
        None,
        "alpha of this version alone; above 1 (not of the first version) its branch begins before its data",
    ),
    Key("cycle_steps", CYCLE, None, "cycle_steps of this version's runs alone"),
    Key(
        "max_lr",
        RATE,
        None,
        "the rate to which the main path moves where this version begins; not of the first version; default: it stays",
    ),
    Key("rate_steps", whole(0, 10**9), None, "the steps over which it moves there; default: warmup_steps"),
    Key(
        "replay",
        {
            "anyOf": [
                SHARE,
                {
                    "type": "object",
                    "properties": {key.name: key.schema | {"description": key.about} for key in REPLAY_KEYS},
                    "required": [key.name for key in REPLAY_KEYS if key.required],
                    "additionalProperties": False,
                },
            ]
        },
        None,
        "share of its samples that is drawn again from earlier versions, or a mapping with `share` and `weights`; not "
        "of the first version",
    ),
    Key(
        "global_batch_size",
        whole(1, 10**7),
        None,
        "samples of a step from where this version begins, at least as many as before; not of the first version; "
        "default: as many as before",
    ),
    Key("branch_mix", OBJECT, None, "branch_mix of this version's branch alone"),
    Key(
        "branch_megatron",
        OBJECT,
        None,
        "branch_megatron of this version's branch alone, in place of the plan's",
    ),
)
PLAN_KEYS = (
    Key("name", NAME, REQUIRED, "name of the plan; jobs and the report are named after it"),
    Key("seed", SEED, 1234, "seed of the weights and of every shuffle"),
    Key("model", {}, REQUIRED, "a recipe, or Megatron's arguments, on top of `recipe:` if that is given"),
    Key("schedule", OBJECT, REQUIRED, "learning-rate schedule, the same for all runs"),
    Key("alpha", ALPHA, 0.6, "share of a version's steps that its branch lasts: round(alpha · steps)"),
    Key(
        "paradigms",
        {"type": "array", "items": choice(*PARADIGMS), "minItems": 1},
        None,
        "what run, submit, status, eval and report keep to: a list of ours, ptfs and cpt; default: ours, and what "
        "has been trained in the output already",
    ),
    Key("cpt_variant", choice(*CPT_VARIANTS), RESET_MAX.name, "how continual pre-training sets its rate"),
    Key("batch", OBJECT, REQUIRED, "batch and sequence"),
    Key("tokenizer", OBJECT, REQUIRED, "tokenizer"),
    Key("data", OBJECT, REQUIRED, "version slices"),
    Key(
        "also_branch_at",
        {"type": "array", "items": STEPS, "minItems": 1, "maxItems": 10_000},
        (),
        "further steps at which the main path keeps a checkpoint, for branches of other plans off it; it "
        "continues to the last of them",
    ),
    Key("versions", {"type": "array", "minItems": 1, "maxItems": 1000}, REQUIRED, "versions in order"),
    Key(
        "adopted",
        {
            "type": "object",
            "properties": {key.name: key.schema | {"description": key.about} for key in ADOPTED_KEYS},
            "required": [key.name for key in ADOPTED_KEYS if key.required],
            "additionalProperties": False,
        },
        None,
        "the checkpoint of another training, or the imported model, with which the main path begins; written by "
        "`lrpath adopt`",
    ),
    Key("branch_mix", OBJECT, None, "data that the branches read in addition to the main path's"),
    Key(
        "branch_megatron",
        OBJECT,
        {},
        "Megatron arguments of the branches alone, on top of `megatron`: those of the optimizer",
    ),
    Key("sft", OBJECT, None, "fine-tuning of the versions' models on chats or instructions"),
    Key(
        "license",
        TEXT,
        None,
        "license of the models, for the cards of their exports: `apache-2.0`, `mit`, `other` …",
    ),
    Key(
        "prompts",
        {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 100},
        None,
        "texts that the models continue in `lrpath eval`, for the report; default: beginnings of the validation text",
    ),
    Key(
        "archive",
        TEXT,
        None,
        "object store to which `lrpath archive` copies versions' ends and branch points: `s3://BUCKET/FOLDER`, "
        "or another URL of fsspec",
    ),
    Key("output", TEXT, None, "folder of all runs, `OUTPUT/<paradigm>/<run>`; default: `runs/NAME`"),
    Key("megatron", OBJECT, {}, "any other Megatron arguments, with `-` or `_`, without the dashes before"),
)
SECTIONS = {
    "schedule": SCHEDULE_KEYS,
    "batch": BATCH_KEYS,
    "tokenizer": TOKENIZER_KEYS,
    "data": DATA_KEYS,
    "branch_mix": MIX_KEYS,
    "sft": SFT_KEYS,
}

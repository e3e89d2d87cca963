"""The keys of a plan's `sft` section."""

from __future__ import annotations

from megatron_lrpath.plan.key import MIN_RATE, RATE, REQUIRED, SHARE, STEPS, TEXT, Key, choice, whole

TEMPLATES = ("plain", "chatml", "tokenizer")
TOO_LONG = ("reject", "cut")
_PATHS = {"anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 10_000}]}
_WORDS = {"type": "array", "items": TEXT, "maxItems": 1000}

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
    Key("special_tokens", _WORDS, (), "control tokens that the template needs and the tokenizer lacks"),
    Key(
        "too_long",
        choice(*TOO_LONG),
        "reject",
        "an example longer than a sample is rejected, or cut at its end",
    ),
    Key("max_rejects", whole(0, 10**12), 0, "how many unusable lines are accepted"),
    Key("versions", _WORDS, None, "names of the versions that are fine-tuned; default: all"),
    Key("paradigms", _WORDS, None, "of which paradigms; default: all three"),
    Key(
        "seed",
        whole(1, 2**31 - 1),
        None,
        "of the order, the packing and what is held out; default: the plan's",
    ),
    Key(
        "megatron",
        {"type": "object"},
        {},
        "Megatron arguments of the fine-tuning alone, on top of the plan's",
    ),
)

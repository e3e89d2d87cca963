"""Convert a plan file to a `Plan`: parse and check every key, then the constraints between keys."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.files import length_problem
from megatron_lrpath.models import RECIPES, ModelSpec, resolve_model
from megatron_lrpath.paradigms import PARADIGMS
from megatron_lrpath.plan.arguments import by_option, hint
from megatron_lrpath.plan.file.arguments import RECIPE, check_arguments, read_arguments
from megatron_lrpath.plan.file.consistency import check_plan
from megatron_lrpath.plan.file.keys import (
    ADOPTED_KEYS,
    FALLING_KEYS,
    PLAN_KEYS,
    REPLAY_KEYS,
    SAFE_NAME,
    SECTIONS,
    SHARE,
    TEXT,
    UNKNOWN,
    VERSION_KEYS,
    WEIGHT,
    Key,
    choice,
)
from megatron_lrpath.plan.file.source import Entry, Source, read_source
from megatron_lrpath.plan.file.values import (
    read_cycle,
    read_key,
    read_list,
    read_mapping,
    read_section,
    read_value,
)
from megatron_lrpath.plan.mix import Mix, MixPart, Replay
from megatron_lrpath.plan.plan import Plan
from megatron_lrpath.plan.sft import Sft
from megatron_lrpath.plan.spec import Adopted, Batch, Data, Falling, Tokenizer, Version
from megatron_lrpath.schedule import STYLES, Schedule
from megatron_lrpath.schedule.curves import tenth
from megatron_lrpath.wording import nearest


def read_mix(entry: Entry | None, seed: int) -> Mix | None:
    """Return the mix of an entry (a plan's or a version's); None if there is none or it names no slice.

    Raise PlanError for shares outside (0, 1), shares that leave nothing for the main path, and a repeated
    slice.
    """
    if entry is None or entry.value is None:
        return None
    section = read_section(entry, SECTIONS["branch_mix"])
    named = read_mapping(section["slices"])
    if not named:
        if entry.key.startswith("versions"):
            return None  # removes the plan's mix from this version
        raise section["slices"].error("names no slice; write them like `curated: 0.2`")
    parts = [  # 0.1 is exactly a tenth
        MixPart(name, Fraction(repr(read_value(child, SHARE))), child.place) for name, child in named.items()
    ]
    _check_names(parts, named)
    total = sum(part.share for part in parts)
    if total >= 1:
        raise section["slices"].error(
            f"the shares add up to {float(total):g}, which leaves nothing to the main path's data; they must "
            "add up to less than 1"
        )
    return Mix(tuple(parts), _read_fields(section, SECTIONS["branch_mix"], "slices")["seed"] or seed)


def read_replay(entry: Entry | None) -> Replay | None:
    """Return a version's replay, from a share or a mapping with `share` and `weights`; None without an entry.

    Raise PlanError for a share outside (0, 1) and for weights that are not integers of at least 1.
    """
    if entry is None or entry.value is None:
        return None
    section = read_section(entry, REPLAY_KEYS) if isinstance(entry.value, dict) else {"share": entry}
    share = Fraction(repr(read_value(section["share"], SHARE)))  # 0.1 is exactly a tenth
    weights = section.get("weights")
    if weights is None or weights.value is None:
        return Replay(share)
    named = read_mapping(weights)
    if not named:
        raise weights.error("names no version; write them like `v1: 2`, or leave `weights` out")
    return Replay(share, tuple((name, int(read_value(child, WEIGHT))) for name, child in named.items()))


def _check_names(parts: list[MixPart], named: dict[str, Entry]) -> None:
    seen: dict[str, str] = {}
    for part, entry in zip(parts, named.values(), strict=True):
        if not re.fullmatch(SAFE_NAME, part.name):
            raise entry.error(f"{part.slice!r} does not name a slice; give its name or its path")
        if part.name in seen:
            raise entry.error(
                f"{part.slice!r} has the name of {seen[part.name]!r}; two slices need two names"
            )
        seen[part.name] = part.slice


_OWN_READERS = ("data", "valid", "special_tokens", "versions", "paradigms", "megatron", "style")  # of `sft`


def read_sft(entry: Entry | None, seed: int, batch: Batch, versions: tuple[Version, ...]) -> Sft | None:
    """Return the section, None if there is none; the other arguments are the plan's.

    Raise PlanError like `load_plan`.
    """
    if entry is None or entry.value is None:
        return None
    section = read_section(entry, SECTIONS["sft"])
    plain = _read_fields(section, SECTIONS["sft"], *_OWN_READERS)
    _check_length(entry, section)
    return Sft(
        data=_texts(section["data"]),
        valid=_valid(section.get("valid")),
        schedule=_schedule(section, plain),
        batch=_batch(entry, section, plain, batch),
        template=plain["chat_template"],
        special_tokens=_texts(section.get("special_tokens")),
        versions=_names(section.get("versions"), tuple(version.name for version in versions)),
        paradigms=_names(section.get("paradigms"), PARADIGMS),
        seed=plain["seed"] or seed,
        megatron=read_arguments(section.get("megatron")),
        place=entry.place,
        **{name: plain[name] for name in ("epochs", "steps", "too_long", "max_rejects")},
    )


def _check_length(entry: Entry, section: dict[str, Entry]) -> None:
    given = [name for name in ("epochs", "steps") if name in section and section[name].value is not None]
    if len(given) != 1:
        place = section[given[1]] if given else entry
        raise place.error("give either `epochs` or `steps`" + (", not both" if given else ""))


def _texts(entry: Entry | None) -> tuple[str, ...]:
    """Return a text or a list of texts as a list."""
    if entry is None or entry.value is None:
        return ()
    items = read_list(entry) if isinstance(entry.value, list) else [entry]
    return tuple(read_value(item, TEXT) for item in items)


def _valid(entry: Entry | None) -> float | tuple[str, ...] | None:
    if entry is None or entry.value is None:
        return None
    if isinstance(entry.value, int | float):
        return float(read_value(entry, SHARE))
    return _texts(entry)


def _names(entry: Entry | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """Return some of the known names, in their order; all if none are given."""
    if entry is None or entry.value is None:
        return known
    items = read_list(entry)
    if not items:
        raise entry.error(f"names none; give some of {', '.join(known)}, or leave it out for all")
    chosen = {read_value(item, choice(*known)) for item in items}
    return tuple(name for name in known if name in chosen)


def _paradigms(entry: Entry | None) -> tuple[str, ...] | None:
    """Return the paradigms that a plan names; None without the key."""
    return None if entry is None or entry.value is None else _names(entry, PARADIGMS)


def _schedule(section: dict[str, Entry], plain: dict[str, Any]) -> Schedule:
    style = read_value(section["style"], choice(*STYLES)) if "style" in section else "cosine"
    lowest = _min_lr(section, plain)
    if plain["steps"] is not None and plain["warmup_steps"] >= plain["steps"]:
        raise section["warmup_steps"].error(
            f"a warm-up of {plain['warmup_steps']} steps fills all {plain['steps']} steps; give a shorter one"
        )
    return Schedule(style=style, max_lr=plain["max_lr"], min_lr=lowest, warmup=plain["warmup_steps"])


def _min_lr(section: dict[str, Entry], values: dict[str, Any]) -> float:
    """Return `min_lr` as given, or a tenth of `max_lr`."""
    highest, lowest = values["max_lr"], values["min_lr"]
    if lowest is None:
        return tenth(highest)
    if lowest > highest:
        raise section["min_lr"].error(f"{lowest} is above max_lr {highest}; a decay goes downwards")
    return float(lowest)


def _batch(entry: Entry, section: dict[str, Entry], plain: dict[str, Any], batch: Batch) -> Batch:
    own = Batch(
        plain["global_batch_size"] or batch.global_batch_size,
        plain["micro_batch_size"] or batch.micro_batch_size,
        plain["seq_length"] or batch.seq_length,
    )
    if own.global_batch_size % own.micro_batch_size:
        place = section.get("global_batch_size") or section.get("micro_batch_size") or entry
        raise place.error(
            f"a global_batch_size of {own.global_batch_size} is not a multiple of the micro_batch_size "
            f"{own.micro_batch_size}; every step needs whole micro batches"
        )
    return own


def load_plan(path: Path | str) -> Plan:
    """Read and check a plan file.

    Raise PlanError, `FILE:LINE: key: problem; what to do`, for the first problem.
    """
    source = read_source(path)
    if source.is_experiment:
        raise source.find("plan").error(
            "this is an experiment, which varies a plan, and a plan is wanted here; `lrpath experiment FILE "
            "--write` writes its plans into OUTPUT/plans"
        )
    return plan_from(source)


def plan_from(source: Source) -> Plan:
    """Return the plan in a parsed file; raise PlanError like `load_plan`."""
    top = read_section(source.root, PLAN_KEYS)
    values = _read_fields(
        top,
        PLAN_KEYS,
        *SECTIONS,
        "adopted",
        "model",
        "versions",
        "megatron",
        "branch_megatron",
        "paradigms",
        "prompts",
    )
    values["output"] = values["output"] or f"runs/{values['name']}"
    if problem := length_problem(values["output"]):
        raise top.get("output", top["name"]).error(problem)
    model = _read_model(top["model"])
    check_arguments(
        top["model"], top.get("megatron"), _sft_megatron(top.get("sft")), _branch_megatron(top), model
    )
    batch = Batch(**_read_plain_section(top, "batch"))
    schedule = read_section(top["schedule"], SECTIONS["schedule"])
    versions = _read_versions(top, read_cycle(schedule.get("cycle_steps")), values["seed"])
    plan = Plan(
        path=source.path,
        model=model,
        schedule=_read_schedule(schedule),
        batch=batch,
        tokenizer=_read_tokenizer(top),
        data=_read_data(top["data"]),
        versions=versions,
        megatron=read_arguments(top.get("megatron")),
        sft=read_sft(top.get("sft"), values["seed"], batch, versions),
        paradigms=_paradigms(top.get("paradigms")),
        prompts=_texts(top.get("prompts")),
        falling=_falling(schedule.get("main")),
        adopted=_adopted(top.get("adopted")),
        **values,
    )
    check_plan(source, plan)
    return plan


def _read_fields(section: dict[str, Entry], keys: tuple[Key, ...], *besides: str) -> dict[str, Any]:
    """Return the values of a section's keys except `besides`, which have their own readers."""
    return {key.name: read_key(section, key) for key in keys if key.name not in besides}


def _read_plain_section(top: dict[str, Entry], name: str) -> dict[str, Any]:
    return _read_fields(read_section(top[name], SECTIONS[name]), SECTIONS[name])


def _read_data(entry: Entry) -> Data:
    section = read_section(entry, SECTIONS["data"])
    slices = str(_read_fields(section, SECTIONS["data"], "valid")["slices"])
    if problem := length_problem(slices):
        raise section["slices"].error(problem)
    valid = section.get("valid")
    first, *more = _texts(valid) or (str(Path(slices) / "valid"),)
    data = Data(slices, first, tuple(more))
    names = [Path(first).name.removesuffix(".slice"), *data.more_sets]
    if valid is not None and len({name.casefold() for name in names}) < len(names):
        raise valid.error(f"two validation slices of one name; there are {', '.join(names)}")
    return data


def _read_schedule(section: dict[str, Entry]) -> Schedule:
    fields = _read_fields(section, SECTIONS["schedule"], "cycle_steps", "main")
    fields["min_lr"] = _min_lr(section, fields)
    first, second = fields["multi_step_fractions"]
    if first > second:
        raise section["multi_step_fractions"].error(f"{first} and {second} must ascend")
    return Schedule(warmup=fields.pop("warmup_steps"), **fields)


def _falling(entry: Entry | None) -> Falling | None:
    if entry is None or entry.value is None:
        return None
    values = _read_fields(read_section(entry, FALLING_KEYS), FALLING_KEYS)
    return Falling(values["power"], values["from"])


def _adopted(entry: Entry | None) -> Adopted | None:
    if entry is None or entry.value is None:
        return None
    section = read_section(entry, ADOPTED_KEYS)
    data = _texts(section.get("data"))
    values = _read_fields(section, ADOPTED_KEYS, "data")
    return Adopted(**values, data=() if data == (UNKNOWN,) else data)


def _read_tokenizer(top: dict[str, Entry]) -> Tokenizer:
    entry, tokenizer = top["tokenizer"], Tokenizer(**_read_plain_section(top, "tokenizer"))
    if tokenizer.type.startswith("Null"):
        if tokenizer.vocab_size is None:
            raise entry.error(f"{tokenizer.type} has no vocabulary of its own; give vocab_size")
    elif tokenizer.model is None:
        raise entry.error(f"{tokenizer.type} needs its model; give model")
    return tokenizer


def _read_versions(top: dict[str, Entry], cycle: dict[str, float], seed: int) -> tuple[Version, ...]:
    entry = top["versions"]
    items = read_list(entry)
    if not items:
        raise entry.error("a plan needs at least one version, like `- {name: v1, steps: 100}`")
    limit = next(key.schema["maxItems"] for key in PLAN_KEYS if key.name == "versions")
    if len(items) > limit:
        raise entry.error(f"{len(items)} versions are more than the {limit} that a plan may have")
    mix, arguments = read_mix(top.get("branch_mix"), seed), read_arguments(top.get("branch_megatron"))
    versions = []
    for item in items:
        section = read_section(item, VERSION_KEYS)
        fields = _read_fields(section, VERSION_KEYS, "cycle_steps", "branch_mix", "branch_megatron", "replay")
        own = read_cycle(section.get("cycle_steps"))
        mixed = read_mix(section.get("branch_mix"), seed) if "branch_mix" in section else mix
        alone = read_arguments(section["branch_megatron"]) if "branch_megatron" in section else arguments
        replay = read_replay(section.get("replay"))
        versions.append(
            Version(**fields, cycle_steps=cycle | own, mix=mixed, branch_megatron=alone, replay=replay)
        )
    return tuple(versions)


def _branch_megatron(top: dict[str, Entry]) -> list[Entry | None]:
    """Return the plan's `branch_megatron` and those of its versions."""
    items = top["versions"].value if isinstance(top["versions"].value, list) else []
    own = [item.value.get("branch_megatron") for item in items if isinstance(item.value, dict)]
    return [top.get("branch_megatron"), *own]


def _sft_megatron(sft: Entry | None) -> Entry | None:
    return sft.value.get("megatron") if sft is not None and isinstance(sft.value, dict) else None


def _read_model(entry: Entry) -> ModelSpec:
    if isinstance(entry.value, dict):
        overrides = read_arguments(entry)
        recipe = overrides.pop(RECIPE, None)
        place = entry.value.get(RECIPE, entry)
    else:
        overrides, recipe, place = {}, read_value(entry, TEXT), entry
    if recipe is not None and recipe not in RECIPES:
        near = nearest(str(recipe), RECIPES)
        raise place.error(f"{recipe!r} is no recipe{near}; there are {', '.join(RECIPES)}")
    spec = ModelSpec(recipe, overrides)
    try:
        resolve_model(spec)
    except UserError as error:
        unknown = [
            f"; Megatron has no argument {name!r}{hint(name)}"
            for name in overrides
            if name not in by_option()
        ]
        raise entry.error(f"{error}{''.join(unknown)}") from None
    return spec

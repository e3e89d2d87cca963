"""Reads the section `sft`, with every key checked."""

from __future__ import annotations

from typing import Any

from megatron_lrpath.models import ModelSpec, resolve_model
from megatron_lrpath.plan.key import SHARE, TEXT, choice
from megatron_lrpath.plan.neutral import SET_BY_PLAN
from megatron_lrpath.plan.runs import PARADIGMS
from megatron_lrpath.plan.sft import DROPPED, Sft
from megatron_lrpath.plan.sft_keys import SFT_KEYS
from megatron_lrpath.plan.source import Entry, Source
from megatron_lrpath.plan.spec import Batch, Version
from megatron_lrpath.plan.values import read_arguments, read_key, read_list, read_section, read_value
from megatron_lrpath.schedule import STYLES, Schedule, tenth

_LISTS = ("data", "valid", "special_tokens", "versions", "paradigms", "megatron", "style")


def read_sft(
    source: Source,
    entry: Entry | None,
    seed: int,
    batch: Batch,
    versions: tuple[Version, ...],
    model: ModelSpec,
) -> Sft | None:
    """The section, None where there is none; the others are the plan's.

    Raises PlanError like `load_plan`.
    """
    if entry is None or entry.value is None:
        return None
    section = read_section(source, entry, SFT_KEYS)
    plain = {key.name: read_key(source, section, key) for key in SFT_KEYS if key.name not in _LISTS}
    _check_length(source, entry, section)
    return Sft(
        data=_texts(source, section["data"]),
        valid=_valid(source, section.get("valid")),
        schedule=_schedule(source, section, plain),
        epochs=plain["epochs"],
        steps=plain["steps"],
        batch=_batch(source, entry, section, plain, batch),
        template=plain["chat_template"],
        special_tokens=_texts(source, section.get("special_tokens")),
        too_long=plain["too_long"],
        max_rejects=plain["max_rejects"],
        versions=_names(source, section.get("versions"), tuple(version.name for version in versions)),
        paradigms=_names(source, section.get("paradigms"), PARADIGMS),
        seed=plain["seed"] or seed,
        megatron=_megatron(source, section.get("megatron"), model),
        place=f"{source.path}:{entry.line}: sft",
    )


def _check_length(source: Source, entry: Entry, section: dict[str, Entry]) -> None:
    given = [name for name in ("epochs", "steps") if name in section and section[name].value is not None]
    if len(given) != 1:
        place = section[given[1]] if given else entry
        raise source.error(place, "give either `epochs` or `steps`" + (", not both" if given else ""))


def _texts(source: Source, entry: Entry | None) -> tuple[str, ...]:
    """A text or a list of texts."""
    if entry is None or entry.value is None:
        return ()
    items = read_list(source, entry) if isinstance(entry.value, list) else [entry]
    return tuple(read_value(source, item, TEXT) for item in items)


def _valid(source: Source, entry: Entry | None) -> float | tuple[str, ...] | None:
    if entry is None or entry.value is None:
        return None
    if isinstance(entry.value, int | float):
        return float(read_value(source, entry, SHARE))
    return _texts(source, entry)


def _names(source: Source, entry: Entry | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """Some of the known names, in their order; all where none are given."""
    if entry is None or entry.value is None:
        return known
    items = read_list(source, entry)
    if not items:
        raise source.error(entry, f"names none; give some of {', '.join(known)}, or leave it out for all")
    chosen = {read_value(source, item, choice(*known)) for item in items}
    return tuple(name for name in known if name in chosen)


def _schedule(source: Source, section: dict[str, Entry], plain: dict[str, Any]) -> Schedule:
    style = "cosine"
    if "style" in section:
        style = read_value(source, section["style"], choice(*STYLES))
    highest, lowest = plain["max_lr"], plain["min_lr"]
    if lowest is None:
        lowest = tenth(highest)
    if lowest > highest:
        raise source.error(section["min_lr"], f"{lowest} is above max_lr {highest}; a decay goes downwards")
    if plain["steps"] is not None and plain["warmup_steps"] >= plain["steps"]:
        raise source.error(
            section["warmup_steps"],
            f"a warm-up of {plain['warmup_steps']} steps fills all {plain['steps']} steps; give a shorter one",
        )
    return Schedule(style=style, max_lr=highest, min_lr=lowest, warmup=plain["warmup_steps"])


def _batch(
    source: Source, entry: Entry, section: dict[str, Entry], plain: dict[str, Any], batch: Batch
) -> Batch:
    own = Batch(
        plain["global_batch_size"] or batch.global_batch_size,
        plain["micro_batch_size"] or batch.micro_batch_size,
        plain["seq_length"] or batch.seq_length,
    )
    if own.global_batch_size % own.micro_batch_size:
        place = section.get("global_batch_size") or section.get("micro_batch_size") or entry
        raise source.error(
            place,
            f"a global_batch_size of {own.global_batch_size} is not a multiple of the micro_batch_size "
            f"{own.micro_batch_size}; every step needs whole micro batches",
        )
    return own


def _megatron(source: Source, entry: Entry | None, model: ModelSpec) -> dict[str, Any]:
    """Megatron arguments; none that the plan sets, that make another model, or that split packed samples."""
    arguments = read_arguments(source, entry)
    if entry is None or not isinstance(entry.value, dict):
        return arguments
    written = {key.replace("-", "_"): child for key, child in entry.value.items()}
    for name in arguments:
        if name in SET_BY_PLAN:
            instead = f"follows from the plan and the keys of `sft` (`{SET_BY_PLAN[name]}` for versions)"
        elif name in resolve_model(model):
            instead = "the model is the version's"
        elif name in DROPPED:
            instead = "packed samples have an attention of their own and are not split over ranks"
        else:
            continue
        raise source.error(written[name], f"cannot be set here; leave it out: {instead}")
    return arguments

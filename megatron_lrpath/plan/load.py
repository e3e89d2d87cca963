"""From a plan file to a `Plan`: every key read and checked, then what only holds across keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.models import RECIPES, ModelSpec, resolve_model
from megatron_lrpath.plan.consistency import check_plan
from megatron_lrpath.plan.key import TEXT, Key
from megatron_lrpath.plan.keys import (
    BATCH_KEYS,
    DATA_KEYS,
    PLAN_KEYS,
    SCHEDULE_KEYS,
    TOKENIZER_KEYS,
    VERSION_KEYS,
)
from megatron_lrpath.plan.load_mix import read_mix
from megatron_lrpath.plan.load_sft import read_sft
from megatron_lrpath.plan.neutral import SET_BY_PLAN
from megatron_lrpath.plan.plan import Plan
from megatron_lrpath.plan.source import Entry, Source, read_source
from megatron_lrpath.plan.spec import Batch, Data, Tokenizer, Version
from megatron_lrpath.plan.values import (
    nearest,
    read_arguments,
    read_cycle,
    read_key,
    read_list,
    read_section,
    read_value,
)
from megatron_lrpath.schedule import Schedule, tenth

_NESTED = ("cycle_steps", "branch_mix")  # read by functions of their own
_PLAIN = ("name", "seed", "alpha", "cpt_variant", "also_branch_at")


def load_plan(path: Path | str) -> Plan:
    """Read and check a plan file.

    Raises PlanError, `FILE:LINE: key: what is wrong; how to go on`, for the first thing that is wrong.
    """
    source = read_source(path)
    if source.is_experiment:
        raise source.error(
            source.find("plan"),
            "this is an experiment, which varies a plan, and a plan is wanted here; `lrpath experiment FILE "
            "--write` writes its plans into OUTPUT/plans",
        )
    return plan_from(source)


def plan_from(source: Source) -> Plan:
    """The plan that a file's text says; raises PlanError like `load_plan`."""
    top = read_section(source, source.root, PLAN_KEYS)
    values = {key.name: read_key(source, top, key) for key in PLAN_KEYS if key.name in _PLAIN}
    model = _read_model(source, top["model"])
    batch = Batch(**_read_fields(source, top["batch"], BATCH_KEYS))
    versions = _read_versions(source, top, values["seed"])
    plan = Plan(
        path=source.path,
        model=model,
        schedule=_read_schedule(source, top["schedule"]),
        batch=batch,
        tokenizer=_read_tokenizer(source, top["tokenizer"]),
        data=_read_data(source, top["data"]),
        versions=versions,
        output=_read_output(source, top, values["name"]),
        megatron=_read_megatron(source, top.get("megatron"), model),
        sft=read_sft(source, top.get("sft"), values["seed"], batch, versions, model),
        **values,
    )
    check_plan(source, plan)
    return plan


def _read_fields(source: Source, entry: Entry, keys: tuple[Key, ...]) -> dict[str, Any]:
    section = read_section(source, entry, keys)
    return {key.name: read_key(source, section, key) for key in keys if key.name not in _NESTED}


def _read_schedule(source: Source, entry: Entry) -> Schedule:
    fields = _read_fields(source, entry, SCHEDULE_KEYS)
    section = read_section(source, entry, SCHEDULE_KEYS)
    if fields["min_lr"] is None:
        fields["min_lr"] = tenth(fields["max_lr"])
    if fields["min_lr"] > fields["max_lr"]:
        raise source.error(
            section["min_lr"],
            f"{fields['min_lr']} is above max_lr {fields['max_lr']}; a decay goes downwards",
        )
    first, second = fields["multi_step_fractions"]
    if first > second:
        raise source.error(section["multi_step_fractions"], f"{first} and {second} must ascend")
    return Schedule(warmup=fields.pop("warmup_steps"), **fields)


def _read_tokenizer(source: Source, entry: Entry) -> Tokenizer:
    tokenizer = Tokenizer(**_read_fields(source, entry, TOKENIZER_KEYS))
    if tokenizer.type.startswith("Null"):
        if tokenizer.vocab_size is None:
            raise source.error(entry, f"{tokenizer.type} has no vocabulary of its own; give vocab_size")
    elif tokenizer.model is None:
        raise source.error(entry, f"{tokenizer.type} needs its model; give model")
    return tokenizer


def _read_data(source: Source, entry: Entry) -> Data:
    fields = _read_fields(source, entry, DATA_KEYS)
    return Data(fields["slices"], fields["valid"] or str(Path(fields["slices"]) / "valid"))


def _read_versions(source: Source, top: dict[str, Entry], seed: int) -> tuple[Version, ...]:
    entry, schedule = top["versions"], top["schedule"]
    items = read_list(source, entry)
    if not items:
        raise source.error(entry, "a plan needs at least one version, like `- {name: v1, steps: 100}`")
    limit = next(key.schema["maxItems"] for key in PLAN_KEYS if key.name == "versions")
    if len(items) > limit:
        raise source.error(entry, f"{len(items)} versions are more than the {limit} that a plan may have")
    default = read_cycle(source, read_section(source, schedule, SCHEDULE_KEYS).get("cycle_steps"))
    mix = read_mix(source, top.get("branch_mix"), seed)
    versions = []
    for item in items:
        fields, section = _read_fields(source, item, VERSION_KEYS), read_section(source, item, VERSION_KEYS)
        own = read_cycle(source, section.get("cycle_steps"))
        mixed = read_mix(source, section.get("branch_mix"), seed) if "branch_mix" in section else mix
        versions.append(Version(**fields, cycle_steps=default | own, mix=mixed))
    return tuple(versions)


def _read_model(source: Source, entry: Entry) -> ModelSpec:
    if isinstance(entry.value, dict):
        overrides = read_arguments(source, entry)
        recipe = overrides.pop("recipe", None)
        place = entry.value.get("recipe", entry)
    else:
        overrides, recipe, place = {}, read_value(source, entry, TEXT), entry
    if recipe is not None and recipe not in RECIPES:
        hint = nearest(str(recipe), RECIPES)
        raise source.error(place, f"{recipe!r} is no recipe{hint}; there are {', '.join(RECIPES)}")
    spec = ModelSpec(recipe, overrides)
    _refuse_set_by_plan(source, entry, overrides)
    try:
        resolve_model(spec)
    except UserError as error:
        raise source.error(entry, str(error)) from None
    return spec


def _read_output(source: Source, top: dict[str, Entry], name: str) -> str:
    if "output" not in top or top["output"].value is None:
        return f"runs/{name}"
    return str(read_value(source, top["output"], TEXT))


def _read_megatron(source: Source, entry: Entry | None, model: ModelSpec) -> dict[str, Any]:
    arguments = read_arguments(source, entry)
    if entry is not None:
        _refuse_set_by_plan(source, entry, arguments)
        for name, child in _by_argument(entry).items():
            if name in resolve_model(model):
                raise source.error(child, "an argument of the model; set it under `model:`")
    return arguments


def _refuse_set_by_plan(source: Source, entry: Entry, arguments: dict[str, Any]) -> None:
    for name in arguments:
        if name in SET_BY_PLAN:
            child = _by_argument(entry)[name]
            raise source.error(child, f"follows from the plan; leave it out and set `{SET_BY_PLAN[name]}`")


def _by_argument(entry: Entry) -> dict[str, Entry]:
    """The entries of a mapping of Megatron arguments, by their names with underscores."""
    children = entry.value if isinstance(entry.value, dict) else {}
    return {name.replace("-", "_"): child for name, child in children.items()}

"""The plan file's JSON schema, from its keys and from the table of arguments."""

from __future__ import annotations

import functools
from typing import Any

from megatron_lrpath.plan.arguments import IDENTITY, NEUTRAL, Argument, by_option
from megatron_lrpath.plan.file.arguments import RECIPE, for_branches
from megatron_lrpath.plan.file.keys import MIX_KEYS, PLAN_KEYS, RECIPE_NAME, SECTIONS, VERSION_KEYS, Key


def json_schema() -> dict[str, Any]:
    """Return the plan file's JSON schema (draft 2020-12), for editors; `load_plan` also checks across keys."""
    properties = {}
    for key in PLAN_KEYS:
        schema = _section_schema(SECTIONS[key.name]) if key.name in SECTIONS else _key_schema(key)
        properties[key.name] = schema | {"description": key.about}
    version = _section_schema(VERSION_KEYS)
    version["properties"]["branch_mix"] |= _section_schema(MIX_KEYS)
    properties["versions"]["items"] = version
    _name_arguments(properties)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Plan of version updates",
    } | _object_schema(PLAN_KEYS, properties)


def _name_arguments(properties: dict[str, Any]) -> None:
    """Add Megatron's arguments with their values where a plan accepts them; names with `-` are not checked."""
    known = _argument_schemas()
    properties["megatron"] |= _named(known)
    properties["model"] |= {"anyOf": [RECIPE_NAME, _named(known | {RECIPE: RECIPE_NAME})]}
    of_branches = _named({name: known[name] for name in known if for_branches(name)})
    properties["branch_megatron"] |= of_branches
    properties["versions"]["items"]["properties"]["branch_megatron"] |= of_branches
    properties["sft"]["properties"]["megatron"] |= {"$ref": "#/properties/megatron"}


def _named(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "patternProperties": {"^[^_]*-": {}},
        "additionalProperties": False,
    }


@functools.cache
def _argument_schemas() -> dict[str, Any]:
    """Return the schema of every argument that a plan can set, by its option."""
    return {
        name: argument.forms[name].schema(argument.allowed, argument.refused_values)
        for name, argument in sorted(by_option().items())
        if settable(argument)
    }


def settable(argument: Argument) -> bool:
    """Return whether a plan can set an argument under `model` or `megatron`."""
    return argument.plan in (NEUTRAL, IDENTITY) and not argument.key


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
    if "enum" in key.schema:
        extra["enum"] = list(key.schema["enum"])
    return key.schema | extra

"""Edit the text of a plan file (append or remove versions, set alphas) without changing the rest."""

from __future__ import annotations

import codecs
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_lrpath.errors import PlanError
from megatron_lrpath.files import atomic_rewrite
from megatron_lrpath.plan.file.source import parse_source, plain

Edit = tuple[int, int, str]
"""The text that replaces the characters from the first position to the second."""


def write_text(path: Path, text: str) -> None:
    """Replace the text of a plan file atomically; a byte-order mark and the permissions are kept."""
    mark = codecs.BOM_UTF8 if path.read_bytes().startswith(codecs.BOM_UTF8) else b""
    atomic_rewrite(path, mark + text.encode())


def with_version(path: Path, text: str, version: dict[str, Any], valid: Sequence[str]) -> str:
    """Return the text of the plan `path` with `version` (its keys in order) appended and `data.valid` as
    given.

    Raises:
        PlanError: the syntax of the file is not supported; with the lines to add by hand.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    versions, data = _value(root, "versions"), _value(root, "data")
    newline = "\r\n" if "\r\n" in text else "\n"
    edits = [_appended(text, versions, version, newline), *_valid(text, data, valid, newline)]
    before = plain(parse_source(path, text).root)
    wanted = before | {
        "versions": [*before["versions"], version],
        "data": before["data"] | ({"valid": _as_value(valid)} if valid else {}),
    }
    by_hand = f"`- {_flow(version)}` to `versions`" + (
        f", and `valid: {_list(valid)}` to `data`" if valid else ""
    )
    return _edited(path, text, edits, wanted, f"add {by_hand} and call again")


def with_alphas(path: Path, text: str, alphas: Mapping[str, float]) -> str:
    """Return the text of the plan `path` with `alpha` as given for these versions.

    Raises:
        PlanError: the syntax of the file is not supported; with the lines to set by hand.
    """
    versions = _value(yaml.compose(text, Loader=yaml.SafeLoader), "versions")
    newline = "\r\n" if "\r\n" in text else "\n"
    before = plain(parse_source(path, text).root)
    edits = [
        _alpha(text, node, alphas[version["name"]], newline)
        for node, version in zip(versions.value, before["versions"], strict=True)
        if version["name"] in alphas
    ]
    wanted = before | {
        "versions": [
            version | ({"alpha": alphas[version["name"]]} if version["name"] in alphas else {})
            for version in before["versions"]
        ]
    }
    by_hand = "; ".join(f"`alpha: {alpha!r}` of version {name}" for name, alpha in alphas.items())
    return _edited(path, text, edits, wanted, f"set {by_hand} by hand")


def with_key(path: Path, text: str, name: str, value: Mapping[str, Any]) -> str:
    """Return the text of the plan `path` with a new mapping `name` at its end.

    Raises:
        PlanError: the syntax of the file is not supported; with the lines to add by hand.
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = [f"{name}:", *(f"  {key}: {_item(one)}" for key, one in value.items())]
    end = "" if text.endswith("\n") else newline
    wanted = plain(parse_source(path, text).root) | {name: dict(value)}
    edit = (len(text), len(text), end + newline.join(lines) + newline)
    return _edited(path, text, [edit], wanted, f"add `{name}: {{{', '.join(lines[1:])}}}` to it")


def with_entry(path: Path, text: str, section: str, name: str, value: Any) -> str:
    """Return the text of the plan `path` with `name: value` in its mapping `section`, added if missing.

    Raises:
        PlanError: the syntax of the file is not supported; with the line to add by hand.
    """
    before = plain(parse_source(path, text).root)
    if section not in before:
        return with_key(path, text, section, {name: value})
    node = _value(yaml.compose(text, Loader=yaml.SafeLoader), section)
    newline, line = "\r\n" if "\r\n" in text else "\n", f"{name}: {_item(value)}"
    edits: list[Edit] = []
    if isinstance(node, yaml.MappingNode) and node.value and node.flow_style:
        end = _end(node.value[-1][1])
        edits = [(end, end, f", {line}")]
    elif isinstance(node, yaml.MappingNode) and node.value:
        edits = [_line_behind(text, _end(node), [" " * node.value[0][0].start_mark.column + line], newline)]
    elif isinstance(node, yaml.MappingNode):
        edits = [(node.start_mark.index, int(node.end_mark.index), f"{{{line}}}")]
    wanted = before | {section: (before[section] or {}) | {name: value}}
    return _edited(path, text, edits, wanted, f"add `{line}` to its `{section}`")


def without_versions(path: Path, text: str, names: Collection[str], valid: Collection[str]) -> str:
    """Return the text of the plan `path` without the versions `names` and without the entries `valid` of
    `data.valid`.

    Comments on separate lines are kept. The first version and the first entry of `data.valid` cannot be
    removed.

    Raises:
        PlanError: the syntax of the file is not supported; with the lines to remove by hand.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    versions, data = _value(root, "versions"), _value(root, "data")
    assert isinstance(versions, yaml.SequenceNode)
    assert isinstance(data, yaml.MappingNode)
    edits = [_removed(text, versions, node) for node in versions.value if _value(node, "name").value in names]
    sets = next((value for key, value in data.value if key.value == "valid"), None)
    if isinstance(sets, yaml.SequenceNode):
        edits += [_removed(text, sets, node) for node in sets.value if node.value in valid]
    wanted = plain(parse_source(path, text).root)
    wanted["versions"] = [one for one in wanted["versions"] if str(one["name"]) not in names]
    if isinstance(wanted["data"].get("valid"), list):
        kept = [one for one in wanted["data"]["valid"] if one not in valid]
        wanted["data"] |= {"valid": kept}
    taken_out = f"{', '.join(names)} from `versions`" + (
        f", and {_list(list(valid))} from `data.valid`" if valid else ""
    )
    by_hand = f"to take {taken_out} out, write each of them on a line of its own, and call again"
    return _edited(path, text, edits, wanted, by_hand)


def _edited(path: Path, text: str, edits: Sequence[Edit], wanted: dict[str, Any], by_hand: str) -> str:
    """Apply the edits to the text. Raise PlanError, with manual instructions, if the result does not equal
    `wanted`.
    """
    changed = text
    for begin, end, new in sorted(edits, reverse=True):
        changed = changed[:begin] + new + changed[end:]
    try:
        if plain(parse_source(path, changed).root) == wanted:
            return changed
    except PlanError:
        pass
    raise PlanError(f"{path}: cannot be edited as it is written; {by_hand}")


def _alpha(text: str, version: yaml.Node, alpha: float, newline: str) -> Edit:
    """Return the edit that sets a version's alpha: its value is replaced, or a key is added after the last
    one.
    """
    assert isinstance(version, yaml.MappingNode)
    held = {key.value: value for key, value in version.value}
    if "alpha" in held:
        begin, end = held["alpha"].start_mark.index, _end(held["alpha"])
        return begin, end, repr(alpha) if end > begin else f" {alpha!r}"
    end = _end(version)
    if version.flow_style:
        last = _end(version.value[-1][1])
        return last, last, f", alpha: {alpha!r}"
    return _line_behind(text, end, [" " * version.start_mark.column + f"alpha: {alpha!r}"], newline)


def _removed(text: str, sequence: yaml.SequenceNode, node: yaml.Node) -> Edit:
    """Return the edit that removes an item, except the first, from a sequence."""
    begin, end = node.start_mark.index, _end(node)
    if not sequence.flow_style:
        line = text.rfind("\n", 0, text.rfind("-", 0, begin)) + 1
        after = text.find("\n", end)
        return line, len(text) if after < 0 else after + 1, ""
    comma = text.rfind(",", 0, begin)
    return (comma if comma >= 0 else begin), end, ""


def _value(node: yaml.Node | None, key: str) -> yaml.Node:
    assert isinstance(node, yaml.MappingNode)  # the plan has been loaded
    return next(value for name, value in node.value if name.value == key)


def _end(node: yaml.Node) -> int:
    """Return the position of a node's last character: the end mark of a block is after the following
    comments.
    """
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(node, yaml.MappingNode) else last)
    return int(node.end_mark.index)


def _appended(text: str, versions: yaml.Node, version: dict[str, Any], newline: str) -> Edit:
    assert isinstance(versions, yaml.SequenceNode)
    last, end = versions.value[-1], _end(versions.value[-1])
    if versions.flow_style:
        return end, end, f", {_flow(version)}"
    indent = " " * versions.start_mark.column
    if last.flow_style:
        lines = [f"{indent}- {_flow(version)}"]
    else:
        pairs = [f"{key}: {_scalar(value)}" for key, value in version.items()]
        lines = [f"{indent}- {pairs[0]}", *(f"{indent}  {pair}" for pair in pairs[1:])]
    return _line_behind(text, end, lines, newline)


def _valid(text: str, data: yaml.Node, valid: Sequence[str], newline: str) -> list[Edit]:
    """Return the edits that set `data.valid`; empty if it has the value already."""
    if not valid:
        return []
    assert isinstance(data, yaml.MappingNode)
    held = {key.value: value for key, value in data.value}
    if "valid" in held:
        node = held["valid"]
        if isinstance(node, yaml.SequenceNode) and not node.flow_style:
            indent = " " * node.start_mark.column
            new = [f"{indent}- {_scalar(one)}" for one in valid[len(node.value) :]]
            return [_line_behind(text, _end(node), new, newline)] if new else []
        return [(node.start_mark.index, _end(node), _list(valid))]
    if data.flow_style:
        return [(_end(data.value[-1][1]), _end(data.value[-1][1]), f", valid: {_list(valid)}")]
    return [
        _line_behind(text, _end(data), [" " * data.start_mark.column + f"valid: {_list(valid)}"], newline)
    ]


def _line_behind(text: str, place: int, lines: list[str], newline: str) -> Edit:
    """Return the edit that inserts lines after the line of `place`."""
    end = text.find("\n", place)
    if end < 0:
        return len(text), len(text), newline + newline.join(lines) + newline
    return end + 1, end + 1, "".join(line + newline for line in lines)


def _as_value(valid: Sequence[str]) -> str | list[str]:
    return valid[0] if len(valid) == 1 else list(valid)


def _list(valid: Sequence[str]) -> str:
    return _scalar(valid[0]) if len(valid) == 1 else f"[{', '.join(map(_scalar, valid))}]"


def _flow(version: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {_scalar(value)}" for key, value in version.items()) + "}"


def _item(value: Any) -> str:
    """Return a value, or a list of values, in YAML."""
    return f"[{', '.join(map(_scalar, value))}]" if isinstance(value, list) else _scalar(value)


def _scalar(value: Any) -> str:
    """Return a value in YAML; text is quoted if it would be parsed as another type."""
    if not isinstance(value, str):
        return str(value)
    try:
        bare = plain(parse_source(Path(), f"text: [{value}]").root) == {"text": [value]}
    except PlanError:
        bare = False
    return value if bare else json.dumps(value)

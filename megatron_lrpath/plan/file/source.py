"""Parse YAML text to values with their line and key: safe, bounded, without repeated keys or aliases."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from megatron_lrpath.errors import PlanError, cause

MAX_BYTES = 256 * 1024
MAX_DEPTH = 8

_NULL = re.compile(r"(?:~|null|Null|NULL)?")
_TRUE = re.compile(r"true|True|TRUE|yes|Yes|YES|on|On|ON")
_FALSE = re.compile(r"false|False|FALSE|no|No|NO|off|Off|OFF")
_WHOLE = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)")
_NUMBER = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?")
MAX_DIGITS = 400  # maximum of a number; more are text
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_SPECIAL = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")

Scalar = None | bool | int | float | str


@dataclass(frozen=True)
class Entry:
    """A value of the file `path`: a scalar, a list or a mapping of entries; `key` has the form
    `versions[1].steps`.

    Line 0: the value is not in a file, and `path` is the option that set it.
    """

    value: Scalar | list[Entry] | dict[str, Entry]
    path: Path
    line: int
    key: str

    @property
    def place(self) -> str:
        """`FILE:LINE: key`, `FILE:LINE` for the whole file, or `--option key`."""
        if not self.line:
            return f"{self.path} {self.key}"
        return f"{self.path}:{self.line}: {self.key}".removesuffix(": ")

    def error(self, message: str) -> PlanError:
        """Return an error at this entry: `FILE:LINE: key: message`."""
        return PlanError(f"{self.place}: {message}")


@dataclass(frozen=True)
class Source:
    """A parsed file: its whole content, and the position of each key."""

    path: Path
    root: Entry

    @property
    def is_experiment(self) -> bool:
        """Return whether the file names a plan to vary, as experiments do and plans do not."""
        top = self.root.value
        return isinstance(top, dict) and "plan" in top and "versions" not in top

    def find(self, *keys: str) -> Entry:
        """Return the first of these keys in the file, else the whole file (for checks across keys)."""
        return next((self._entries[key] for key in keys if key in self._entries), self.root)

    @property
    def keys(self) -> list[str]:
        """Return every key in the file, in the form that `find` accepts."""
        return list(self._entries)

    def changed(self, values: Mapping[str, Any], option: str | None = None) -> Source:
        """Return the same file with these values: those that are not in the file get the position `option`.

        Without an option a value gets the position of the original one at its key.
        """
        new = (Path(option), 0) if option else (self.path, 1)

        def entry(value: Any, key: str) -> Entry:
            old = self._entries.get(key)
            kept = old is not None and (option is None or _alike(old.value, value))
            path, line = (old.path, old.line) if old is not None and kept else new
            if isinstance(value, dict):
                value = {name: entry(one, f"{key}.{name}" if key else name) for name, one in value.items()}
            elif isinstance(value, list):
                value = [entry(one, f"{key}[{i}]") for i, one in enumerate(value)]
            return Entry(value, path, line, key)

        return Source(self.path, entry(values, ""))

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        return {entry.key: entry for entry in _walk(self.root)}


def _alike(old: Any, new: Any) -> bool:
    """Return whether a value equals the original one; the parts of mappings and lists are compared
    separately.
    """
    return type(old) is type(new) and (isinstance(new, dict | list) or old == new)


def read_source(path: Path | str) -> Source:
    """Read a YAML file whose top level is a mapping.

    Raise PlanError with the file and the line: no such file, not UTF-8, too large, invalid YAML, empty, a
    repeated key, and aliases, tags or nesting that plans do not need.
    """
    return parse_source(Path(path), read_text(Path(path)))


def parse_source(path: Path, text: str) -> Source:
    """Parse a text that is (or would be) in the file `path`."""
    node = _composed(path, text)
    if node is None:
        raise PlanError(f"{path}:1: the file is empty; docs/plan-file.md shows a plan to begin with")
    if not isinstance(node, yaml.MappingNode):
        raise PlanError(f"{path}:{_line(node)}: a plan is a mapping, with lines like `name: quickstart`")
    return Source(path, Entry(_mapping(path, node, ""), path, 1, ""))


def parse_value(place: str, text: str) -> Any:
    """Parse one value as after its key in a plan; raise PlanError, which begins with `place`."""
    node = _composed(Path(place), text)
    return None if node is None else plain(_entry(Path(place), node, 1, ""))


def _composed(path: Path, text: str) -> yaml.Node | None:
    loader = None
    try:
        loader = _Loader(path, text)
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise PlanError(f"{where}: this is not YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise PlanError(f"{path}:{line}: a character that YAML does not allow: {error.reason}") from None
    except (ValueError, OverflowError):  # PyYAML passes the number of an escape `\U` to chr
        line = 1 if loader is None else loader.line + 1
        raise PlanError(f"{path}:{line}: this is not YAML: an escape \\U beyond U+10FFFF") from None


def plain(entry: Entry) -> Any:
    """Return the entry's value without lines and keys."""
    if isinstance(entry.value, dict):
        return {name: plain(child) for name, child in entry.value.items()}
    if isinstance(entry.value, list):
        return [plain(child) for child in entry.value]
    return entry.value


class _Loader(yaml.SafeLoader):
    """PyYAML's composer without aliases, tags and deep nesting (which cost memory or execute code)."""

    def __init__(self, path: Path, text: str) -> None:
        super().__init__(text)
        self.path, self.depth = path, 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        place = f"{self.path}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise PlanError(f"{place}: the alias *{event.anchor} is not read in a plan; write the value out")
        if getattr(event, "tag", None) is not None:
            raise PlanError(f"{place}: the tag {event.tag} is not read in a plan; leave it out")
        if self.depth == MAX_DEPTH:
            raise PlanError(f"{place}: nested more than {MAX_DEPTH} levels deep; a plan is flatter than that")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_text(path: Path) -> str:
    """Return the text of a plan file without a byte-order mark. Raise PlanError if it cannot be read."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise PlanError(f"{path}: no such plan file; give the path of a YAML file") from None
    except OSError as error:
        raise PlanError(f"{path}: cannot be read: {cause(error)}") from None
    except ValueError:  # a NUL in the name
        raise PlanError(f"{str(path)!r}: not a file's name") from None
    if len(data) > MAX_BYTES:
        raise PlanError(f"{path}: larger than {MAX_BYTES // 1024} KiB; this is hardly a plan file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PlanError(f"{path}:{line}: not UTF-8 text; save the plan as UTF-8") from None


def _mapping(path: Path, node: yaml.MappingNode, prefix: str) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for key_node, value_node in node.value:
        line = _line(key_node)
        if not isinstance(key_node, yaml.ScalarNode):
            raise PlanError(f"{path}:{line}: a key must be plain text")
        name = key_node.value
        if _NO_TEXT.search(name):
            raise PlanError(f"{path}:{line}: a key holds a NUL or half a surrogate pair, which is no text")
        key = f"{prefix}.{name}" if prefix else name
        if name in entries:
            raise PlanError(
                f"{path}:{line}: {key}: given twice, first in line {entries[name].line}; keep one of them"
            )
        entries[name] = _entry(path, value_node, line, key)
    return entries


def _entry(path: Path, node: yaml.Node, line: int, key: str) -> Entry:
    if isinstance(node, yaml.MappingNode):
        return Entry(_mapping(path, node, key), path, line, key)
    if isinstance(node, yaml.SequenceNode):
        items = [_entry(path, item, _line(item), f"{key}[{i}]") for i, item in enumerate(node.value)]
        return Entry(items, path, line, key)
    quoted = isinstance(node, yaml.ScalarNode) and node.style is not None
    if _NO_TEXT.search(node.value):
        raise PlanError(f"{path}:{line}: {key}: holds a NUL or half a surrogate pair, which is no text")
    return Entry(node.value if quoted else _plain_scalar(node.value), path, line, key)


def plan_text(values: Mapping[str, Any]) -> str:
    """Return YAML that `parse_source` parses to these values, without aliases."""
    return yaml.dump(
        dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, encoding=None
    )


class _Dumper(yaml.SafeDumper):
    """PyYAML's writer without aliases; texts are quoted if `parse_source` would parse them as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def text(self, text: str) -> yaml.Node:
        style = None if isinstance(_plain_scalar(text), str) else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.text)


def _plain_scalar(text: str) -> Scalar:
    """Resolve unquoted text. Unlike YAML 1.1, 1e-3 is a number and 1:30 and 010 are text."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if len(text) > MAX_DIGITS:
        return text
    digits = text.replace("_", "")
    if _WHOLE.fullmatch(text):
        return int(digits) if len(digits) < 40 else float(digits)
    if _NUMBER.fullmatch(text) and ("." in text or "e" in text.lower()):
        return float(digits)
    if _SPECIAL.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def _walk(entry: Entry) -> Iterator[Entry]:
    yield entry
    children = list(entry.value.values()) if isinstance(entry.value, dict) else entry.value
    if isinstance(children, list):
        for child in children:
            yield from _walk(child)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1

"""Results of several calls and machines in one file, as long as the experiment stays the same."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_lrpath.files import atomic_write_json, atomic_write_text

SETTINGS = "settings.json"
FREE = ("name", "about", "seed", "seeds", "output", "vary", "points", "show", "paper")
"""Keys that change which results exist, not their values."""


def setting(experiment: Path) -> str:
    """Return a digest of what all results of an experiment depend on: plan and settings of all variations."""
    keys = yaml.safe_load(experiment.read_text(encoding="utf-8"))
    plan = yaml.safe_load((experiment.parent / keys["plan"]).read_text(encoding="utf-8"))
    kept = [{name: value for name, value in part.items() if name not in FREE} for part in (plan, keys)]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def same_setting(results: Path, name: str, experiment: Path) -> bool:
    """Return whether the results `name` in the folder have this setting; record the setting."""
    path = results / SETTINGS
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    digest = setting(experiment)
    before = settings.get(name)
    atomic_write_json(path, dict(sorted({**settings, name: digest}.items())))
    return bool(before == digest)


def add_csv(path: Path, text: str, value: str, keep: bool) -> None:
    """Write CSV; `keep` keeps the lines without a new value. The columns before `value` are the key of a line."""
    old = read_lines(path.read_text(encoding="utf-8")) if keep and path.exists() else [[]]
    header, *new = read_lines(text)
    width = header.index(value)
    lines = {tuple(line[:width]): line for line in [*old[1:], *new]}
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([header, *lines.values()])
    atomic_write_text(path, stream.getvalue())


def read_lines(text: str) -> list[list[str]]:
    """Return the cells of CSV text, the header first."""
    return list(csv.reader(io.StringIO(text)))


def add_records(old: Sequence[Any], new: Sequence[Any], keys: Sequence[str]) -> list[Any]:
    """Return all records; a new record replaces an old one with equal `keys`."""
    records = {tuple(one[key] for key in keys): one for one in [*old, *new]}
    return list(records.values())

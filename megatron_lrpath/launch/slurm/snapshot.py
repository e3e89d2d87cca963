"""The copy of a plan that its jobs read: what was submitted last, whatever happens to the user's file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from megatron_lrpath.files import atomic_write_bytes
from megatron_lrpath.launch.slurm.ledger import FOLDER
from megatron_lrpath.plan import Data, Plan, Tokenizer, load_plan


@dataclass(frozen=True)
class Snapshot:
    """A plan as submitted: `text` of its copy, `plan` what it says (its `path` is still the user's file)."""

    plan: Plan
    text: bytes

    @classmethod
    def of(cls, path: Path, data: str | None = None, output: str | None = None) -> Snapshot:
        """The plan in `path`, with its data and its output elsewhere if they are given.

        `data` is a folder with `tokenizer.model` (where the plan has a file for it) and `slices/`.
        """
        plan, text = load_plan(path), path.read_bytes()
        if data is None and output is None:
            return cls(plan, text)
        changes: dict[tuple[str, ...], str] = {("output",): output} if output is not None else {}
        if data is not None:
            slices = Path(data) / "slices"
            changes |= {
                ("data", "slices"): str(slices),
                ("data", "valid"): str(slices / Path(plan.data.valid).name),
            }
            if plan.tokenizer.model and (Path(data) / Path(plan.tokenizer.model).name).exists():
                changes["tokenizer", "model"] = str(Path(data) / Path(plan.tokenizer.model).name)
        return cls(_changed(plan, changes), with_values(text, changes))

    @property
    def path(self) -> Path:
        """Where the copy lies: a file for every text, so that all ranks of a start read the same."""
        return pinned(self.latest, self.text)

    @property
    def latest(self) -> Path:
        """The copy of the last submission under a name that stays."""
        return Path(self.plan.output) / FOLDER / "plan.yaml"

    def write(self) -> None:
        """Write both files."""
        for path in (self.path, self.latest):
            atomic_write_bytes(path, self.text)


def pinned(latest: Path, text: bytes) -> Path:
    """The file that holds this text for good, beside the latest plan."""
    return latest.parent / "plans" / f"{hashlib.sha256(text).hexdigest()[:12]}.yaml"


def current(latest: Path) -> Path:
    """The copy of the plan that was submitted last.

    A job reads it when it starts, not when it was submitted: a main path that knows a later version already
    would be another plan's to a branch that does not.
    """
    return pinned(latest, latest.read_bytes())


def _changed(plan: Plan, changes: dict[tuple[str, ...], str]) -> Plan:
    """The plan with these values."""
    slices, valid = changes.get(("data", "slices")), changes.get(("data", "valid"))
    data = Data(slices or plan.data.slices, valid or plan.data.valid)
    model = changes.get(("tokenizer", "model"), plan.tokenizer.model)
    tokenizer: Tokenizer = replace(plan.tokenizer, model=model)
    return replace(plan, data=data, tokenizer=tokenizer, output=changes.get(("output",), plan.output))


def with_values(text: bytes, changes: dict[tuple[str, ...], str]) -> bytes:
    """A YAML text with these values at these keys, all other scalars as they were written."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)  # the plan has been loaded
    for keys, value in changes.items():
        _set(root, keys, value)
    serialized = yaml.serialize(root, Dumper=yaml.SafeDumper, allow_unicode=True, encoding="utf-8")
    assert isinstance(serialized, bytes)
    return serialized


def _set(node: yaml.MappingNode, keys: tuple[str, ...], value: str) -> None:
    first, *rest = keys
    pairs = {key.value: number for number, (key, _) in enumerate(node.value)}
    if first not in pairs:
        pairs[first] = len(node.value)
        held = yaml.MappingNode("tag:yaml.org,2002:map", []) if rest else _scalar(value)
        node.value.append((_scalar(first), held))
    key, held = node.value[pairs[first]]
    if rest:
        _set(held, tuple(rest), value)
    else:
        node.value[pairs[first]] = (key, _scalar(value))


def _scalar(text: str) -> yaml.ScalarNode:
    return yaml.ScalarNode("tag:yaml.org,2002:str", text, style='"')

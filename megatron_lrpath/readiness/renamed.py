"""Versions whose names differ between the output and the plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lrpath.data.slice import slice_path
from megatron_lrpath.plan import Plan
from megatron_lrpath.plan.identity import reached
from megatron_lrpath.readiness.finding import FAILED, WARNING, Finding
from megatron_lrpath.runs.folder import RunFolder, read_json_object
from megatron_lrpath.runs.lineage import is_bound, newest_step
from megatron_lrpath.wording import listing


@dataclass(frozen=True)
class Renamed:
    """Version number `number` is `new` in the plan and was `old` when `runs` were trained (folders)."""

    number: int
    new: str
    old: str
    runs: tuple[Path, ...]


def renamed_versions(plan: Plan) -> list[Renamed]:
    """Return versions whose names no run in the output has, if runs there have another name in their place.

    A name at another position of the plan was moved, not changed; the runs' identities detect that.
    """
    trained = list(trained_versions(Path(plan.output)))
    names = {name for _, versions in trained for name in versions}
    planned = [version.name for version in plan.versions]
    found = []
    for index, new in enumerate(planned):
        places: dict[str, list[Path]] = {}
        for folder, versions in trained:
            if index < len(versions) and versions[index] not in planned:
                places.setdefault(versions[index], []).append(folder)
        if new not in names and len(places) == 1:
            [(old, folders)] = places.items()
            found.append(Renamed(index + 1, new, old, tuple(folders)))
    return found


def trained_versions(output: Path) -> Iterator[tuple[Path, list[str]]]:
    """Return every run in the output with a checkpoint, with the names of the versions that it has reached."""
    for folder in sorted(output.glob("*/*")):
        lineage: dict[str, Any] = {}
        if not folder.is_symlink() and folder.is_dir() and is_bound(folder):
            lineage = read_json_object(RunFolder(folder).lineage) or {}
        identity = lineage.get("identity")
        versions = reached(identity, {}, newest_step(folder)).get("versions") if identity else None
        if isinstance(versions, list):
            yield folder, [str(version["name"]) for version in versions]


def renamed_checks(plan: Plan, renamed: list[Renamed]) -> list[Finding]:
    """Return the message about renamed versions.

    It is a failure if the main path has reached the version or its slice has the old name; otherwise the
    version can be a new one in the place of the old one.
    """
    checks = []
    for one in renamed:
        folder = Path(plan.data.slices)
        has_slice = slice_path(folder, one.old).exists() and not slice_path(folder, one.new).exists()
        is_certain = has_slice or plan.folder(plan.main) in one.runs
        found = (
            f"version {one.number} is {one.new} in the plan, and has been trained under its old name {one.old} "
            f"({listing([str(run) for run in one.runs])})"
        )
        advice = (
            f"Name it {one.old} again (a version's name decides its order of samples); or give the plan another "
            "`output`, and draw its slice under the new name."
        )
        checks.append(Finding("versions", FAILED if is_certain else WARNING, found, advice))
    return checks

"""The lineage in a run's folder: the origin of the run, written at the first start, checked at later ones."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_lrpath import __version__
from megatron_lrpath.errors import UserError
from megatron_lrpath.paradigms import PARADIGMS
from megatron_lrpath.plan import Plan, Run, run_identity
from megatron_lrpath.plan import differences as plan_differences
from megatron_lrpath.plan.identity import reached, without_neutral
from megatron_lrpath.plan.secrets import hide_values, hide_words
from megatron_lrpath.runs.breaks import new_break
from megatron_lrpath.runs.checkpoints import (
    checkpoint_fingerprint,
    checkpoint_folder,
    has_begun,
    present_fingerprint,
    steps_found,
)
from megatron_lrpath.runs.failure import now
from megatron_lrpath.runs.folder import RunFolder, read_json_object
from megatron_lrpath.runs.results import completed_step, is_complete
from megatron_lrpath.runs.rewinds import require_no_rewind
from megatron_lrpath.sealed import json_digest, write_sealed

PACKAGES = (
    "megatron-core",
    "torch",
    "numpy",
    "transformer-engine",
    "apex",
    "emerging-optimizers",
    "liger-kernel",
    "sentencepiece",
    "transformers",
)

DRAWN = "first_weights"  # key of the identity: the layout that the first weights depend on
KEPT = ("rewinds",)  # entries of the lineage that each start keeps unchanged

UNDER_A_PLAN = "give the plan another `output` (or move this folder away)"
ANOTHER_SAVE = "give another --save (or move this folder away)"


def package_versions() -> dict[str, str]:
    """Return the versions of the installed packages that a result depends on."""
    found = {"python": platform.python_version(), "megatron-lrpath": __version__}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def git_commit() -> str | None:
    """Return the commit of the running code, with `-dirty` if it was changed; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def read_lineage(folder: Path) -> dict[str, Any] | None:
    """Return the lineage in a run's folder; None before its first start.

    Raises:
        UserError: the file exists and cannot be read.
    """
    problems: list[str] = []
    lineage = read_json_object(RunFolder(folder).lineage, problems)
    if lineage is not None:
        try:
            check_form(lineage)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            problems.append(str(error))
    if problems:
        raise UserError(
            f"{RunFolder(folder).lineage}: not a lineage file ({problems[0]}). Restore it from a backup, or move "
            "the run's folder away to start the run again."
        )
    return lineage


def check_form(lineage: Any) -> None:
    """Check the form of the file. Raise ValueError, KeyError, TypeError or AttributeError."""
    identity, parent, skipped = lineage["identity"], lineage["parent"], lineage.get("skipped", [])
    slices = [identity.get(group, {}) for group in ("slices", "mix_slices")]
    arguments = identity.get("arguments", {})
    forms = {
        "identity": lineage["identity_hash"] == json_digest(identity),
        "slices": all(isinstance(one, str) for group in slices for one in group.values()),
        "arguments": isinstance(arguments, dict),
        "parent": parent is None or isinstance(parent["fingerprint"], str),
        "starts": isinstance(lineage["starts"], list)
        and all(
            isinstance(start.get("plan"), str | None)
            and isinstance(start.get("save_retain_interval"), int | None)
            for start in lineage["starts"]
        ),
        "skipped": isinstance(skipped, list) and all(isinstance(one["step"], int) for one in skipped),
        "rewinds": all(
            isinstance(one["to_step"], int)
            and isinstance(one["number"], int)
            and isinstance(one["dropped"], list)
            for one in lineage.get("rewinds", [])
        ),
    }
    wrong = [name for name, right in forms.items() if not right]
    if wrong:
        raise ValueError(f"damaged: {', '.join(wrong)}")


def differences(stored: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Return the differences of two identities of a run: plan, data, tokenizer file, further arguments.

    The main path may have more versions now than when it was stored.
    """
    found = plan_differences(stored, current)
    for group in ("slices", "mix_slices"):
        old, new = stored.get(group, {}), current.get(group, {})
        found += [
            f"slice {name} holds other documents (fingerprint {old[name][:12]}, now {new[name][:12]})"
            for name in old
            if name in new and old[name] != new[name]
        ]
    if stored.get("tokenizer_model") != current.get("tokenizer_model"):
        found.append("the tokenizer's model file has changed")
    if stored.get("sft_data") != current.get("sft_data"):
        found.append("the prepared chat data have changed")
    old, new = (without_neutral(one.get("arguments", {})) for one in (stored, current))
    found += [
        f"argument {name}: was {old.get(name, 'not given')}, is {new.get(name, 'not given')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    return found


def trained_tokens(lineage: Mapping[str, Any], step: int) -> int | None:
    """Return the tokens of a step (from 1) of the run with this lineage; None if they are not recorded."""
    identity = lineage.get("identity")
    sizes = (identity.get("sft") or identity.get("batch")) if isinstance(identity, dict) else None
    numbers = (
        [sizes.get(name) for name in ("global_batch_size", "seq_length")] if isinstance(sizes, dict) else []
    )
    whole = [number for number in numbers if isinstance(number, int)]
    if len(whole) != 2 or not isinstance(identity, dict):
        return None
    adopted = identity.get("adopted")
    begin = adopted.get("step", 0) if isinstance(adopted, dict) else 0
    size = whole[0]
    for version in [] if identity.get("sft") else identity.get("versions") or []:
        if not isinstance(version, dict) or not isinstance(version.get("steps"), int):
            break
        own = version.get("global_batch_size")
        size = own if isinstance(own, int) and step > begin else size
        begin += version["steps"]
    return size * whole[1]


def is_bound(folder: Path) -> bool:
    """Return whether the run in `folder` is bound to its settings: it has a checkpoint, or is complete."""
    return has_begun(RunFolder(folder).checkpoints) or completed_step(folder) is not None


def is_plan_bound(plan: Plan) -> bool:
    """Return whether a pre-training run of the plan is bound to its settings, and so to the plan's arguments."""
    return any(is_bound(plan.folder(run)) for paradigm in PARADIGMS for run in plan.runs(paradigm))


def newest_step(folder: Path) -> int:
    """Return the newest step that the run in `folder` has kept; 0 without a checkpoint."""
    return max([*steps_found(RunFolder(folder).checkpoints), completed_step(folder) or 0])


def changes(
    folder: Path, lineage: dict[str, Any], plan: Plan, run: Run, current: dict[str, Any] | None = None
) -> list[str]:
    """Return the differences between the settings of the run in `folder` and `plan`; none before a checkpoint.

    A complete main path that continued for versions that the plan no longer has counts as the plan's.

    Args:
        folder: the run's folder.
        lineage: its content.
        plan: the plan.
        run: the run in it.
        current: the identity to compare with (default: the identity under the plan alone).
    """
    stored, current = lineage.get("identity"), current or run_identity(plan, run)
    if not isinstance(stored, dict) or not is_bound(folder):
        return []
    versions = stored.get("versions")
    if not run.makes_version and isinstance(versions, list) and is_complete(folder, run):
        stored = stored | {"versions": versions[: len(current["versions"])]}
    compare = differences if "tokenizer_model" in current else plan_differences
    return compare(reached(stored, current, newest_step(folder)), current)


def check_same_run(folder: Path, identity: dict[str, Any], anew: str = UNDER_A_PLAN) -> None:
    """Raise UserError if the run cannot continue under this identity because its result would differ.

    `anew` is the advice on how to train under the new settings.

    Raises:
        UserError: lists the differences, and what to do.
    """
    lineage = read_lineage(folder)
    require_no_rewind(folder, lineage)
    if lineage is not None:
        stored = reached(lineage["identity"], identity, newest_step(folder))
        refuse_differences(folder, differences(stored, identity), anew)


def record_rewind(folder: Path, rewind: dict[str, Any]) -> None:
    """Record a rewind (`number`, `to_step`, `finished`, …) or its end; remove later skipped updates."""
    lineage = read_lineage(folder)
    if lineage is None:
        return
    others = [one for one in lineage.get("rewinds", []) if one["number"] != rewind["number"]]
    lineage["rewinds"] = [*others, rewind]
    lineage["skipped"] = [one for one in lineage.get("skipped", []) if one["step"] <= rewind["to_step"]]
    write_sealed(RunFolder(folder).lineage, lineage)


def refuse_differences(folder: Path, found: list[str], anew: str = UNDER_A_PLAN) -> None:
    """Raise UserError if there are differences.

    Raises:
        UserError: lists the differences, and what to do.
    """
    if found:
        raise UserError(
            f"{folder}: this run was started under other settings: "
            + "; ".join(found)
            + f". Restore the settings it was started with, or {anew} to train again."
        )


def check_same_parent(folder: Path, parent: Path, step: int) -> None:
    """Refuse a parent that differs from the parent from which the run by --lr-path in `folder` started.

    A parent may be moved; a parent without its checkpoint is recognized by its folder.

    Raises:
        UserError: the two checkpoints differ, or cannot be compared.
    """
    lineage = read_lineage(folder)
    recorded = lineage["parent"] if lineage is not None else None
    if recorded is None:
        return
    was, now_there = Path(recorded["checkpoints"]), present_fingerprint(parent, step)
    is_named_alike = parent == was or parent.resolve() == was.resolve()
    if now_there == recorded["fingerprint"] or (now_there is None and is_named_alike):
        return
    what = (
        "is gone, so that it cannot be compared with the parent" if now_there is None else "is not the parent"
    )
    raise UserError(
        f"{parent}: the checkpoint of step {step} {what} that {folder} was started from "
        f"({was}, step {recorded['step']}). Restore it, name that parent, or {ANOTHER_SAVE} to branch off again."
    )


def check_parent(folder: Path, parent: Path, step: int, parent_identity: dict[str, Any]) -> None:
    """Refuse a parent that was trained under another plan, or has changed since this run started from it.

    Args:
        folder: this run's folder.
        parent: the parent's run folder; it contains the parent's checkpoints.
        step: the step of the checkpoint from which this run starts.
        parent_identity: the identity of the parent according to the present plan.
    """
    lineage = read_lineage(parent)
    require_no_rewind(parent, lineage)
    stored = reached(lineage["identity"], parent_identity, step) if lineage is not None else {}
    if lineage is not None and (found := differences(stored, parent_identity)):
        raise UserError(
            f"{parent}: the parent was trained under another plan: "
            + "; ".join(found)
            + ". Use the plan it was trained with, or train the parent again under another `output`."
        )
    require_same_parent(folder, parent, step)


def require_same_parent(folder: Path, parent: Path, step: int) -> None:
    """Refuse a parent whose checkpoint differs from the checkpoint from which the run in `folder` started.

    A run with its own checkpoints does not need its parent's; a run without any is bound to no parent.

    Raises:
        UserError: the checkpoint differs.
    """
    own = read_lineage(folder)
    root = RunFolder(parent).checkpoints
    if own is None or not own["parent"] or not is_bound(folder) or not checkpoint_folder(root, step).is_dir():
        return
    if own["parent"]["fingerprint"] != checkpoint_fingerprint(root, step):
        raise UserError(
            f"{root}: the checkpoint of step {step} is not the parent that {folder.name} was "
            "started from. Restore it, or move this run's folder away to branch off again."
        )


def drawn_facts(first_weights: dict[str, Any] | None, recorded: dict[str, Any]) -> dict[str, Any]:
    """Return an identity's entry for the layout that the first weights depend on; {} without such a layout.

    The start that draws the weights determines it; later starts, at any layout, resume from a checkpoint and
    keep it. A run that an older release began has no such entry.

    Args:
        first_weights: of a start that draws the weights, see `write_lineage`.
        recorded: the identity in the lineage.
    """
    if first_weights is None:
        return {name: recorded[name] for name in (DRAWN,) if name in recorded}
    sizes = {name: size for name, size in first_weights.items() if name != "device"}
    return {DRAWN: sizes} if sizes else {}


def drawn_otherwise(plan: Plan, run: Run, first_weights: dict[str, Any]) -> list[str]:
    """Return a plan's runs with random weights of another layout, as `PARADIGM/NAME (size 1, size 2)`.

    Args:
        plan: the plan.
        run: the run that draws its first weights now.
        first_weights: of this start, see `write_lineage`.
    """
    own = drawn_facts(first_weights, {}).get(DRAWN)
    found = []
    for other in (one for paradigm in PARADIGMS for one in plan.runs(paradigm) if own and one.parent is None):
        folder = plan.folder(other)
        lineage = None
        with suppress(UserError):  # that run's own start reports a damaged lineage
            lineage = read_lineage(folder) if folder != plan.folder(run) else None
        theirs = lineage["identity"].get(DRAWN) if lineage is not None else None
        if theirs and theirs != own:
            sizes = ", ".join(f"{name} {size}" for name, size in theirs.items())
            found.append(f"{other.paradigm}/{other.name} ({sizes})")
    return found


def write_lineage(
    folder: Path,
    identity: dict[str, Any],
    parent: dict[str, Any] | None,
    first_step: int,
    world_size: int,
    retain_interval: int | None,
    plan: str | None = None,
    first_weights: dict[str, Any] | None = None,
    machine: Mapping[str, Any] | None = None,
) -> list[str]:
    """Record a start: the identity (as of this start), time, command, environment, checkpoint retention.

    `first_weights` is the layout at which the weights are drawn, in the start that draws them; `machine` are
    its `device`, `layout` and, on a GPU, `kernels`. Return the differences that make the start a break, see
    `runs.breaks`.
    """
    earlier = read_lineage(folder) or {"parent": parent, "starts": []}
    launch = os.environ.get("LRPATH_LAUNCH")  # the launcher's file about the machines of this start
    start = {
        "time": now(),
        "step": first_step,
        "host": platform.node(),
        "world_size": world_size,
        "save_retain_interval": retain_interval,
        "packages": package_versions(),
        "git_commit": git_commit(),
        "command": hide_words(sys.argv),
        "plan": plan,
        "launch": without_secrets(read_json_object(Path(launch)) if launch else None),
    }
    if first_weights is not None:
        start["first_weights"] = first_weights
    identity = identity | drawn_facts(first_weights, earlier.get("identity", {}))
    start |= machine or {}
    found = new_break(earlier["starts"], start)
    if found:
        start["break"] = found
    lineage = {
        "identity": identity,
        "identity_hash": json_digest(identity),
        "parent": earlier["parent"],
        "starts": [*earlier["starts"], start],
        "skipped": [one for one in earlier.get("skipped", []) if one["step"] <= first_step],
    }
    lineage |= {name: earlier[name] for name in KEPT if name in earlier}
    write_sealed(RunFolder(folder).lineage, lineage)
    return found


def write_adopted(folder: Path, identity: dict[str, Any], parent: dict[str, Any]) -> None:
    """Record a run that begins with the checkpoint of another training, before its first start."""
    lineage = {
        "identity": identity,
        "identity_hash": json_digest(identity),
        "parent": parent,
        "starts": [],
        "skipped": [],
    }
    write_sealed(RunFolder(folder).lineage, lineage)


def without_secrets(launch: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the launcher's record without the values of variables with secrets."""
    if launch is None:
        return None
    return {name: hide_values(one) if isinstance(one, dict) else one for name, one in launch.items()}


def forget(folder: Path) -> None:
    """Remove the lineage of a run that has nothing to continue from, before it begins again."""
    RunFolder(folder).lineage.unlink(missing_ok=True)


def retain_intervals(folder: Path) -> list[int | None]:
    """Return the --save-retain-interval of a run's starts, None for a start that kept all checkpoints."""
    recorded = read_lineage(folder)
    key = "save_retain_interval"
    return [start[key] for start in recorded["starts"] if key in start] if recorded else []


def add_skipped(folder: Path, record: dict[str, Any]) -> None:
    """Record a batch whose update was skipped for a loss spike: `step`, `samples` (first, last), losses."""
    lineage = read_lineage(folder)
    if lineage is not None:
        lineage["skipped"] = [*lineage.get("skipped", []), record]
        write_sealed(RunFolder(folder).lineage, lineage)

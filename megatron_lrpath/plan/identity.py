"""The identity of a run: everything that its result depends on; compared at a resume or a branch."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from typing import Any

from megatron_lrpath.models import resolve_model
from megatron_lrpath.paradigms import BRANCH, MAIN, OURS, PTFS, SCRATCH
from megatron_lrpath.plan.arguments import is_neutral
from megatron_lrpath.plan.plan import Plan
from megatron_lrpath.plan.runs import Run
from megatron_lrpath.plan.spec import Version
from megatron_lrpath.schedule import STYLES, LRPath

_COMPARED = (
    "run", "kind", "order", "model", "batch", "tokenizer", "megatron", "branch_megatron", "seed", "mix", "sft",
    "sft_megatron", "weight_decay", "adopted",
)  # fmt: skip
THIS_RUN = "this run"
_LABELS = {
    "order": "order of the samples",
    "mix": "branch mix",
    "sft_megatron": "sft.megatron",
    "weight_decay": "weight decay",
}


def run_identity(plan: Plan, run: Run) -> dict[str, Any]:
    """Return everything that the run's result depends on and nothing else, JSON-serializable.

    `versions` lists name and steps of every version read up to the run's end, `path` the learning rate of
    every ancestor and of the run itself. Appending a version changes neither for the earlier runs; for the
    main path it only makes `versions` longer, because its rate has no end and branch points do not bend it.
    The micro batch, the parallel layout, folders, logging and the like are excluded (see `plan.arguments`);
    the data are identified by the slices' own fingerprints. A run that equals another run (`same_as`) has
    that run's identity. A fine-tuning depends on everything that its version's model depends on, and on its
    own.
    """
    run = plan.carried_out(run)
    trained, last = (plan.parent_of(run), [run]) if run.is_sft else (run, [])
    count = trained.version_index if trained.makes_version else len(trained.slices)
    batch = {"global_batch_size": plan.batch.global_batch_size, "seq_length": plan.batch.seq_length}
    extra: dict[str, Any] = {}  # a branch without a mix has the identity of releases before mixes
    if plan.adopted is not None:
        extra |= {"adopted": plan.adopted.facts()}
    if trained.mix:
        extra |= {"mix": trained.mix.to_dict()}
    if trained.kind == BRANCH.name and (own := branch_arguments(plan, plan.versions[count - 1])):
        extra |= {"branch_megatron": own}
    if run.is_sft and plan.sft:
        extra |= {"sft": plan.sft.facts(), "sft_megatron": _telling(plan.sft.megatron)}
    return {
        "run": run.name,
        "seed": plan.seed,
        "model": _telling(resolve_model(plan.model)),
        "megatron": _telling(plan.megatron),
        "batch": batch,
        "tokenizer": asdict(plan.tokenizer),
        "order": "shuffled together" if trained.kind == SCRATCH.name and count > 1 else "one after the other",
        "versions": [_version_facts(plan, trained, version) for version in plan.versions[:count]],
        "path": [{"run": stage.name} | path_facts(stage.path) for stage in _lineage(plan, trained) + last],
    } | extra


def branch_arguments(plan: Plan, version: Version) -> dict[str, Any]:
    """Return the Megatron arguments in which a version's branch differs from the main path."""
    base = _telling(plan.megatron)
    return {
        name: value for name, value in _telling(version.branch_megatron).items() if base.get(name) != value
    }


def _version_facts(plan: Plan, run: Run, version: Version) -> dict[str, Any]:
    """Return the facts of a version that a run has read; for main path and branches, also its rate.

    These facts belong to the version and not to the path, so that a main path can continue into appended versions.
    This includes a batch size that changes where the version begins.
    """
    facts: dict[str, Any] = {"name": version.name, "steps": version.steps}
    if run.paradigm == OURS.name and version.max_lr is not None:
        facts |= {"max_lr": version.max_lr, "rate_steps": plan.timeline.rate_steps(version)}
    if version.replay is not None:  # from scratch, only the number of its new samples counts
        replay = version.replay.to_dict()
        facts["replay"] = {"share": replay["share"]} if run.paradigm == PTFS.name else replay
    step = plan.timeline.begins[plan.versions.index(version)]
    if (size := plan.batch_sizes.size_of(step + 1)) != plan.batch_sizes.size_of(step):
        facts["global_batch_size"] = size
    return facts


def argument_identity(
    kind: str,
    path: LRPath,
    batch: dict[str, Any],
    weight_decay: dict[str, Any],
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """Return everything that the result of a run by --lr-path depends on; its data are among the arguments.

    A main path has no end, so that extending it does not change it.

    Args:
        kind: main, branch, scratch or continual.
        path: the run's learning rate.
        batch: global_batch_size, seq_length.
        weight_decay: the constant, or the ramp with its length in steps.
        arguments: the others that a result depends on, if they differ from their defaults.
    """
    return {
        "kind": kind,
        "batch": batch,
        "weight_decay": weight_decay,
        "path": [{"run": THIS_RUN} | path_facts(path)],
        "arguments": dict(sorted(arguments.items())),
    }


def differences(stored: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Return the differences between two identities of a run, a line each; empty if the run may continue.

    The main path may have more versions now than when it was stored: it continues into them.
    """
    # as read back from a file: lists instead of tuples, so that both sides compare equal
    stored, current = (_comparable(json.loads(json.dumps(identity))) for identity in (stored, current))
    if stored.get("tokenizer_model"):  # the digest of a file, which may be in another folder now
        stored, current = _with_file_name(stored), _with_file_name(current)
    lines = []
    for name in _COMPARED:
        lines += _compare(_LABELS.get(name, name), stored.get(name), current.get(name))
    lines += _compare_versions(stored, current)
    return lines + _compare_paths(stored.get("path", []), current.get("path", []))


def reached(stored: dict[str, Any], current: dict[str, Any], step: int) -> dict[str, Any]:
    """Return the identity that a main path at `step` must keep, to compare with `current`.

    A version that no checkpoint has reached may change, including its data. The samples of the version that
    contains `step` do not depend on its length, which may change as long as the version contains the step.
    Other runs must keep all of theirs.
    """
    if stored.get("run") != MAIN.prefix:
        return stored
    bound: list[dict[str, Any]] = []
    end = (stored.get("adopted") or {}).get("step", 0)
    for before in stored.get("versions", []):
        if end >= step:
            break
        start, end = end, end + before["steps"]
        bound.append(dict(before))
    if bound and end > step:
        now = current.get("versions", [])[len(bound) - 1 :][:1]
        if now and now[0]["name"] == bound[-1]["name"] and start + now[0]["steps"] >= step:
            bound[-1] |= {"steps": now[0]["steps"]}
    names = {version["name"] for version in bound}
    slices = {name: print_ for name, print_ in stored.get("slices", {}).items() if name in names}
    return stored | {"versions": bound} | ({"slices": slices} if "slices" in stored else {})


def without_neutral(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that change the result; an older version may have stored others."""
    return {name: value for name, value in arguments.items() if not is_neutral(name)}


def _comparable(identity: dict[str, Any]) -> dict[str, Any]:
    groups = (name for name in ("model", "megatron", "sft_megatron") if isinstance(identity.get(name), dict))
    return identity | {name: without_neutral(identity[name]) for name in groups}


def _with_file_name(identity: dict[str, Any]) -> dict[str, Any]:
    """Return the identity with the tokenizer's file by its name alone."""
    tokenizer = identity.get("tokenizer")
    if not isinstance(tokenizer, dict) or not isinstance(tokenizer.get("model"), str):
        return identity
    return identity | {"tokenizer": tokenizer | {"model": os.path.basename(tokenizer["model"])}}


def _lineage(plan: Plan, run: Run) -> list[Run]:
    """Return the run and its ancestors, oldest first."""
    chain = [run]
    while chain[0].parent:
        parent = plan.run(run.paradigm, chain[0].parent.run)
        chain.insert(0, parent)
    return chain


def path_facts(path: LRPath) -> dict[str, Any]:
    """Return what a learning-rate path depends on: only the parameters that its shape and style read."""
    schedule = path.schedule
    facts: dict[str, Any] = {"shape": path.shape, "start": path.start}
    if path.shape == "floor":
        return facts | {"end": path.end, "min_lr": schedule.min_lr}
    facts["max_lr"] = schedule.max_lr
    if path.shape == "plateau":
        facts |= {"warmup": path.warmup}
        if path.main is not None and path.main.power:  # its rate changes belong to the versions
            facts |= {"power": path.main.power, "from": path.main.begin, "min_lr": schedule.min_lr}
        return facts
    if path.peak is not None:
        facts["peak"] = path.peak
    style = STYLES[schedule.style]
    cycle = path.end - path.start if path.cycle is None else path.cycle
    facts |= {"end": path.end, "min_lr": schedule.min_lr, "style": schedule.style}
    facts["cycle"] = "inf" if math.isinf(cycle) else cycle
    if path.shape == "whole":
        facts["warmup"] = path.warmup
        if not style.has_cycle and not path.warmup:
            facts["time_scale"] = schedule.warmup
    for knob in style.whole_knobs if path.shape == "whole" else style.branch_knobs:
        value = getattr(schedule, knob)
        facts[knob] = list(value) if isinstance(value, tuple) else value
    return facts


def _telling(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that change the result; false equals an omitted argument."""
    kept = {name: value for name, value in without_neutral(arguments).items() if value is not False}
    return dict(sorted(kept.items()))


def _compare(label: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        return [
            _changed(f"{label}.{name}", old.get(name), new.get(name))
            for name in names
            if old.get(name) != new.get(name)
        ]
    return [] if old == new else [_changed(label, old, new)]


def _compare_versions(stored: dict[str, Any], current: dict[str, Any]) -> list[str]:
    old, new = stored.get("versions", []), current.get("versions", [])
    lines = [
        _changed(f"version {number}", _version(before), _version(after))
        for number, (before, after) in enumerate(zip(old, new, strict=False), start=1)
        if before != after
    ]
    lines += [f"{_version(version)} was there and is gone" for version in old[len(new) :]]
    if stored.get("run") != MAIN.prefix:
        lines += [f"{_version(version)} was not there" for version in new[len(old) :]]
    return lines


def _compare_paths(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    if [stage["run"] for stage in old] != [stage["run"] for stage in new]:
        chains = (" → ".join(stage["run"] for stage in stages) for stages in (old, new))
        return [_changed("chain of runs", *chains)]
    lines = []
    for before, after in zip(old, new, strict=True):
        lines += _compare(f"learning rate of {after['run']}", before, after)
    return lines


def _version(version: dict[str, Any]) -> str:
    text = f"{version['name']} with {version['steps']} steps"
    if "max_lr" in version:
        text += f" at {version['max_lr']:g}, reached in {version['rate_steps']}"
    if "replay" in version:
        weights = version["replay"].get("weights", {})
        own = f" ({', '.join(f'{name}: {weight}' for name, weight in weights.items())})" if weights else ""
        text += f", a replay of {version['replay']['share']}{own}"
    if "global_batch_size" in version:
        text += f" of {version['global_batch_size']} samples each"
    return text


def _changed(label: str, old: Any, new: Any) -> str:
    old, new = ("not given" if value is None else value for value in (old, new))
    return f"{label}: was {old}, is {new}"

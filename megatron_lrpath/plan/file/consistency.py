"""Check the constraints between the keys of a plan: orders, warm-ups, branch points, cycles."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_lrpath.models import resolve_model, shape_problems
from megatron_lrpath.paradigms import BRANCH, CONTINUAL, CPT_VARIANTS, KEEP_MIN, KINDS, OURS, SCRATCH
from megatron_lrpath.plan.file.source import Entry, Source
from megatron_lrpath.plan.plan import Plan
from megatron_lrpath.plan.secrets import hide_text
from megatron_lrpath.plan.spec import SAVE_INTERVAL, Version

SECTIONS: tuple[str, ...] = ("model", "megatron")
"""Sections of a plan with the Megatron arguments of its pre-training."""


def check_plan(source: Source, plan: Plan) -> None:
    """Raise PlanError for the first inconsistency in the plan."""
    batch = plan.batch
    if batch.global_batch_size % batch.micro_batch_size:
        raise source.find("batch.global_batch_size").error(
            f"{batch.global_batch_size} is not a multiple of micro_batch_size {batch.micro_batch_size}; "
            "every step needs whole micro batches"
        )
    for check in (
        _check_adopted,
        _check_batch_sizes,
        _check_names,
        _check_replays,
        _check_warmup,
        _check_rates,
        _check_branches,
        _check_reached,
        _check_cycles,
        _check_mixes,
        _check_archive,
        _check_saves,
        _check_precision,
        _check_shape,
        _check_recomputation,
    ):
        check(source, plan)


def _check_adopted(source: Source, plan: Plan) -> None:
    """Allow only `ours` to continue another training; the other paradigms would need its data, or its decay."""
    if plan.adopted is None:
        return
    pretrained = plan.megatron.get("pretrained_checkpoint")
    if plan.adopted.is_imported:
        if pretrained != plan.adopted.checkpoint:
            raise source.find("adopted.checkpoint").error(
                f"the runs do not begin with it: pretrained_checkpoint in `megatron` is {pretrained or 'missing'}; "
                "name the same in both, or remove `adopted` and call `lrpath adopt` again"
            )
        if plan.adopted.samples:
            raise source.find("adopted.samples").error(
                "an imported model, step 0, has consumed no samples; give 0"
            )
        return
    if not plan.adopted.samples:
        raise source.find("adopted.samples").error(
            "a checkpoint of a later step has consumed samples; give them"
        )
    others = [name for name in (plan.paradigms or ()) if name != OURS.name]
    if others:
        raise source.find("paradigms").error(
            f"{others[0]} cannot be trained: the main path begins with an adopted checkpoint, whose data or decay the "
            f"others would need; leave {others[0]} out"
        )
    if pretrained:
        raise source.find("megatron.pretrained_checkpoint", "megatron").error(
            "the main path begins with the adopted checkpoint; leave pretrained_checkpoint out"
        )


def _check_batch_sizes(source: Source, plan: Plan) -> None:
    """Raise PlanError if a version has a smaller batch than before: Megatron's loop does not support that."""
    before, micro = plan.batch.global_batch_size, plan.batch.micro_batch_size
    for index, version in enumerate(plan.versions):
        size = version.global_batch_size
        if size is None:
            continue
        place = source.find(f"versions[{index}].global_batch_size")
        if index == 0:
            raise place.error("the first version's batch size is batch.global_batch_size; set it there")
        if size < before:
            raise place.error(
                f"{size} samples are fewer than the {before} of the version before; Megatron refuses a batch that "
                f"shrinks; give at least {before}"
            )
        if size % micro:
            raise place.error(
                f"{size} is not a multiple of micro_batch_size {micro}; every step needs whole micro batches"
            )
        before = size


def _check_names(source: Source, plan: Plan) -> None:
    seen: dict[str, str] = {}
    newest: dict[tuple[str, ...], Version] = {}
    validation = {os.path.normpath(path) for path in (plan.data.valid, *plan.data.more_valid)}
    for index, version in enumerate(plan.versions):
        place = source.find(f"versions[{index}].name")
        same = seen.setdefault(version.name.casefold(), f"version {index + 1}")
        if same != f"version {index + 1}":
            raise place.error(f"{version.name!r} is the name of {same} already; choose another")
        letters, numbers = _parts(version.name)
        before = newest.get(letters)
        if before and _parts(before.name)[1] >= numbers:
            raise place.error(
                f"{version.name!r} comes after {before.name!r}: versions out of order; list the oldest first"
            )
        newest[letters] = version
        if os.path.normpath(Path(plan.data.slices) / version.name) in validation:
            raise place.error(f"{version.name!r} is the validation slice; choose another name")


def _check_saves(source: Source, plan: Plan) -> None:
    """Raise PlanError if a kept step is not a multiple of save_interval: Megatron saves only at multiples."""
    interval = plan.megatron.get("save_interval") or SAVE_INTERVAL
    retained = plan.megatron.get("save_retain_interval")
    if retained and retained % interval:
        raise source.find("megatron.save_retain_interval").error(
            f"{retained} is not a multiple of save_interval {interval}; "
            f"give {interval * max(1, retained // interval)}, or another save_interval"
        )


def _check_precision(source: Source, plan: Plan) -> None:
    """Refuse bf16 and fp16 together: Megatron trains in one precision."""
    for section in ("megatron", "sft.megatron") if plan.sft else ("megatron",):
        arguments = plan.megatron if section == "megatron" else plan.sft_megatron
        if arguments.get("bf16") and arguments.get("fp16"):
            raise source.find(f"{section}.fp16", f"{section}.bf16", "megatron.fp16").error(
                "a run has one precision; leave bf16 or fp16 out"
            )


def _check_shape(source: Source, plan: Plan) -> None:
    """Check that heads, groups, layers, ranks and positions fit, also those of the fine-tunings."""
    parts = [(plan.megatron, plan.batch.seq_length, SECTIONS)]
    if plan.sft:
        parts.append((plan.sft_megatron, plan.sft.batch.seq_length, ("sft.megatron", *SECTIONS)))
    for arguments, length, sections in parts:
        for names, problem in shape_problems(resolve_model(plan.model) | arguments, length):
            raise _argument(source, *names, sections=sections).error(problem)


def _check_recomputation(source: Source, plan: Plan) -> None:
    """Check that the recomputation of whole layers has a method; Megatron reports it when a run starts."""
    names = ("recompute_method", "recompute_num_layers")
    missing = [name for name in names if plan.megatron.get(name) in (None, False)]
    if plan.megatron.get("recompute_granularity") == "full" and missing:
        raise _argument(source, "recompute_granularity").error(
            f"`full` needs {' and '.join(missing)} as well; e.g. recompute_method: uniform, recompute_num_layers: 1"
        )


def _argument(source: Source, *names: str, sections: Sequence[str] = SECTIONS) -> Entry:
    """Return the first of these arguments in these sections, with `_` or `-`; otherwise the section `model`."""
    spelled = [spelling for name in names for spelling in (name, name.replace("_", "-"))]
    return source.find(*(f"{section}.{name}" for section in sections for name in spelled), "model")


def _check_archive(source: Source, plan: Plan) -> None:
    if plan.archive is None:
        return
    place = source.find("archive")
    if not re.match(r"[a-z][a-z0-9+.-]*://.", plan.archive):
        raise place.error(
            f"{plan.archive!r} is no address; write it as s3://BUCKET/FOLDER (or file:///FOLDER)"
        )
    if hide_text(plan.archive) != plan.archive or "@" in plan.archive.split("/")[2]:
        raise place.error(
            "holds credentials, which do not belong in a plan; give them in the environment (for S3 AWS_PROFILE, or "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )


def _parts(name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the letters and the numbers of a name: ("v", "-b"), (2, 10) for v2-b10."""
    parts = re.split(r"([0-9]+)", name)
    return tuple(parts[::2]), tuple(int(number) for number in parts[1::2])


def _check_replays(source: Source, plan: Plan) -> None:
    new: dict[str, int] = {}  # samples of the versions so far
    for index, version in enumerate(plan.versions):
        replay, place = version.replay, source.find(f"versions[{index}].replay")
        earlier, new = new, new | {version.name: plan.samples_of(index)}
        if replay is None:
            continue
        if not earlier:
            raise place.error("the first version has no earlier data to replay; leave it out")
        for name, _ in replay.weights:
            if name not in earlier:
                raise source.find(f"versions[{index}].replay.weights.{name}").error(
                    f"{name!r} is no version before {version.name}; those are {', '.join(earlier)}"
                )
        batch = plan.timeline.sizes[index]
        samples = version.steps * batch
        if not replay.replayed(samples):
            raise place.error(
                f"{float(replay.share):g} of {version.steps} steps of {batch} samples is less than one sample; give a "
                "larger share"
            )
        if new[version.name] < batch:
            raise place.error(
                f"{float(replay.share):g} of {version.steps} steps leaves less than a step of new data; give a smaller "
                "share"
            )
        wanted = replay.by_version(samples) or {"earlier versions": replay.replayed(samples)}
        there = earlier if replay.weights else {"earlier versions": sum(earlier.values())}
        for name, count in wanted.items():
            if count > there[name]:
                raise place.error(
                    f"{version.name} would draw {count:,} samples again from {name} with {there[name]:,}, some of "
                    "them twice; give a smaller share"
                    + (f", or {name} a smaller weight" if replay.weights else "")
                )


def _check_warmup(source: Source, plan: Plan) -> None:
    warmup = plan.schedule.warmup
    if plan.adopted is not None and not plan.adopted.is_imported:
        return  # its warm-up is complete
    repeated = CPT_VARIANTS[plan.cpt_variant].warms_up
    for index, version in enumerate(plan.versions if repeated else plan.versions[:1]):
        if version.steps <= warmup:
            kind = CONTINUAL if index else SCRATCH
            raise source.find("schedule.warmup_steps").error(
                f"a warm-up of {warmup} steps fills all {version.steps} steps of {kind.run_name(version.name)}; "
                "a run needs steps after its warm-up"
            )


def _check_rates(source: Source, plan: Plan) -> None:
    schedule = plan.schedule
    if plan.falling is not None and plan.falling.begin < schedule.warmup:
        raise source.find("schedule.main.from").error(
            f"step {plan.falling.begin} lies inside the warm-up of {schedule.warmup} steps; give at least "
            f"{schedule.warmup}"
        )
    for index, version in enumerate(plan.versions):
        place = source.find(f"versions[{index}].max_lr")
        if version.max_lr is None:
            if version.rate_steps is not None:
                raise source.find(f"versions[{index}].rate_steps").error(
                    f"{version.name} has no max_lr of its own to move to; give one, or leave rate_steps out"
                )
            continue
        if index == 0:
            raise place.error("the first version's rate is schedule.max_lr; set it there")
        if plan.falling is not None:
            raise place.error("the main path falls by schedule.main; leave one of them out")
        if version.max_lr < schedule.min_lr:
            raise place.error(f"{version.max_lr} is below min_lr {schedule.min_lr}; a decay goes downwards")


def _check_branches(source: Source, plan: Plan) -> None:
    line = plan.timeline
    for number, step in enumerate(plan.also_branch_at):
        if step < line.origin:
            raise source.find(f"also_branch_at[{number}]").error(
                f"step {step} lies before the adopted checkpoint, step {line.origin}; give a later one"
            )
        if step > line.ends[-1]:
            raise source.find(f"also_branch_at[{number}]").error(
                f"step {step} lies beyond the last version's end, step {line.ends[-1]}; give an earlier one"
            )
    for index, version in enumerate(plan.versions):
        place = source.find(f"versions[{index}].alpha", "alpha", f"versions[{index}].steps")
        alpha = version.alpha or plan.alpha
        steps, point = line.branch_steps[index], line.branch_points[index]
        if index == 0 and alpha > 1:
            raise place.error(
                f"the first version's alpha may be at most 1, not {alpha:g}: nothing is before its data"
            )
        if steps < 1:
            problem = f"last round({alpha} · {version.steps}) = 0 steps; give a larger alpha or more steps"
        elif point < line.origin:
            most = line.ends[index] - line.origin
            problem = f"last {steps} steps, more than the {most} up to its end; give a smaller alpha"
        elif line.origin:
            continue
        elif point < plan.schedule.warmup:
            problem = (
                f"leave the main path at step {point}, inside its warm-up of {plan.schedule.warmup} steps; "
                "give a smaller alpha, more steps or a shorter warm-up"
            )
        elif point < 1:
            problem = "leave the main path at step 0, where there is no checkpoint; give a smaller alpha"
        else:
            continue
        raise place.error(f"{BRANCH.run_name(version.name)} would {problem}")


def _check_reached(source: Source, plan: Plan) -> None:
    """Check that a branch leaves the main path after the main path has reached its version's rate."""
    line, moved = plan.timeline, None
    for index, version in enumerate(plan.versions):
        moved = index if version.max_lr is not None else moved
        if moved is None:
            continue
        origin = plan.versions[moved]
        begin, over, point = line.begins[moved], line.rate_steps(origin), line.branch_points[index]
        if point < begin + over:
            places = (
                f"versions[{index}].alpha",
                f"versions[{moved}].rate_steps",
                f"versions[{moved}].max_lr",
            )
            shorter = f"rate_steps of at most {point - begin}, or " if point >= begin else ""
            raise source.find(*places).error(
                f"{BRANCH.run_name(version.name)} would leave the main path at step {point}, before it has the rate "
                f"{origin.max_lr:g} of {origin.name} (at step {begin + over}); give {shorter}a smaller alpha"
            )


def _check_cycles(source: Source, plan: Plan) -> None:
    line = plan.timeline
    for index, version in enumerate(plan.versions):
        lengths = {SCRATCH.name: line.scratch_ends[index], BRANCH.name: line.branch_steps[index]}
        if index and CPT_VARIANTS[plan.cpt_variant] != KEEP_MIN:
            lengths[CONTINUAL.name] = version.steps
        for kind, length in lengths.items():
            cycle = version.cycle_steps.get(kind)
            if cycle is not None and cycle < length:
                raise _cycle_entry(source, index, kind).error(
                    f"a cycle of {cycle} steps is shorter than {KINDS[kind].run_name(version.name)} with its {length}; "
                    f"give at least {length}, or `{{{kind}: …}}` for one kind of run alone"
                )
    first = source.find("versions[0].cycle_steps.continual")
    if first is not source.root:
        raise first.error("the first continual run is the first scratch run; give `scratch`")


def _check_mixes(source: Source, plan: Plan) -> None:
    for index, (version, steps) in enumerate(zip(plan.versions, plan.timeline.branch_steps, strict=True)):
        if version.mix is None:
            continue
        last = plan.timeline.ends[index]
        size, sizes = plan.batch_sizes.size_of(last), plan.batch_sizes.sizes(last - steps, last)
        if len(sizes) > 1:
            raise source.find(f"versions[{index}].alpha", "alpha").error(
                f"branch-{version.name} would begin at a batch of {sizes[0]} samples and end at one of {size}, which "
                "branch_mix does not support; give an alpha of at most 1, or leave the mix out"
            )
        for part in version.mix.parts:
            if part.share * steps * size >= 1:
                continue
            own = f"versions[{index}].branch_mix.slices.{part.slice}"
            raise source.find(own, f"branch_mix.slices.{part.slice}").error(
                f"{float(part.share):g} of branch-{version.name}'s {steps} steps of "
                f"{size} samples is less than one sample; give a larger share"
            )


def _cycle_entry(source: Source, index: int, kind: str) -> Entry:
    """Return the entry with the cycle of a version's runs of this kind: in the version or in the schedule."""
    for key in (f"versions[{index}].cycle_steps", "schedule.cycle_steps"):
        entry = source.find(f"{key}.{kind}", key)
        if entry is not source.root and not isinstance(entry.value, dict):
            return entry
    return source.root

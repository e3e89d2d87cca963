"""Represent trials as experiments: plans, slices and main paths for short branches off one checkpoint."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lrpath.data.indexed import document_lengths
from megatron_lrpath.data.slice import ENDING, Slice, SliceSource, require_samples, slice_path, valid_name
from megatron_lrpath.data.slice_codec import Documents
from megatron_lrpath.errors import UserError
from megatron_lrpath.experiment.load import Experiment, load_experiment
from megatron_lrpath.experiment.run import write_plans
from megatron_lrpath.files import atomic_write_bytes, atomic_write_text
from megatron_lrpath.paradigms import BRANCH, OURS
from megatron_lrpath.plan import Plan
from megatron_lrpath.plan.file.load import plan_from
from megatron_lrpath.plan.file.source import parse_source, plain, plan_text, read_source
from megatron_lrpath.plan.mix import Replay
from megatron_lrpath.plan.spec import Version
from megatron_lrpath.runs.checkpoints import complete_steps, present_fingerprint
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.runs.fork import fork_main
from megatron_lrpath.sealed import json_digest
from megatron_lrpath.trials.record import AUDITION, PROBE, VERSION, Candidate, Trial, point_name, read_trial
from megatron_lrpath.wording import listing

SHARE = 0.1
"""Default steps of a trial's branches, as a share of the last version's."""
FEWEST_STEPS = 20
DROPPED = ("also_branch_at", "branch_mix", "sft", "prompts")  # keys of a plan that its trials do not have
BASE, FILE = "base.yaml", "experiment.yaml"


def make_probe(
    plan: Plan, ratios: Sequence[float], begin: int | None, steps: int | None, repeats: int, decay: float
) -> Trial:
    """Return a trial of the rate: the next version's own rate, which comes first, times each of `ratios`.

    Args:
        plan: its main path must have a checkpoint at the end of a version that is not the last one.
        ratios: the ratios of the tried rates to the version's own.
        begin: the step of that checkpoint; None: the newest.
        steps: the steps of each branch; None: `SHARE` of the version's.
        repeats: the number of trainings with each rate, on different documents.
        decay: the share of the steps that decay at the end.

    Raises:
        UserError: there is no such checkpoint, or a rate cannot be tried.
    """
    if plan.falling is not None:
        raise UserError(
            f"{plan.path}: a probe tries constant rates, and the main path's falls by schedule.main; compare plans "
            "with another `power` in an experiment (docs/experiments.md)"
        )
    line = plan.timeline
    ends = [step for step in kept(plan) if step in line.ends[:-1]]
    if begin is None and not ends:
        raise UserError(
            f"{plan.path}: a probe starts from the main path's checkpoint at the end of a version, with the data of "
            f"the next one, and none is complete at {listing([f'step {end:,}' for end in line.ends[:-1]]) or 'any'}; "
            "append a version to the plan and train the main path to where that begins"
        )
    begin = ends[-1] if begin is None else begin
    if begin not in ends:
        raise UserError(
            f"--from {begin}: a probe starts at the end of a version that another one follows; complete checkpoints "
            f"there: {listing([str(step) for step in ends]) or 'none'}"
        )
    place = line.begins.index(begin)
    version, rate = plan.versions[place], line.rate_of(place)
    steps = steps or default_steps(version)
    tried = {1.0: rate} | {ratio: float(f"{rate * ratio:.6g}") for ratio in ratios}
    for ratio, value in tried.items():
        if value < plan.schedule.min_lr:
            raise UserError(f"--rates {ratio:g}: {value:g} is below min_lr {plan.schedule.min_lr:g}")
    replay = None if version.replay is None else str(version.replay.share)
    candidates = tuple(
        Candidate(f"rate{ratio:g}", value, version.name, replay) for ratio, value in tried.items()
    )
    return named(Trial(PROBE, "", begin, steps, max(1, round(decay * steps)), repeats, candidates), plan)


def make_audition(
    plan: Plan,
    slices: Sequence[str],
    replays: Sequence[float],
    begin: int | None,
    steps: int | None,
    repeats: int,
) -> Trial:
    """Return a trial of data: every slice with every share of replay, the first ones first; all steps decay.

    Args:
        plan: its main path must have a checkpoint.
        slices: the names of slices in the plan's folder, which the main path has not read.
        replays: the shares that are drawn again from the versions so far; 0: none.
        begin: the step of the checkpoint; None: the newest.
        steps: the steps of each branch; None: `SHARE` of the last version's.
        repeats: the number of trainings with each candidate, on different documents.

    Raises:
        UserError: there is no such checkpoint, or a slice was read before it.
    """
    there = kept(plan)
    if not there:
        raise UserError(
            f"{plan.path}: the main path has no checkpoint yet; train it first: lrpath run {plan.path} --run main"
        )
    begin = there[-1] if begin is None else begin
    if begin not in there:
        raise UserError(
            f"--from {begin}: the main path has no complete checkpoint of that step; there are "
            f"{listing([str(step) for step in there])}"
        )
    begun = read_versions(plan, begin)
    names = [name.removesuffix(ENDING) for name in slices]
    if known := [name for name in names if name in {version.name for version in begun}]:
        raise UserError(
            f"--slices {listing(known)}: read by the main path before step {begin:,}; give slices of new data, or an "
            "earlier checkpoint with --from"
        )
    rate = plan.timeline.rate_of(len(begun) - 1)
    steps = steps or default_steps(begun[-1])
    candidates = tuple(
        Candidate(f"{name}-replay{share:g}" if share else name, rate, name, repr(share) if share else None)
        for name in dict.fromkeys(names)
        for share in dict.fromkeys(replays)
    )
    return named(Trial(AUDITION, "", begin, steps, steps, repeats, candidates), plan)


def kept(plan: Plan) -> list[int]:
    """Return the steps of the main path's complete checkpoints, ascending: after its warm-up, in the plan."""
    steps = complete_steps(RunFolder(plan.folder(plan.main)).checkpoints)
    return [step for step in steps if plan.schedule.warmup < step <= plan.timeline.ends[-1]]


def default_steps(version: Version) -> int:
    """Return the default number of steps of a branch."""
    return min(version.steps, max(FEWEST_STEPS, round(SHARE * version.steps)))


def read_versions(plan: Plan, step: int) -> list[Version]:
    """Return the versions that the main path begins before `step`."""
    pairs = zip(plan.versions, plan.timeline.begins, strict=True)
    return [version for version, begin in pairs if begin < step]


def named(trial: Trial, plan: Plan) -> Trial:
    """Return the trial with a descriptive name, which depends on settings, data and checkpoint."""
    root = RunFolder(plan.folder(plan.main)).checkpoints
    slices = {one.slice: open_candidate(plan, one.slice).fingerprint for one in trial.candidates}
    digest = json_digest([repr(trial), slices, present_fingerprint(root, trial.begin)])
    return replace(trial, name=f"{trial.kind}-{trial.begin}-{digest[:8]}")


def open_candidate(plan: Plan, name: str) -> Slice:
    """Return a candidate's slice. Raise UserError if it is missing."""
    return Slice.load(slice_path(plan.data.slices, name))


@dataclass(frozen=True)
class Prepared:
    """The files of a trial: slices and links to slices, the plans' base, and the experiment file."""

    files: dict[Path, bytes]
    links: dict[Path, Path]
    base: str
    experiment: str


def prepare(plan: Plan, trial: Trial) -> Prepared:
    """Return a trial's files without writing them.

    Raises:
        UserError: a slice has too little text for its repeats, or a plan cannot have such a version.
    """
    folder = trial.folder(plan)
    files, links = {}, {}
    for candidate, repeat in trial.points:
        place = slices_folder(folder, candidate, repeat)
        part = slice_part(open_candidate(plan, candidate.slice), repeat, trial.repeats)
        require_part(plan, trial, candidate, part)
        files[place / f"{VERSION}{ENDING}"] = part.to_bytes(place)
        for version in read_versions(plan, trial.begin):
            links[place / f"{version.name}{ENDING}"] = slice_path(plan.data.slices, version.name)
    base = base_mapping(plan, trial)
    points = [point_mapping(plan, trial, candidate, repeat) for candidate, repeat in trial.points]
    content = {
        "name": trial.name,
        "about": f"{trial.kind} of {plan.name}, from step {trial.begin} of the main path",
        "plan": BASE,
        "points": points,
        "paradigms": [OURS.name],
        "runs": [BRANCH.run_name(VERSION)],
        "show": [VERSION],
        "output": str(folder),
    }
    for point in points:
        check_point(folder, base, point)
    return Prepared(files, links, plan_text(base), plan_text(content))


def write(plan: Plan, trial: Trial, prepared: Prepared) -> Experiment:
    """Write a trial's files, begin its main paths, and return it as an experiment; a repeated call changes nothing.

    Raises:
        UserError: the folder contains a different trial.
    """
    folder = trial.folder(plan)
    if (there := read_trial(folder)) is not None and there != trial:
        raise UserError(f"{folder}: holds another trial; move it away")
    for path, content in prepared.files.items():
        if not path.is_file() or path.read_bytes() != content:
            atomic_write_bytes(path, content)
    for link, target in prepared.links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(target.resolve(), link.parent.resolve()))
    atomic_write_text(folder / BASE, prepared.base)
    atomic_write_text(folder / FILE, prepared.experiment)
    experiment = load_experiment(folder / FILE)
    write_plans(experiment)
    for point in experiment.points:
        main = point.plan.main
        fork_main(plan.folder(plan.main), trial.begin, point.plan.folder(main), main)
    trial.write(plan)
    return experiment


def slices_folder(folder: Path, candidate: Candidate, repeat: int) -> Path:
    """Return the folder of a branch's slices; candidates that share a slice share the folder."""
    return folder / "slices" / f"{candidate.slice}-r{repeat}"


def slice_part(one: Slice, repeat: int, repeats: int) -> Slice:
    """Return the part of a slice's documents that repeat `repeat` (from 1 on) reads.

    A document's number in its dataset determines its part, so the part is the same in all slices.
    """
    sources = []
    for source in one.sources:
        documents = source.documents[mixed(source.documents) % np.uint64(repeats) == repeat - 1]
        if len(documents):
            tokens = int(document_lengths(source.prefix)[documents].sum(dtype="int64"))
            sources.append(
                SliceSource(
                    source.prefix, source.fingerprint, source.domain, documents, tokens, source.tokenizer
                )
            )
    return Slice(VERSION, None, tuple(sources))


def mixed(numbers: Documents) -> np.ndarray:
    """Return numbers (uint64) without any pattern of `numbers`: the finalizer of SplitMix64."""
    words = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def require_part(plan: Plan, trial: Trial, candidate: Candidate, part: Slice) -> None:
    """Raise UserError with the remedy if a slice has too little text for the repeats."""
    version = Version(VERSION, trial.steps, replay=replay_of(candidate))
    samples = version.new_samples(trial.steps * step_samples(plan, trial))
    try:
        require_samples(part, samples, plan.batch.seq_length)
    except UserError:
        wanted = samples * plan.batch.seq_length
        raise UserError(
            f"{candidate.slice}: {trial.repeats} repeats of {trial.steps:,} steps need {wanted:,} tokens each, and a "
            f"part of its documents has {part.tokens:,}; give fewer --steps or --repeats, or draw a larger slice"
        ) from None


def step_samples(plan: Plan, trial: Trial) -> int:
    """Return the samples of a step of the trial's branches: those of the tried version, or as before it."""
    return plan.batch_sizes.size_of(trial.begin + (trial.kind == PROBE))


def replay_of(candidate: Candidate) -> Replay | None:
    """Return the candidate's replay, regardless of the versions that it draws from."""
    return None if candidate.replay is None else Replay(Fraction(candidate.replay))


def base_mapping(plan: Plan, trial: Trial) -> dict[str, Any]:
    """Return the plan up to the checkpoint as the mapping of a plan file; points add the tried version.

    The version that contains the checkpoint ends there, with a branch of one step, which is not trained.
    """
    values = plain(read_source(plan.path).root)
    base = {name: value for name, value in values.items() if name not in DROPPED}
    base["schedule"] = {name: value for name, value in base["schedule"].items() if name != "cycle_steps"}
    versions = []
    for written, version, begin in zip(values["versions"], plan.versions, plan.timeline.begins, strict=True):
        if begin >= trial.begin:
            break
        entry = {name: one for name, one in written.items() if name not in ("branch_mix", "cycle_steps")}
        if begin + version.steps > trial.begin:
            steps = trial.begin - begin
            entry |= {"steps": steps, "alpha": 1 / steps}
        versions.append(entry)
    return base | {"paradigms": [OURS.name], "versions": versions}


def point_mapping(plan: Plan, trial: Trial, candidate: Candidate, repeat: int) -> dict[str, Any]:
    """Return one branch as a point of the experiment: its version, its slices, and its validation sets."""
    version: dict[str, Any] = {"name": VERSION, "steps": trial.steps, "alpha": trial.decay / trial.steps}
    if trial.kind == PROBE:
        place = plan.timeline.begins.index(trial.begin)
        written = plain(read_source(plan.path).root)["versions"][place]
        rate_steps = min(plan.timeline.rate_steps(plan.versions[place]), (trial.steps - trial.decay) // 2)
        version |= {"max_lr": candidate.rate, "rate_steps": rate_steps}
        version |= {
            name: written[name]
            for name in ("replay", "branch_megatron", "global_batch_size")
            if name in written
        }
    elif candidate.replay is not None:
        version["replay"] = float(candidate.replay)
    versions = [*base_mapping(plan, trial)["versions"], version]
    folder = slices_folder(trial.folder(plan), candidate, repeat)
    return {
        "name": point_name(candidate, repeat),
        "versions": versions,
        "data.slices": str(folder),
        "data.valid": validation_of(plan, trial),
    }


def validation_of(plan: Plan, trial: Trial) -> list[str]:
    """Return the plan's validation slices, and the existing ones of the candidates (`valid-NAME`)."""
    paths = [plan.data.valid, *plan.data.more_valid]
    known = {Path(path).name.removesuffix(ENDING) for path in paths}
    for candidate in trial.candidates:
        name = valid_name(candidate.slice)
        if name not in known and slice_path(plan.data.slices, name).is_file():
            known.add(name)
            paths.append(str(Path(plan.data.slices) / name))
    return paths


def unmeasured(plan: Plan, trial: Trial) -> list[str]:
    """Return the candidates' slices without a validation set of their own."""
    sets = {Path(path).name.removesuffix(ENDING) for path in validation_of(plan, trial)}
    names = dict.fromkeys(candidate.slice for candidate in trial.candidates)
    return [name for name in names if valid_name(name) not in sets]


def check_point(folder: Path, base: dict[str, Any], point: dict[str, Any]) -> None:
    """Raise UserError with the branch's name if its plan is invalid."""
    mapping = copy.deepcopy(base) | {"versions": point["versions"]}
    try:
        plan_from(parse_source(folder / BASE, plan_text(mapping)))
    except UserError as error:
        raise UserError(f"the branch {point['name']} cannot be made: {error}") from None

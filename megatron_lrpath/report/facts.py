"""The plan and the settings of its training, as label and value; and the versions' data as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_lrpath.data.slice import Slice, open_validation, slice_path, validation_paths
from megatron_lrpath.data.slice_codec import DamagedError, read_slice_header
from megatron_lrpath.errors import UserError
from megatron_lrpath.models import parameter_count, resolve_model
from megatron_lrpath.paradigms import CPT_VARIANTS, OURS
from megatron_lrpath.plan import Plan, run_identity
from megatron_lrpath.plan.identity import without_neutral
from megatron_lrpath.plan.wording import (
    branch_arguments_text,
    main_rate_text,
    mix_text,
    replays_text,
    schedule_name,
    sft_text,
)
from megatron_lrpath.report.collect import RunTree
from megatron_lrpath.report.tables import Cell, Table
from megatron_lrpath.sealed import json_digest
from megatron_lrpath.wording import MISSING, hours_text, listing, plural, short_number


def facts(tree: RunTree) -> dict[str, str]:
    """Return label and value of every line of the summary; facts that no lineage records are omitted."""
    plan, model = tree.plan, tree.plan.model
    starts = [start for record in tree for start in record.recorded("starts")]
    alphas = ", ".join(f"{one.name}: {one.alpha:g}" for one in plan.versions if one.alpha is not None)
    schedule, times = plan.schedule, [str(one["time"]) for one in starts if one.get("time")]
    commits = dict.fromkeys(str(one["git_commit"]) for one in starts if one.get("git_commit"))
    span = [time[:16].replace("T", " ") for time in (min(times), max(times))] if times else []
    packages: dict[str, dict[str, None]] = {}  # several versions of a package if runs differ
    for start in starts:
        recorded = start.get("packages")
        for name, version in (recorded if isinstance(recorded, dict) else {}).items():
            packages.setdefault(str(name), {})[str(version)] = None
    found = {
        "Plan": str(plan.path),
        "Model": as_trained(
            tree,
            "model",
            _arguments,
            "; ".join(part for part in (model.recipe or "", _arguments(model.overrides)) if part),
        ),
        "Parameters": _parameters(plan),
        "Schedule": f"{schedule_name(plan)}, from {schedule.max_lr:g} to {schedule.min_lr:g}, "
        + (f"warm-up {schedule.warmup:,} steps" if schedule.warmup else "no warm-up"),
        "Main path": main_rate_text(plan).removeprefix("main path "),
        "α": f"{plan.alpha:g}" + (f" ({alphas})" if alphas else ""),
        "Replay": replays_text(plan),
        "Branch mix": _mixes(plan),
        "Fine-tuning": sft_text(plan.sft) if plan.sft else "",
        "CPT variant": CPT_VARIANTS[plan.cpt_variant].title,
        "Batch": as_trained(tree, "batch", _batch),
        "Tokens a step": as_trained(tree, "batch", _step_tokens),
        "Tokenizer": as_trained(tree, "tokenizer", _tokenizer),
        "Seed": as_trained(tree, "seed", str),
        "Other arguments": as_trained(tree, "megatron", _arguments, _arguments(plan.megatron)),
        "Branches' arguments": branch_arguments_text(plan),
        "Trained": f"started {', last start '.join(f'{time} UTC' for time in dict.fromkeys(span))}"
        if span
        else "",
        "Hours trained": _hours(tree),
        "Packages": ", ".join(f"{name} {' and '.join(versions)}" for name, versions in packages.items()),
        "Code": listing(list(commits)),
    }
    return {label: value for label, value in found.items() if value}


def as_trained(tree: RunTree, name: str, text: Callable[[Any], str], planned: str | None = None) -> str:
    """Return a setting with which the runs were trained as text; several texts if they differ.

    Args:
        tree: the runs.
        name: the setting in a run's identity.
        text: returns the text for a value of it.
        planned: the text for the plan's value (default: `text` of it).
    """
    own = run_identity(tree.plan, tree.plan.main)[name]
    words = {json_digest(own): text(own) if planned is None else planned}
    used: dict[str, None] = {}
    for record in tree:
        identity = record.lineage.get("identity")
        if not record.run.is_sft and isinstance(identity, dict) and name in identity:
            value = without_neutral(identity[name]) if name in ("model", "megatron") else identity[name]
            used[json_digest(value)] = None
            with suppress(KeyError, TypeError, ValueError, AttributeError):  # a damaged lineage
                words.setdefault(json_digest(value), text(value))
    return " and ".join(words[one] for one in used or words if one in words)


def _batch(sizes: Mapping[str, int]) -> str:
    return f"{sizes['global_batch_size']:,} sequences of {sizes['seq_length']:,} tokens"


def _step_tokens(sizes: Mapping[str, int]) -> str:
    return f"{sizes['global_batch_size'] * sizes['seq_length']:,}"


def _tokenizer(facts: Mapping[str, Any]) -> str:
    return f"{facts['type']} {facts.get('model') or ''}".strip()


def _hours(tree: RunTree) -> str:
    """Return processes times hours of the recorded steps; empty if a run's lineage lacks its processes."""
    hours: dict[str, float] = {}
    for record in (*tree, *tree.tuned):
        starts = record.recorded("starts")
        processes = starts[-1].get("world_size") if starts else None
        if record.history.seconds is None:
            continue
        if not isinstance(processes, int) or isinstance(processes, bool):
            return ""
        unit = "GPU" if record.history.on_gpus else "process"
        hours[unit] = hours.get(unit, 0.0) + record.history.seconds * processes / 3600
    return " and ".join(hours_text(number, unit) for unit, number in hours.items())


def subtitle(tree: RunTree) -> str:
    """Return the plan in a line: model, schedule, α, versions and their tokens."""
    plan = tree.plan
    tokens = version_tokens(plan)
    sizes = dict.fromkeys(short_number(size) for size in (min(tokens), max(tokens)))
    parts = [
        plan.model.recipe or "own model",
        f"{schedule_name(plan)} schedule",
        f"α {plan.alpha:g}",
        f"{plural(len(plan.versions), 'version')} of {' to '.join(sizes)} tokens",
        f"seed {as_trained(tree, 'seed', str)}",
    ]
    return " · ".join(parts)


def version_tokens(plan: Plan) -> list[int]:
    """Return the tokens of each version's own samples."""
    return [plan.samples_of(index) * plan.batch.seq_length for index in range(len(plan.versions))]


def data_table(tree: RunTree) -> Table:
    """Return each version's steps, trained tokens and slice's tokens, by domain if there are several."""
    plan = tree.plan
    folder = Path(plan.data.slices)
    opened = {one.name: _opened(Slice.load, slice_path(folder, one.name)) for one in plan.versions}
    slices = {name: part for name, (part, _) in opened.items()}
    valid, problem = _opened(open_validation, plan.data)
    known = [part for part in (*slices.values(), valid) if part is not None]
    domains = list(dict.fromkeys(name for part in known for name in part.tokens_by_domain))
    domains = domains if len(domains) > 1 else []
    rows = []
    replayed = any(version.replay for version in plan.versions)
    for index, (version, new) in enumerate(zip(plan.versions, version_tokens(plan), strict=True)):
        begin, end = plan.timeline.begins[index], plan.timeline.ends[index]
        again = [Cell(short_number(plan.tokens(begin, end) - new))] if replayed else []
        trained = Cell(f"{version.steps:,}"), Cell(short_number(new)), *again
        rows.append((Cell(version.name), *trained, *_slice_cells(slices[version.name], domains)))
    absent = [Cell(MISSING)] * (3 if replayed else 2)
    mixes = [run.mix for run in plan.runs(OURS.name) if run.mix is not None]
    for part in {part.slice: part for mix in mixes for part in mix.parts}.values():
        place = Path(part.slice).parent if "/" in part.slice else folder
        mixed, _ = _opened(Slice.load, slice_path(place, part.name))
        rows.append((Cell(f"{part.name} (mix)"), *absent, *_slice_cells(mixed, domains)))
    rows.append((Cell("validation", opens=True), *absent, *_slice_cells(valid, domains)))
    by_domain = (f"of which {name}" for name in domains)
    trained_on = ("New tokens trained on", *(["Tokens replayed"] if replayed else []))
    header = ("Version", "Steps", *trained_on, "Tokens in the slice", *by_domain)
    missing = [name for name, part in slices.items() if part is None] + ([] if valid else ["validation"])
    note = f"Slices not found, so their contents are not shown: {listing(missing)}."
    damaged = [why for _, why in [*opened.values(), (valid, problem)] if "not a whole slice file" in why]
    return Table(header, tuple(rows), left=1, notes=(*([note] if missing else ()), *damaged))


def unmeasured(plan: Plan) -> str:
    """Return a sentence on the versions whose text no validation set is drawn from; empty if there are none.

    A version counts as measured if a dataset of its slice is in a set. Versions or sets without a local file
    are skipped.
    """
    measured = set().union(*(_datasets(path) or set() for path in validation_paths(plan.data)))
    of_version = {one.name: _datasets(slice_path(plan.data.slices, one.name)) for one in plan.versions}
    names = [name for name, datasets in of_version.items() if datasets and not datasets & measured]
    if not names or not measured:
        return ""
    return f"{listing(names)}: no validation: no validation set holds text of its data."


def _datasets(path: Path) -> set[str] | None:
    try:
        return {str(source["fingerprint"]) for source in read_slice_header(path)["sources"]}
    except (OSError, DamagedError, KeyError, TypeError, ValueError):
        return None


def _slice_cells(part: Slice | None, domains: list[str]) -> list[Cell]:
    if part is None:
        return [Cell(MISSING)] * (1 + len(domains))
    counts = part.tokens_by_domain
    return [Cell(short_number(part.tokens)), *(Cell(short_number(counts.get(name, 0))) for name in domains)]


def _opened[Source](load: Callable[[Source], Slice], source: Source) -> tuple[Slice | None, str]:
    """Return the slice, or None and the reason: a report may be made on a machine without the data."""
    try:
        return load(source), ""
    except (UserError, OSError) as error:
        return None, str(error)


def _arguments(arguments: dict[str, Any]) -> str:
    """Return Megatron arguments as a list: a flag by its name alone, others with their value."""
    return ", ".join(
        f"no {name}" if value is False else name if value is True else f"{name} {value}"
        for name, value in arguments.items()
    )


def _parameters(plan: Plan) -> str:
    """Return the number of the model's parameters; without embeddings if the vocabulary's size is unknown."""
    vocabulary = _vocabulary(plan)
    try:
        number = short_number(parameter_count(resolve_model(plan.model), vocabulary or 0))
    except UserError:
        return ""
    rest = f"with a vocabulary of {vocabulary:,} tokens" if vocabulary else "without the token embeddings"
    return f"{number} {rest}"


def _vocabulary(plan: Plan) -> int | None:
    """Return the plan's vocabulary size, or that of an existing SentencePiece model; otherwise None."""
    if plan.tokenizer.vocab_size is not None:
        return plan.tokenizer.vocab_size
    model = Path(plan.tokenizer.model or "")
    if "SentencePiece" not in plan.tokenizer.type or not model.is_file():
        return None
    from sentencepiece import SentencePieceProcessor

    try:
        return int(SentencePieceProcessor(model_file=str(model)).get_piece_size())
    except (OSError, RuntimeError):
        return None


def _mixes(plan: Plan) -> str:
    """Return the data that branches read in addition to the main path's; a single text if all have the same."""
    runs_by_mix: dict[str, list[str]] = {}
    for run in plan.runs(OURS.name):
        if run.mix is not None:
            samples = run.mix.samples(plan.batch_of(run).global_batch_size, run.steps)
            exact = ", ".join(f"{number:,} of {name}" for name, number in samples.items())
            runs_by_mix.setdefault(f"{mix_text(run.mix)}: samples {exact}, seed {run.mix.seed}", []).append(
                run.name
            )
    return "; ".join(f"{listing(names)}: {text}" for text, names in runs_by_mix.items())

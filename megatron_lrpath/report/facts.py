"""What was planned and with what it was trained, as label and value; and the versions' data as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_lrpath.data.slice import Slice, open_validation, slice_path
from megatron_lrpath.errors import UserError
from megatron_lrpath.models import parameter_count, resolve_model
from megatron_lrpath.paradigms import CPT_VARIANTS, OURS
from megatron_lrpath.plan import Plan
from megatron_lrpath.plan.mix import MixPart
from megatron_lrpath.plan.wording import mix_text, schedule_name, sft_text
from megatron_lrpath.report.collect import RunTree
from megatron_lrpath.report.tables import Cell, Table
from megatron_lrpath.wording import MISSING, listing, plural, short_number


def facts(tree: RunTree) -> dict[str, str]:
    """Label and value of every line of the summary; what the runs' lineage does not record is left out."""
    plan = tree.plan
    batch, starts = plan.batch, list(_starts(tree))
    found = {
        "Plan": str(plan.path),
        "Model": _model(tree),
        "Parameters": _parameters(plan),
        "Schedule": _schedule(tree),
        "α": _alphas(tree),
        "Branch mix": _mixes(plan),
        "Fine-tuning": sft_text(plan.sft) if plan.sft else "",
        "CPT variant": CPT_VARIANTS[plan.cpt_variant].title,
        "Batch": f"{batch.global_batch_size:,} sequences of {batch.seq_length:,} tokens",
        "Tokens a step": f"{plan.batch.tokens:,}",
        "Tokenizer": f"{plan.tokenizer.type} {plan.tokenizer.model or ''}".strip(),
        "Seed": str(plan.seed),
        "Other arguments": _arguments(plan.megatron),
        "Trained": _span([str(start["time"]) for start in starts if start.get("time")]),
        "Packages": _packages(starts),
        "Code": _different(start.get("git_commit") for start in starts),
    }
    return {label: value for label, value in found.items() if value}


def subtitle(tree: RunTree) -> str:
    """The plan in a line: model, schedule, α, versions and their tokens."""
    plan = tree.plan
    tokens = [plan.tokens(version.steps) for version in plan.versions]
    sizes = dict.fromkeys(short_number(size) for size in (min(tokens), max(tokens)))
    parts = [
        plan.model.recipe or "own model",
        f"{schedule_name(plan)} schedule",
        f"α {plan.alpha:g}",
        f"{plural(len(plan.versions), 'version')} of {' to '.join(sizes)} tokens",
        f"seed {plan.seed}",
    ]
    return " · ".join(parts)


def data_table(tree: RunTree) -> Table:
    """Each version: its steps, the tokens trained on, what its slice holds, by domain where it names some."""
    plan = tree.plan
    slices = {
        version.name: _opened(partial(_slice, Path(plan.data.slices), version.name))
        for version in plan.versions
    }
    valid = _opened(partial(open_validation, plan.data))
    known = [part for part in (*slices.values(), valid) if part is not None]
    domains = list(dict.fromkeys(name for part in known for name in part.tokens_by_domain))
    domains = domains if len(domains) > 1 else []
    rows = [
        (
            Cell(version.name),
            Cell(f"{version.steps:,}"),
            Cell(short_number(plan.tokens(version.steps))),
            *_slice_cells(slices[version.name], domains),
        )
        for version in plan.versions
    ]
    for part in mix_parts(plan):
        folder = Path(part.slice).parent if "/" in part.slice else Path(plan.data.slices)
        mixed = _opened(partial(_slice, folder, part.name))
        rows.append((Cell(f"{part.name} (mix)"), Cell(MISSING), Cell(MISSING), *_slice_cells(mixed, domains)))
    rows.append((Cell("validation", opens=True), Cell(MISSING), Cell(MISSING), *_slice_cells(valid, domains)))
    by_domain = (f"of which {name}" for name in domains)
    header = ("Version", "Steps", "New tokens trained on", "Tokens in the slice", *by_domain)
    missing = [name for name, part in slices.items() if part is None] + ([] if valid else ["validation"])
    note = f"Slices not found, so their contents are not shown: {listing(missing)}."
    return Table(header, tuple(rows), left=1, notes=(note,) if missing else ())


def mix_parts(plan: Plan) -> list[MixPart]:
    """The slices that any branch's mix names, each once."""
    mixes = [run.mix for run in plan.runs(OURS.name) if run.mix is not None]
    return list({part.slice: part for mix in mixes for part in mix.parts}.values())


def _slice_cells(part: Slice | None, domains: list[str]) -> list[Cell]:
    if part is None:
        return [Cell(MISSING)] * (1 + len(domains))
    counts = part.tokens_by_domain
    return [Cell(short_number(part.tokens)), *(Cell(short_number(counts.get(name, 0))) for name in domains)]


def _slice(folder: Path, name: str) -> Slice:
    return Slice.load(slice_path(folder, name))


def _opened(load: Callable[[], Slice]) -> Slice | None:
    """The slice, or None where it cannot be read: a report may be made away from the data."""
    try:
        return load()
    except (UserError, OSError):
        return None


def _model(tree: RunTree) -> str:
    model = tree.plan.model
    return "; ".join(part for part in (model.recipe or "", _arguments(model.overrides)) if part)


def _arguments(arguments: dict[str, Any]) -> str:
    """Megatron arguments as a list: a flag that is set by its name alone, others with their value."""
    shown = []
    for name, value in arguments.items():
        if value is False:
            shown.append(f"no {name}")
        else:
            shown.append(name if value is True else f"{name} {value}")
    return ", ".join(shown)


def _parameters(plan: Plan) -> str:
    """The model's parameters; without the embeddings where the vocabulary's size cannot be found out here."""
    vocabulary = _vocabulary(plan)
    try:
        number = short_number(parameter_count(resolve_model(plan.model), vocabulary or 0))
    except UserError:
        return ""
    return (
        f"{number} with a vocabulary of {vocabulary:,} tokens"
        if vocabulary
        else f"{number} without the token embeddings"
    )


def _vocabulary(plan: Plan) -> int | None:
    """The plan's vocabulary size, or that of its SentencePiece model where the file is here."""
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


def _schedule(tree: RunTree) -> str:
    schedule = tree.plan.schedule
    rates = f"{schedule_name(tree.plan)}, from {schedule.max_lr:g} to {schedule.min_lr:g}"
    return f"{rates}, warm-up {schedule.warmup:,} steps" if schedule.warmup else f"{rates}, no warm-up"


def _alphas(tree: RunTree) -> str:
    own = [f"{one.name}: {one.alpha:g}" for one in tree.plan.versions if one.alpha is not None]
    return f"{tree.plan.alpha:g}" + (f" ({', '.join(own)})" if own else "")


def _mixes(plan: Plan) -> str:
    """What the branches read beside the main path's data, once where it is the same for all."""
    runs_by_mix: dict[str, list[str]] = {}
    for run in plan.runs(OURS.name):
        if run.mix is not None:
            samples = run.mix.samples(plan.batch.global_batch_size, run.steps)
            exact = ", ".join(f"{number:,} of {name}" for name, number in samples.items())
            runs_by_mix.setdefault(f"{mix_text(run.mix)}: samples {exact}, seed {run.mix.seed}", []).append(
                run.name
            )
    return "; ".join(f"{listing(names)}: {text}" for text, names in runs_by_mix.items())


def _starts(tree: RunTree) -> Iterable[dict[str, Any]]:
    """Every start of every run that its lineage records."""
    for record in tree:
        starts = record.lineage.get("starts")
        if isinstance(starts, list):
            yield from (start for start in starts if isinstance(start, dict))


def _packages(starts: list[dict[str, Any]]) -> str:
    """`name version` of every package that the runs recorded; several versions where runs differ."""
    versions: dict[str, dict[str, None]] = {}
    for start in starts:
        packages = start.get("packages")
        for name, version in (packages if isinstance(packages, dict) else {}).items():
            versions.setdefault(str(name), {})[str(version)] = None
    return ", ".join(f"{name} {' and '.join(found)}" for name, found in versions.items())


def _different(values: Iterable[object]) -> str:
    return listing(list(dict.fromkeys(str(value) for value in values if value)))


def _span(times: list[str]) -> str:
    """First and last of some ISO times, to the minute."""
    if not times:
        return ""
    first, last = (time[:16].replace("T", " ") for time in (min(times), max(times)))
    return f"started {first} UTC" + ("" if first == last else f", last start {last} UTC")

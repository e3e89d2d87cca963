"""The model card: where an exported model comes from, told from its plan, lineage, data and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_lrpath.console import warn
from megatron_lrpath.data.slice import open_slices
from megatron_lrpath.errors import UserError
from megatron_lrpath.export.architecture import CLASSES, Architecture
from megatron_lrpath.paradigms import KINDS, OURS
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.plan.wording import mix_text
from megatron_lrpath.runs.folder import RunFolder, inspect, read_json_object
from megatron_lrpath.runs.results import fresh_evaluation
from megatron_lrpath.schedule import Schedule


@dataclass(frozen=True)
class Origin:
    """What is known of an exported model: run and plan where it has them, its records, its data."""

    step: int
    plan: Plan | None = None
    run: Run | None = None
    lineage: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    tokens_by_domain: dict[str, dict[str, int]] = field(default_factory=dict)  # version -> domain -> tokens


def origin_of(plan: Plan, run: Run, step: int) -> Origin:
    """What the plan, the run's folder and its slices say of the run."""
    folder = plan.folder(run)
    for problem in inspect(folder)[0]:
        warn(f"{folder}: {problem}; the model card does without it.")
    lineage = read_json_object(RunFolder(folder).lineage)
    names = [version.name for version in plan.versions[: run.version_index]]
    try:
        tokens = {one.name: one.tokens_by_domain for one in open_slices(plan.data, names, verify=False)}
    except UserError:  # the slices are gone
        tokens = {}
    return Origin(step, plan, run, lineage, fresh_evaluation(folder, step), tokens)


def model_card(name: str, model: Architecture, dtype: str, origin: Origin, notes: Sequence[str]) -> str:
    """The content of `README.md`."""
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [megatron-lrpath]\n---\n"
    parts = [head, f"# {name}\n", architecture_table(model, dtype)]
    if origin.plan is not None and origin.run is not None:
        parts += [training(origin.plan, origin.run, origin), data_table(origin)]
    else:
        parts.append(f"## Training\n\nA Megatron checkpoint of step {origin.step:,}, without a plan.\n")
    parts += [evaluation(origin), provenance(origin)]
    if notes:
        parts.append("## Notes\n\n" + "".join(f"- {note}\n" for note in notes))
    return "\n".join(part for part in parts if part)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in row) + " |\n" for row in lines)


def architecture_table(model: Architecture, dtype: str) -> str:
    """Class and sizes."""
    rows = [
        ("class", CLASSES[model.kind]),
        ("layers, hidden, FFN", f"{model.layers}, {model.hidden:,}, {model.ffn:,}"),
        ("heads, key-value heads", f"{model.heads}, {model.groups}"),
        ("vocabulary", f"{model.vocab_size:,}, {'tied' if model.tied else 'untied'} embeddings"),
        ("positions", f"{model.max_positions:,}, RoPE base {model.rope_theta:g}"),
        ("weights", dtype),
    ]
    return table(("model", ""), rows)


def rates(schedule: Schedule, peak: float | None = None) -> str:
    """A schedule in a few words; `peak` is where its decay begins, where that is not max_lr."""
    return f"{schedule.style}, {peak or schedule.max_lr:.6g} to {schedule.min_lr:g}, warm-up {schedule.warmup:,} steps"


def fine_tuning(plan: Plan, run: Run, origin: Origin) -> str:
    """The fine-tuning: data, schedule and steps; the table of the version's own training follows it."""
    sft = plan.sft
    assert sft is not None
    assert run.parent is not None
    batch = sft.batch
    rows = [
        ("run", f"{run.name}: {KINDS[run.kind].about}"),
        ("starts from", f"the weights of {run.parent.run}, step {run.parent.step:,}"),
        ("steps", f"{origin.step:,}" + (f" of {run.last_step:,}, {sft.epochs} epochs" if sft.epochs else "")),
        ("a step", f"{batch.global_batch_size:,} packed samples of {batch.seq_length:,} positions"),
        ("schedule", rates(sft.schedule)),
        ("data", ", ".join(sft.data)),
        ("chat template", sft.template),
        ("seed", sft.seed),
    ]
    answers = (origin.evaluation or {}).get("answers")
    if answers:
        rows.append(
            ("perplexity of held-out answers", f"{answers['perplexity']:.4f} ({answers['tokens']:,} tokens)")
        )
    parent = plan.run(run.paradigm, run.parent.run)
    version = training(plan, parent, Origin(parent.last_step))
    return "## Fine-tuning\n\n" + table(("", ""), rows) + "\n" + version


def training(plan: Plan, run: Run, origin: Origin) -> str:
    """Plan, version, paradigm, schedule and steps."""
    if run.is_sft:
        return fine_tuning(plan, run, origin)
    version = plan.versions[run.version_index - 1]
    weights = "an imported model" if plan.megatron.get("pretrained_checkpoint") else "random weights"
    rows = [
        ("plan", plan.name),
        ("version", f"{run.version} ({run.version_index} of {len(plan.versions)})"),
        ("run", f"{run.name}: {KINDS[run.kind].about}"),
        ("starts from", f"{run.parent.run}, step {run.parent.step:,}" if run.parent else weights),
        ("steps", f"{run.first_step:,} to {origin.step:,} of {run.last_step:,}"),
        ("tokens a step", f"{plan.batch.tokens:,}"),
        ("tokens seen", f"{plan.tokens(origin.step):,}"),
        ("schedule", rates(plan.schedule, run.path.peak)),
        ("seed", plan.seed),
    ]
    if run.paradigm == OURS.name:
        rows.insert(7, ("α (share of a version's steps that decay)", f"{version.alpha or plan.alpha:g}"))
    if run.mix is not None:
        samples = run.mix.samples(plan.batch.global_batch_size, run.steps)
        counts = ", ".join(f"{number:,} of {name}" for name, number in samples.items())
        rows.append(("samples of other data in the branch", f"{counts} ({mix_text(run.mix)})"))
    return "## Training\n\n" + table(("", ""), rows)


def data_table(origin: Origin) -> str:
    """Tokens by version and domain of what the run and its ancestors could read."""
    if not origin.tokens_by_domain:
        return ""
    domains = list(dict.fromkeys(name for counts in origin.tokens_by_domain.values() for name in counts))
    rows = [
        (version, *(f"{counts.get(name, 0):,}" for name in domains), f"{sum(counts.values()):,}")
        for version, counts in origin.tokens_by_domain.items()
    ]
    head = ("version", *(domain.replace("|", "/") for domain in domains), "all")
    return "## Data\n\nTokens of each version's slice, by domain.\n\n" + table(head, rows)


def evaluation(origin: Origin) -> str:
    """Perplexities on the fixed validation set."""
    if origin.evaluation is None:
        return ""
    rows = [("all", f"{origin.evaluation['perplexity']:.4f}", f"{origin.evaluation['tokens']:,}")]
    rows += [
        (domain, f"{one['perplexity']:.4f}", f"{one['tokens']:,}")
        for domain, one in origin.evaluation.get("domains", {}).items()
    ]
    return "## Perplexity on the validation set\n\n" + table(("domain", "perplexity", "tokens"), rows)


def provenance(origin: Origin) -> str:
    """Packages, commit and fingerprints, as recorded when the run was started."""
    if not origin.lineage or not origin.lineage.get("starts"):
        return ""
    last = origin.lineage["starts"][-1]
    rows = list(last.get("packages", {}).items())
    rows += [("git commit", last["git_commit"])] if last.get("git_commit") else []
    rows += [("identity of the run", origin.lineage.get("identity_hash", ""))]
    slices = origin.lineage.get("identity", {}).get("slices", {})
    rows += [(f"fingerprint of slice {name}", value) for name, value in slices.items()]
    return "## Provenance\n\n" + table(("", ""), rows)

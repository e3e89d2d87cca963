"""Write the model card: the origin of an exported model, from its plan, lineage, data and evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_lrpath.console import warn
from megatron_lrpath.data.slice import open_slices
from megatron_lrpath.errors import UserError
from megatron_lrpath.export.architecture import CLASSES, Architecture
from megatron_lrpath.paradigms import KINDS, OURS, SCRATCH
from megatron_lrpath.plan import Plan, Run, run_identity
from megatron_lrpath.plan.wording import beginning_text, mix_text, replay_text, step_tokens_text
from megatron_lrpath.runs.checkpoints import present_fingerprint
from megatron_lrpath.runs.folder import RunFolder, inspect, read_json_object
from megatron_lrpath.runs.lineage import changes
from megatron_lrpath.runs.results import fresh_evaluation
from megatron_lrpath.schedule import Schedule
from megatron_lrpath.wording import listing


@dataclass(frozen=True)
class Origin:
    """The known facts of an exported model: run and plan if it has them, its records, its data.

    `checkpoint` is the fingerprint of the exported checkpoint. `changes` are the settings of the plan that were
    changed since the training.
    """

    step: int
    plan: Plan | None = None
    run: Run | None = None
    lineage: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    tokens_by_domain: dict[str, dict[str, int]] = field(default_factory=dict)  # version -> domain -> tokens
    checkpoint: str | None = None
    changes: tuple[str, ...] = ()


def origin_of(plan: Plan, run: Run, step: int) -> Origin:
    """Return the facts of the run from the plan, the run's folder and its slices.

    Raises:
        UserError: the folder holds another run.
    """
    folder = plan.folder(run)
    for problem in inspect(folder)[0]:
        warn(f"{folder}: {problem}; the model card does without it.")
    lineage = read_json_object(RunFolder(folder).lineage)
    names = [version.name for version in plan.versions[: run.version_index]]
    try:
        tokens = {one.name: one.tokens_by_domain for one in open_slices(plan.data, names, verify=False)}
    except UserError:  # the slices are missing
        tokens = {}
    checkpoint = present_fingerprint(RunFolder(folder).checkpoints, step)
    return Origin(
        step,
        plan,
        run,
        lineage,
        fresh_evaluation(folder, step),
        tokens,
        checkpoint,
        changed_since(plan, run, lineage or {}),
    )


def changed_since(plan: Plan, run: Run, lineage: dict[str, Any]) -> tuple[str, ...]:
    """Return the settings of the plan that were changed since the run was trained; warn about them.

    Raises:
        UserError: the run's folder holds another run.
    """
    folder, identity = plan.folder(run), lineage.get("identity")
    trained = identity.get("run") if isinstance(identity, dict) else None
    if trained is not None and trained != run_identity(plan, run)["run"]:
        raise UserError(
            f"{folder}: holds the run {trained}, not {run.name}, by its {RunFolder(folder).lineage.name}; "
            "move the folder back to its own name"
        )
    found = changes(folder, lineage, plan, run)
    if found:
        warn(
            f"{folder}: the plan was changed since this run was trained ({listing(found[:2])}); the model card lists "
            "the changes."
        )
    return tuple(found)


def model_card(
    name: str, model: Architecture, dtype: str, origin: Origin, notes: Sequence[str], *, how: str
) -> str:
    """Return the content of `README.md`; `name`: the title without a run; `how`: the usage part or empty."""
    plan, run = origin.plan, origin.run
    title = f"{plan.name} {run.name}" if plan and run else name
    parts = [front_matter(origin), f"# {title}\n", how, architecture_table(model, dtype)]
    if plan is not None and run is not None:
        parts += [training(plan, run, origin), data_table(origin)]
    else:
        parts.append(f"## Training\n\nA Megatron checkpoint of step {origin.step:,}, without a plan.\n")
    parts += [evaluation(origin), provenance(origin)]
    if notes:
        parts.append("## Notes\n\n" + "".join(f"- {note}\n" for note in notes))
    return "\n".join(part for part in parts if part)


def front_matter(origin: Origin) -> str:
    """Return the header for hubs: the library, the task, and the plan's license if it names one."""
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [megatron-lrpath]"]
    if origin.plan is not None and origin.plan.license:
        lines.append(f"license: {json.dumps(origin.plan.license, ensure_ascii=False)}")
    return "\n".join(["---", *lines, "---"]) + "\n"


USAGE = """## Usage

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on a hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
{ask}
answer = model.generate(**asked, max_new_tokens=100)
print(tokenizer.decode(answer[0], skip_special_tokens=True))
```
"""
ASK_TEXT = 'asked = tokenizer("The first lines of", return_tensors="pt")'
ASK_CHAT = """chat = [{"role": "user", "content": "What is new?"}]
asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""


def usage(chats: bool) -> str:
    """Return the usage: a conversation if the model has a chat template, otherwise a text to continue."""
    return USAGE.replace("{ask}", ASK_CHAT if chats else ASK_TEXT)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in row) + " |\n" for row in lines)


def architecture_table(model: Architecture, dtype: str) -> str:
    """Return a table of the model's class and sizes."""
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
    """Return a schedule as text; `peak`: the rate at which its decay begins, if that is not max_lr."""
    return f"{schedule.style}, {peak or schedule.max_lr:.6g} to {schedule.min_lr:g}, warm-up {schedule.warmup:,} steps"


def fine_tuning(plan: Plan, run: Run, origin: Origin) -> str:
    """Return the fine-tuning's data, schedule and steps, followed by the table of the version's training."""
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
    return "## Fine-tuning\n\n" + table(("", ""), rows) + changed(origin) + "\n" + version


def trained_on(plan: Plan, run: Run, step: int) -> str:
    """Return the number of tokens up to `step`, with the tokens of the parent and of an adopted model."""
    begin = plan.timeline.begins[0]
    text = f"{plan.tokens(begin, step):,}"
    if run.parent:
        text += f", of which {plan.tokens(begin, run.parent.step):,} up to step {run.parent.step:,} of {run.parent.run}"
    slices = f"slices {listing(list(plan.adopted.data))}" if plan.adopted and plan.adopted.data else ""
    if plan.megatron.get("pretrained_checkpoint"):
        text += f"; those of the imported model are not counted ({slices or 'unknown data'})"
    elif plan.adopted is not None:
        known = f" ({slices})" if slices else ", unknown"
        before = plan.adopted.samples * plan.batch.seq_length
        text += f"; before the adopted step {plan.adopted.step:,}: {before:,} tokens of other data{known}"
    return text


def training(plan: Plan, run: Run, origin: Origin) -> str:
    """Return a table of plan, version, paradigm, schedule and steps; for a fine-tuning, see `fine_tuning`."""
    if run.is_sft:
        return fine_tuning(plan, run, origin)
    version = plan.versions[run.version_index - 1]
    rows = [
        ("plan", plan.name),
        ("version", f"{run.version} ({run.version_index} of {len(plan.versions)})"),
        ("run", f"{run.name}: {KINDS[run.kind].about}"),
        (
            "starts from",
            f"{run.parent.run}, step {run.parent.step:,}" if run.parent else beginning_text(plan),
        ),
        ("steps", f"{run.first_step:,} to {origin.step:,} of {run.last_step:,}"),
        ("tokens a step", step_tokens_text(plan)),
        ("tokens trained on", trained_on(plan, run, origin.step)),
        ("schedule", rates(plan.schedule, run.path.peak)),
        ("seed", plan.seed),
    ]
    if run.paradigm == OURS.name:
        rows.insert(7, ("α (share of a version's steps that decay)", f"{version.alpha or plan.alpha:g}"))
    if run.mix is not None:
        samples = run.mix.samples(plan.batch_of(run).global_batch_size, run.steps)
        counts = ", ".join(f"{number:,} of {name}" for name, number in samples.items())
        rows.append(("samples of other data in the branch", f"{counts} ({mix_text(run.mix)})"))
    replays = [
        f"{one.name}: {replay_text(one.replay)}" for one in plan.versions[: run.version_index] if one.replay
    ]
    if replays and run.kind != SCRATCH.name:
        rows.append(("samples of earlier versions read again", "; ".join(replays)))
    return "## Training\n\n" + table(("", ""), rows) + changed(origin)


def changed(origin: Origin) -> str:
    """Return the settings that the table has from the plan and the model was trained without; empty for none."""
    if not origin.changes:
        return ""
    lines = "".join(f"- {one}\n" for one in origin.changes)
    return f"\nThe plan was changed since the training; `was` is what the model was trained with:\n\n{lines}"


def data_table(origin: Origin) -> str:
    """Return a table of tokens by version and domain that the run and its ancestors could read."""
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
    """Return a table of perplexities on the fixed validation sets; empty without an evaluation."""
    if origin.evaluation is None:
        return ""
    rows = score_rows("all", origin.evaluation)
    for name, found in (origin.evaluation.get("sets") or {}).items():
        rows += score_rows(f"{name}, all", found, f"{name}, ")
    return "## Perplexity on the validation set\n\n" + table(("domain", "perplexity", "tokens"), rows)


def score_rows(whole: str, found: dict[str, Any], before: str = "") -> list[tuple[str, str, str]]:
    """Return a row for a whole set, and one for each of its domains."""
    scores = {whole: found} | {f"{before}{domain}": one for domain, one in found.get("domains", {}).items()}
    return [(name, f"{one['perplexity']:.4f}", f"{one['tokens']:,}") for name, one in scores.items()]


def provenance(origin: Origin) -> str:
    """Return a table of packages, commit and fingerprints, as recorded at the run's last start."""
    if not origin.lineage or not origin.lineage.get("starts"):
        return ""
    last = origin.lineage["starts"][-1]
    rows = list(last.get("packages", {}).items())
    rows += [("git commit", last["git_commit"])] if last.get("git_commit") else []
    rows += [("identity of the run", origin.lineage.get("identity_hash", ""))]
    slices = origin.lineage.get("identity", {}).get("slices", {})
    rows += [(f"fingerprint of slice {name}", value) for name, value in slices.items()]
    return "## Provenance\n\n" + table(("", ""), rows)

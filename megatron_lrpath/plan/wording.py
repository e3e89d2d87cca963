"""Facts of a plan as text, the same in the page, the Markdown and the terminal."""

from __future__ import annotations

from fractions import Fraction

from megatron_lrpath.paradigms import CPT, CPT_VARIANTS, PARADIGM_ROWS
from megatron_lrpath.plan import Plan
from megatron_lrpath.plan.identity import branch_arguments
from megatron_lrpath.plan.mix import Mix, Replay
from megatron_lrpath.plan.sft import Sft
from megatron_lrpath.schedule import STYLES
from megatron_lrpath.wording import listing, plural


def schedule_name(plan: Plan) -> str:
    """Return the schedule as spelled in the paper's tables."""
    style = STYLES[plan.schedule.style]
    return style.title or style.name


def beginning_text(plan: Plan) -> str:
    """Return the start of a run without a parent, with the data that it was trained on."""
    adopted = plan.adopted
    if adopted is None and not plan.megatron.get("pretrained_checkpoint"):
        return "random weights"
    data = listing(list(adopted.data)) if adopted and adopted.data else "unknown"
    if adopted is None or adopted.is_imported:
        return f"an imported model (data: {data})"
    return f"the adopted checkpoint of step {adopted.step:,} (data: {data})"


def step_tokens_text(plan: Plan) -> str:
    """Return the tokens of a step, with the versions from which they change: `1,024, 2,048 from v3 on`."""
    first, *later = plan.batch_sizes.changes
    length, begins = plan.batch.seq_length, plan.timeline.begins
    names = {step: plan.versions[begins.index(step)].name for step, _ in later}
    return ", ".join(
        [f"{first[1] * length:,}", *(f"{size * length:,} from {names[step]} on" for step, size in later)]
    )


def main_rate_text(plan: Plan) -> str:
    """Describe how the main path's rate changes; empty if it does not."""
    if plan.falling is not None:
        return f"main path falling with power {plan.falling.power:g} from step {plan.falling.begin:,}"
    moves = [
        f"{version.max_lr:g} from {version.name} on (over {plural(plan.timeline.rate_steps(version), 'step')})"
        for version in plan.versions
        if version.max_lr is not None
    ]
    return f"main path at {', '.join(moves)}" if moves else ""


def branch_arguments_text(plan: Plan) -> str:
    """Describe the arguments in which branches differ from the main path, with the versions unless all have
    the same.
    """
    texts: dict[str, list[str]] = {}
    for version in plan.versions:
        own = branch_arguments(plan, version)
        texts.setdefault(", ".join(f"{name} {value}" for name, value in own.items()), []).append(version.name)
    if len(texts) == 1:
        return next(iter(texts))
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in texts.items() if text)


def paradigm_name(plan: Plan, paradigm: str) -> str:
    """Return PTFS, CPT with its variant, or Ours."""
    title = PARADIGM_ROWS[paradigm].title
    return f"{title} ({CPT_VARIANTS[plan.cpt_variant].title})" if paradigm == CPT.name else title


def mix_text(mix: Mix) -> str:
    """Describe a branch's mix: `20% curated, 5% code-2025`."""
    return ", ".join(f"{share_text(part.share)} {part.name}" for part in mix.parts)


def share_text(share: Fraction) -> str:
    """Return a share in percent, with up to three decimals: `12.5%`."""
    return f"{float(share):.3%}".rstrip("%0").rstrip(".") + "%"


def replay_text(replay: Replay) -> str:
    """Describe a version's replay: `20% replayed`, `20% replayed (v1 2 : v2 1)`."""
    weights = " : ".join(f"{name} {weight}" for name, weight in replay.weights)
    return f"{share_text(replay.share)} replayed" + (f" ({weights})" if weights else "")


def replays_text(plan: Plan) -> str:
    """Describe the replays of all versions, with names unless all but the first are equal; empty without any."""
    texts: dict[str, list[str]] = {}
    for version in plan.versions[1:]:
        texts.setdefault(replay_text(version.replay) if version.replay else "", []).append(version.name)
    if len(texts) == 1:
        return next(iter(texts))
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in texts.items() if text)


def sft_text(sft: Sft) -> str:
    """Describe a fine-tuning in a line."""
    rate, batch = sft.schedule, sft.batch
    length = plural(sft.epochs, "epoch") if sft.epochs else plural(sft.steps or 0, "step")
    return (
        f"{', '.join(sft.versions)} of {', '.join(PARADIGM_ROWS[name].title for name in sft.paradigms)} on "
        f"{', '.join(sft.data)}: {length} of {batch.global_batch_size:,} packed samples of "
        f"{batch.seq_length:,} positions, {rate.style} from {rate.max_lr:g} to {rate.min_lr:g}"
    )

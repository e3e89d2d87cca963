"""Facts of a plan as text: the same in the page, the Markdown and the terminal."""

from __future__ import annotations

from megatron_lrpath.paradigms import CPT, CPT_VARIANTS, PARADIGM_ROWS
from megatron_lrpath.plan import Plan
from megatron_lrpath.plan.identity import branch_arguments
from megatron_lrpath.plan.mix import Mix
from megatron_lrpath.plan.sft import Sft
from megatron_lrpath.schedule import STYLES
from megatron_lrpath.wording import plural


def schedule_name(plan: Plan) -> str:
    """The schedule as the paper's tables spell it."""
    style = STYLES[plan.schedule.style]
    return style.title or style.name


def beginning_text(plan: Plan) -> str:
    """What a run without a parent starts from."""
    if plan.adopted is not None:
        return f"adopted, step {plan.adopted.step:,}"
    return "an imported model" if plan.megatron.get("pretrained_checkpoint") else "random weights"


def step_tokens_text(plan: Plan) -> str:
    """Tokens of a step, with the versions from which on they change: `1,024, 2,048 from v3 on`."""
    first, *later = plan.batch_sizes.changes
    length, begins = plan.batch.seq_length, plan.timeline.begins
    names = {step: plan.versions[begins.index(step)].name for step, _ in later}
    return ", ".join(
        [f"{first[1] * length:,}", *(f"{size * length:,} from {names[step]} on" for step, size in later)]
    )


def main_rate_text(plan: Plan) -> str:
    """How the main path's rate changes, in words; empty where it does not."""
    if plan.falling is not None:
        return f"main path falling with power {plan.falling.power:g} from step {plan.falling.begin:,}"
    moves = [
        f"{version.max_lr:g} from {version.name} on (over {plural(plan.timeline.rate_steps(version), 'step')})"
        for version in plan.versions
        if version.max_lr is not None
    ]
    return f"main path at {', '.join(moves)}" if moves else ""


def branch_arguments_text(plan: Plan) -> str:
    """The arguments in which branches differ from the main path, with the versions unless all have the same."""
    texts: dict[str, list[str]] = {}
    for version in plan.versions:
        own = branch_arguments(plan, version)
        texts.setdefault(", ".join(f"{name} {value}" for name, value in own.items()), []).append(version.name)
    if len(texts) == 1:
        return next(iter(texts))
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in texts.items() if text)


def paradigm_name(plan: Plan, paradigm: str) -> str:
    """PTFS, CPT with its variant, or Ours."""
    title = PARADIGM_ROWS[paradigm].title
    return f"{title} ({CPT_VARIANTS[plan.cpt_variant].title})" if paradigm == CPT.name else title


def mix_text(mix: Mix) -> str:
    """A branch's mix: `20% curated, 5% code-2025`."""
    return ", ".join(
        f"{float(part.share):.3%}".rstrip("%0").rstrip(".") + f"% {part.name}" for part in mix.parts
    )


def sft_text(sft: Sft) -> str:
    """A fine-tuning in a line."""
    rate, batch = sft.schedule, sft.batch
    length = plural(sft.epochs, "epoch") if sft.epochs else plural(sft.steps or 0, "step")
    return (
        f"{', '.join(sft.versions)} of {', '.join(PARADIGM_ROWS[name].title for name in sft.paradigms)} on "
        f"{', '.join(sft.data)}: {length} of {batch.global_batch_size:,} packed samples of "
        f"{batch.seq_length:,} positions, {rate.style} from {rate.max_lr:g} to {rate.min_lr:g}"
    )

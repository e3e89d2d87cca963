"""How the report says names and numbers: the same in the page, the Markdown and the terminal."""

from __future__ import annotations

from megatron_lrpath.plan import Plan
from megatron_lrpath.plan.mix import Mix
from megatron_lrpath.plan.sft import Sft
from megatron_lrpath.wording import plural

PARADIGM_NAMES = {"ptfs": "PTFS", "cpt": "CPT", "ours": "Ours"}
PARADIGM_LONG_NAMES = {
    "ptfs": "pre-training from scratch",
    "cpt": "continual pre-training",
    "ours": "learning-rate path switching",
}
SCHEDULE_NAMES = {"knee": "Knee", "wsd": "WSD", "inverse-square-root": "inverse square root"}
VARIANT_NAMES = {"reset-max": "ResetMax", "rewarm-max": "RewarmMax", "keep-min": "KeepMin"}


def schedule_name(plan: Plan) -> str:
    """The schedule as the paper's tables spell it."""
    return SCHEDULE_NAMES.get(plan.schedule.style, plan.schedule.style)


def paradigm_name(plan: Plan, paradigm: str) -> str:
    """PTFS, CPT with its variant, or Ours."""
    if paradigm == "cpt":
        return f"CPT ({VARIANT_NAMES.get(plan.cpt_variant, plan.cpt_variant)})"
    return PARADIGM_NAMES[paradigm]


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
        f"{', '.join(sft.versions)} of {', '.join(PARADIGM_NAMES[name] for name in sft.paradigms)} on "
        f"{', '.join(sft.data)}: {length} of {batch.global_batch_size:,} packed samples of "
        f"{batch.seq_length:,} positions, {rate.style} from {rate.max_lr:g} to {rate.min_lr:g}"
    )

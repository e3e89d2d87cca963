"""How the report says names and numbers: the same in the page, the Markdown and the terminal."""

from __future__ import annotations

from datetime import timedelta

from megatron_lrpath.plan import Plan
from megatron_lrpath.plan.mix import Mix
from megatron_lrpath.plan.sft import Sft

MISSING = "–"
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
    length = count(sft.epochs, "epoch") if sft.epochs else count(sft.steps or 0, "step")
    return (
        f"{', '.join(sft.versions)} of {', '.join(PARADIGM_NAMES[name] for name in sft.paradigms)} on "
        f"{', '.join(sft.data)}: {length} of {batch.global_batch_size:,} packed samples of "
        f"{batch.seq_length:,} positions, {rate.style} from {rate.max_lr:g} to {rate.min_lr:g}"
    )


def count(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def short_number(value: float) -> str:
    """A large count with three digits: 812, 4.1K, 52.4M, 10.5B."""
    for limit, divisor, suffix in ((1e3, 1, ""), (1e6, 1e3, "K"), (1e9, 1e6, "M"), (1e12, 1e9, "B")):
        if abs(value) < limit * 0.9995:
            return f"{value / divisor:.3g}{suffix}"
    return f"{value / 1e12:.3g}T"


def duration(seconds: float | None) -> str:
    """`48 s`, `3 min 05 s`, `2 h 07 min`, `3 d 4 h`; a dash where it is not known."""
    if seconds is None:
        return MISSING
    whole = timedelta(seconds=round(seconds))
    minutes, rest = divmod(int(whole.total_seconds()), 60)
    if minutes == 0:
        return f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def decimals(values: list[float]) -> int:
    """How many decimals tell perplexities apart: the paper's two, three where they are below 10."""
    return 3 if values and min(values) < 10 else 2


def signed_percent(value: float) -> str:
    """A relative change with its sign: `+2.1%`, `−0.4%`."""
    return f"{value:+.1%}".replace("-", "−")


def listing(items: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""

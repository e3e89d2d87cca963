"""Whole schedules equal Megatron's own scheduler where Megatron has the shape."""

import math

import pytest

from megatron_lrpath.schedule import LRPath, Schedule

WARMUP, END = 64, 1064


class FakeOptimizer:
    """Optimizer with only the groups into which Megatron's scheduler writes a rate."""

    def __init__(self) -> None:
        self.param_groups: list[dict] = [{}]


def megatron_rates(style: str, max_lr: float, min_lr: float, warmup: int, **wsd: object) -> list[float]:
    """Return the rates that Megatron's scheduler sets at positions 0 … END."""
    scheduler = pytest.importorskip("megatron.core.optimizer_param_scheduler").OptimizerParamScheduler(
        FakeOptimizer(),
        init_lr=0.0,
        max_lr=max_lr,
        min_lr=min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=END,
        lr_decay_style=style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=1,
        wd_incr_style="constant",
        **wsd,
    )
    rates = [scheduler.optimizer.param_groups[0]["lr"]]
    for _ in range(END):
        scheduler.step(1)
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
    return rates


def our_rates(schedule: Schedule) -> list[float]:
    path = LRPath(schedule, "whole", 0, END, warmup=schedule.warmup)
    return [path.lr_at(position) for position in range(END + 1)]


@pytest.mark.parametrize("min_lr", [0.0, 3e-5, 3e-4])
@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize("style", ["cosine", "linear", "constant", "inverse-square-root"])
def test_equals_megatron_at_every_position(style: str, warmup: int, min_lr: float) -> None:
    theirs = megatron_rates(style, 3e-4, min_lr, warmup)
    ours = our_rates(Schedule(style, 3e-4, min_lr, warmup))
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 2 * math.ulp(3e-4)
    if style in ("cosine", "linear"):  # the same order of operations: equal to the last bit
        assert ours[warmup + 1 :] == theirs[warmup + 1 :]


@pytest.mark.parametrize("min_lr", [0.0, 3e-5])
@pytest.mark.parametrize("shape", ["linear", "cosine", "exponential", "minus-sqrt"])
def test_wsd_equals_megatron_at_every_position(shape: str, min_lr: float) -> None:
    theirs = megatron_rates(
        "WSD", 3e-4, min_lr, WARMUP, wsd_decay_steps=100, lr_wsd_decay_style=shape.replace("-", "_")
    )
    ours = our_rates(Schedule("wsd", 3e-4, min_lr, WARMUP, wsd_decay_fraction=0.1, wsd_decay_shape=shape))
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 2 * math.ulp(3e-4)
    assert ours[-100:] == theirs[-100:]

"""Learning-rate curves: pure functions of a position, without torch."""

from megatron_lrpath.schedule.curves import tenth
from megatron_lrpath.schedule.path import LRPath
from megatron_lrpath.schedule.styles import (
    KNOBS,
    STYLES,
    WSD_DECAY_SHAPES,
    Knob,
    Schedule,
    Style,
    register,
    smooth,
    with_branch_shape,
)

__all__ = [
    "KNOBS",
    "STYLES",
    "WSD_DECAY_SHAPES",
    "Knob",
    "LRPath",
    "Schedule",
    "Style",
    "register",
    "smooth",
    "tenth",
    "with_branch_shape",
]

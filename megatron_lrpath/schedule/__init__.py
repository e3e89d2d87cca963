"""Learning-rate curves: pure functions of a position, without torch."""

from megatron_lrpath.schedule.curves import tenth
from megatron_lrpath.schedule.path import SHAPES, LRPath
from megatron_lrpath.schedule.styles import (
    KNOBS,
    STYLES,
    WSD_DECAY_SHAPES,
    BranchShape,
    Knob,
    Schedule,
    Span,
    Style,
    register,
    smooth,
    with_branch_shape,
)

__all__ = [
    "KNOBS",
    "SHAPES",
    "STYLES",
    "WSD_DECAY_SHAPES",
    "BranchShape",
    "Knob",
    "LRPath",
    "Schedule",
    "Span",
    "Style",
    "register",
    "smooth",
    "tenth",
    "with_branch_shape",
]

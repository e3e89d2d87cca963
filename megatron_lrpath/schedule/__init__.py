"""Learning-rate curves: pure functions of a position, without torch."""

from megatron_lrpath.schedule.curves import tenth
from megatron_lrpath.schedule.knobs import STYLES, WSD_DECAY_SHAPES, Schedule
from megatron_lrpath.schedule.path import SHAPES, LRPath

__all__ = ["SHAPES", "STYLES", "WSD_DECAY_SHAPES", "LRPath", "Schedule", "tenth"]

"""Learning-rate curves: pure functions of a position, without torch."""

from megatron_lrpath.schedule.path import LRPath
from megatron_lrpath.schedule.styles import STYLES, Schedule

__all__ = ["STYLES", "LRPath", "Schedule"]

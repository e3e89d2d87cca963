"""Learning-rate curves: pure functions of a position, without torch."""

from megatron_lrpath.schedule.main_path import MainRate, Move
from megatron_lrpath.schedule.path import LRPath
from megatron_lrpath.schedule.styles import STYLES, Schedule

__all__ = ["STYLES", "LRPath", "MainRate", "Move", "Schedule"]

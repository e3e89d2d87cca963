"""Learning-rate curves: pure functions of a position, without torch."""

from megatron_lrpath.schedule.batch_sizes import BatchSizes
from megatron_lrpath.schedule.main_path import MainRate, Move
from megatron_lrpath.schedule.path import LRPath
from megatron_lrpath.schedule.styles import STYLES, Schedule

__all__ = ["STYLES", "BatchSizes", "LRPath", "MainRate", "Move", "Schedule"]

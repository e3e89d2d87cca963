"""Preloaded by the fork server of train.py and merge.py: a training costs its own time, not that of its imports."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

from megatron_lrpath.launch import warm

warm.import_everything()

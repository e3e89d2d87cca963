"""Preloaded by the tests' fork server: a training then costs its own time and not the seconds of its imports."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

from megatron_lrpath.launch import warm

warm.import_everything()

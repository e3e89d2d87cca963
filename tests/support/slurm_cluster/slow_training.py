"""The real entry with a pause of SLOW_SECONDS before every step, so that tests can act during a run."""

from __future__ import annotations

import functools
import os
import runpy
import sys
import time
from typing import Any

from megatron_lrpath.training import machine

activate = machine.activate


def activate_and_slow_down(kind: str) -> None:
    """Prepare for the device, as the original, and put the pause into Megatron's loop."""
    activate(kind)
    from megatron.training import training

    original = training.train_step

    @functools.wraps(original)
    def train_step(*args: Any, **kwargs: Any) -> Any:
        time.sleep(float(os.environ["SLOW_SECONDS"]))
        return original(*args, **kwargs)

    training.train_step = train_step


machine.activate = activate_and_slow_down
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)

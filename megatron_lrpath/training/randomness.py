"""Random states stay as the checkpoint left them until the first step uses them."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def wrap_build_data_iterators(original: Callable[..., Any]) -> Callable[..., Any]:
    """Build the data iterators without moving the random states, which have been loaded by then.

    Torch's loader draws a seed for its workers from the default generator. An uninterrupted run draws it once,
    a resumed one again; on the CPU dropout uses that generator too, and the two would part.
    """

    @functools.wraps(original)
    def build_train_valid_test_data_iterators(build_train_valid_test_datasets_provider: Any) -> Any:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        iterators = original(build_train_valid_test_datasets_provider)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        return iterators

    return build_train_valid_test_data_iterators

"""States of random numbers, and recomputation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class CudaRNGStatesTracker:
    """Placeholder for a name that Megatron imports."""


@contextmanager
def activation_recompute_forward(**_: Any) -> Iterator[None]:
    """Do nothing: nothing is quantized, so a second forward pass needs no state of the first."""
    yield

"""States of random numbers, and recomputation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class CudaRNGStatesTracker:
    """Named by Megatron, not used."""


@contextmanager
def activation_recompute_forward(**_: Any) -> Iterator[None]:
    """Nothing is quantized, so that a second forward pass needs nothing of the first."""
    yield

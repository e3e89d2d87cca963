"""Contexts of fp8, which the stand-in does not have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class FP8GlobalStateManager:
    """What Megatron asks whether fp8 is on."""

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """Never."""
        return False

    @classmethod
    def is_fp8_calibration(cls) -> bool:
        """Never."""
        return False

    @classmethod
    def reset(cls) -> None:
        """Nothing is kept."""


@contextmanager
def fp8_autocast(enabled: bool = False, **_: Any) -> Iterator[None]:
    """Only without fp8."""
    if enabled:
        raise NotImplementedError("the stand-in has no fp8")
    yield


fp8_model_init = fp8_autocast

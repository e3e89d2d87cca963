"""Contexts of fp8, which the stand-in does not have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class FP8GlobalStateManager:
    """State that Megatron reads to find out whether fp8 is on."""

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """Return False: there is no fp8."""
        return False

    @classmethod
    def is_fp8_calibration(cls) -> bool:
        """Return False: there is no fp8."""
        return False

    @classmethod
    def reset(cls) -> None:
        """Do nothing: there is no state."""


@contextmanager
def fp8_autocast(enabled: bool = False, **_: Any) -> Iterator[None]:
    """Do nothing, and raise NotImplementedError if fp8 is enabled."""
    if enabled:
        raise NotImplementedError("the stand-in has no fp8")
    yield


fp8_model_init = fp8_autocast

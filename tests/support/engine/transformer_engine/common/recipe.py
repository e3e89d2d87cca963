"""Recipes of fp8, as far as Megatron names them; none can run here."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple


class _FormatHelper(NamedTuple):
    max_fwd: float
    max_bwd: float


class Format(enum.Enum):
    """Number formats, by their greatest values forward and backward."""

    E4M3 = _FormatHelper(448, 448)
    HYBRID = _FormatHelper(448, 57344)


class Recipe:
    """The base of all recipes."""


@dataclass
class DelayedScaling(Recipe):
    """Scales from the maxima of past steps."""

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"

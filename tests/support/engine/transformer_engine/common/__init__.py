"""Common parts of all frameworks: the recipes of fp8."""

from transformer_engine.common import recipe

__all__ = ["recipe"]

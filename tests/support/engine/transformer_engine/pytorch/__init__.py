"""Modules of torch."""

from transformer_engine.pytorch import distributed, fp8, optimizers
from transformer_engine.pytorch.attention import DotProductAttention
from transformer_engine.pytorch.modules import GroupedLinear, LayerNorm, LayerNormLinear, Linear, RMSNorm

__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "distributed",
    "fp8",
    "optimizers",
]

"""Attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from transformer_engine.pytorch.extra_state import ExtraState


class DotProductAttention(ExtraState):
    """Causal attention over [sequence, batch, heads, width]."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        *,
        attention_dropout: float = 0.0,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if attention_dropout:
            raise NotImplementedError("the stand-in has no dropout")
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
        attn_mask_type: str = "causal",
        **_: Any,
    ) -> torch.Tensor:
        """Return the attention output as [sequence, batch, heads · width]."""
        if attn_mask_type != "causal" or mask is not None:
            raise NotImplementedError("the stand-in has causal attention alone")
        rows = [part.permute(1, 2, 0, 3) for part in (query, key, value)]
        found = F.scaled_dot_product_attention(
            *rows, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )
        return found.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)

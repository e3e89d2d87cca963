"""Rotary position embedding."""

from __future__ import annotations

from typing import Any

import torch


def apply_rotary_pos_emb(
    tensor: torch.Tensor, angles: torch.Tensor, tensor_format: str = "sbhd", **_: Any
) -> torch.Tensor:
    """Rotate the first `angles.shape[-1]` numbers of each head; [sequence, batch, heads, width]."""
    if tensor_format != "sbhd":
        raise NotImplementedError("the stand-in has one format")
    width = angles.shape[-1]
    angles, turned, rest = angles[: tensor.shape[0]], tensor[..., :width], tensor[..., width:]
    left, right = turned.float().chunk(2, dim=-1)
    rotated = turned * angles.cos() + torch.cat((-right, left), dim=-1) * angles.sin()
    return torch.cat((rotated.to(tensor.dtype), rest), dim=-1)

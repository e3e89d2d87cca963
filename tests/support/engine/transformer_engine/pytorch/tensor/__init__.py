"""Tensors in fp8, of which there are none here."""

import torch


class QuantizedTensor(torch.Tensor):
    """Named by Megatron, not used."""

"""Tensors in fp8; there are none here."""

import torch


class QuantizedTensor(torch.Tensor):
    """Placeholder for a name that Megatron imports."""

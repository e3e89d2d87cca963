"""Linear layers and norms; tensor-parallel ranks share out the linear layers, without sequence parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.parameter import Parameter

from transformer_engine.pytorch.extra_state import ExtraState
from transformer_engine.pytorch.parallel import Copied, Summed


def parallel(parameter: Parameter, dimension: int) -> None:
    """Mark a parameter as tensor-parallel with the attributes that Megatron expects."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = dimension  # type: ignore[attr-defined]
    parameter.partition_stride = 1  # type: ignore[attr-defined]


class _Product(ExtraState):
    """Common parts of `Linear` and `LayerNormLinear`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        params_dtype: torch.dtype,
        device: str = "cpu",
        init_method: Callable[[torch.Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        parallel_mode: str | None = None,
        tp_size: int = 1,
        tp_group: Any = None,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        if fuse_wgrad_accumulation or (tp_size > 1 and sequence_parallel):
            raise NotImplementedError("the stand-in has neither fused gradients nor sequence parallelism")
        self.parallel_mode, self.return_bias = parallel_mode, return_bias
        self.tp_group = tp_group if tp_size > 1 else None
        if parallel_mode == "column":
            out_features //= tp_size
        elif parallel_mode == "row":
            in_features //= tp_size
        self.weight = Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        if init_method is not None:
            with torch.no_grad():
                init_method(self.weight)
        self.bias = Parameter(torch.zeros(out_features, dtype=params_dtype, device=device)) if bias else None
        if parallel_mode is not None:
            parallel(self.weight, 0 if parallel_mode == "column" else 1)

    def product(self, inputs: torch.Tensor) -> Any:
        """Return the product with the weight, over all ranks, with the bias added or separate."""
        if self.tp_group is not None and self.parallel_mode == "column":
            inputs = Copied.apply(inputs, self.tp_group)
        outputs = F.linear(inputs, self.weight)
        if self.tp_group is not None and self.parallel_mode == "row":
            outputs = Summed.apply(outputs, self.tp_group)
        if self.return_bias:
            return outputs, self.bias
        return outputs if self.bias is None else outputs + self.bias


class Linear(_Product):
    """A linear layer."""

    def forward(self, inputs: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        """Apply the layer, […, in] to […, out]."""
        return self.product(inputs)


class LayerNormLinear(_Product):
    """A norm and a linear layer."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        zero_centered_gamma: bool = False,
        **named: Any,
    ) -> None:
        super().__init__(in_features, out_features, **named)
        if normalization != "RMSNorm" or zero_centered_gamma:
            raise NotImplementedError("the stand-in has plain RMSNorm alone")
        self.eps = eps
        self.layer_norm_weight = Parameter(torch.ones(in_features, dtype=named["params_dtype"]))

    def forward(self, inputs: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        """Apply the layer, […, in] to […, out]."""
        return self.product(F.rms_norm(inputs, inputs.shape[-1:], self.layer_norm_weight, self.eps))


class RMSNorm(ExtraState):
    """A norm; in Transformer Engine 2 it is an operation, whose state without fp8 is an empty dictionary."""

    without_fp8: Any = {}  # noqa: RUF012

    def __init__(
        self, normalized_shape: int, eps: float = 1e-5, *, params_dtype: torch.dtype, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = Parameter(torch.ones(normalized_shape, dtype=params_dtype))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the normalized inputs, of the same shape."""
        return F.rms_norm(inputs, inputs.shape[-1:], self.weight, self.eps)


class LayerNorm(ExtraState):
    """Placeholder for a name that Megatron imports."""


class GroupedLinear(ExtraState):
    """Placeholder for a name that Megatron imports."""

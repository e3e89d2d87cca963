"""The optimizer, which keeps one step count per parameter group, and operations on lists of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """AdamW like Transformer Engine's: each group with parameters has `step`, from the first update on."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        capturable: bool = False,
    ) -> None:
        if capturable or not adam_w_mode:
            raise NotImplementedError("the stand-in has AdamW alone")
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, grad_scaler: Any = None) -> None:  # type: ignore[override]
        """Update all parameters with a gradient."""
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, group)

    def update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        """Apply AdamW to a parameter, in fp32."""
        state, (beta1, beta2), gradient = self.state[parameter], group["betas"], parameter.grad.float()  # type: ignore[union-attr]
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        first, second = (1 - beta ** group["step"] for beta in (beta1, beta2))
        root = (state["exp_avg_sq"] / second).sqrt_().add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(state["exp_avg"], root, value=-group["lr"] / first)


class FusedSGD(torch.optim.SGD):
    """SGD of torch."""


def multi_tensor_applier(
    operation: Callable[..., Any], overflow: torch.Tensor, lists: Sequence[Sequence[torch.Tensor]], *args: Any
) -> Any:
    """Call an operation on lists of tensors."""
    return operation(2048 * 32, overflow, lists, *args)


def multi_tensor_l2norm(_: int, __: Any, lists: Sequence[Sequence[torch.Tensor]], *___: Any) -> Any:
    """Return the norm of all tensors together, and None."""
    return torch.stack([tensor.float().norm() for tensor in lists[0]]).norm().view(1), None


def multi_tensor_scale(_: int, __: Any, lists: Sequence[Sequence[torch.Tensor]], scale: float) -> None:
    """Write the first list, scaled, into the second."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


multi_tensor_scale_tensor = multi_tensor_scale

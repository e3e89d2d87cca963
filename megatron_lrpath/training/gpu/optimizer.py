"""torch's Adam and the norm of the gradients on a GPU, where neither Transformer Engine's nor Apex' are installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_lrpath.training.gpu.measures import ADAM, GRAD_NORM
from megatron_lrpath.training.session import Session

STEP = "step"


def init_group(
    session: Session,
    original: Callable[..., Any],
    self: Any,
    group: dict[str, Any],
    *lists: Any,
    **named: Any,
) -> Any:
    """Let Adam make its update in torch's fused kernel, which Megatron does not ask for.

    This is done at each step, because loading a checkpoint brings the stored groups. The fused kernel needs the
    step counts on the GPU, where loading and `make_state` do not put them.
    """
    if ADAM in session.kernels and not group.get("differentiable"):
        group["fused"], group["foreach"] = True, False
        for parameter in group["params"]:
            step = self.state[parameter].get(STEP) if parameter in self.state else None
            if isinstance(step, Tensor) and step.device != parameter.device:
                self.state[parameter][STEP] = step.to(parameter.device, torch.float32)
    return original(self, group, *lists, **named)


def l2_norm(
    session: Session,
    original: Callable[..., Any],
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: list[list[Tensor]],
    *args: Any,
    **named: Any,
) -> Any:
    """The norm of all gradients, which stays on the GPU; Megatron's own way fetches the norm of each tensor.

    Returns it as a tensor of one number, and None for the norms of single tensors.
    """
    from megatron.core.utils import local_multi_tensor_l2_norm  # must follow the choice of the device

    if (
        GRAD_NORM not in session.kernels
        or original is not local_multi_tensor_l2_norm
        or args not in ((), (False,))
    ):
        return original(chunk_size, noop_flag, tensor_lists, *args, **named)
    norms = torch._foreach_norm([tensor for tensors in tensor_lists for tensor in tensors])
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None

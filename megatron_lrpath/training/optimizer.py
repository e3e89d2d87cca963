"""What Megatron's optimizers lack for loading a parent: torch's Adam at any layout, other maximal rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RateChange:
    """The (max_lr, min_lr) that the checkpoint to load was saved under, and this run's own."""

    stored: tuple[float, float]
    own: tuple[float, float]

    def renamed(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Stored parameter groups under this run's rates; groups with rates of their own (decoupled) stay."""
        return [
            {**group, "max_lr": self.own[0], "min_lr": self.own[1]}
            if (group.get("max_lr"), group.get("min_lr")) == self.stored
            else group
            for group in groups
        ]


def sharded_state_dict(
    original: Callable[..., Any],
    self: Any,
    model_sharded_state_dict: Any,
    is_loading: bool = False,
    *rest: Any,
    **named: Any,
) -> Any:
    """Make the optimizer's state before it is described for loading, as Megatron does for other optimizers.

    The values made here are all replaced by the loaded ones.
    """
    if is_loading and not self.optimizer.state:
        self._init_optimizer_states_with_dummy_values()
    return original(self, model_sharded_state_dict, is_loading, *rest, **named)


def set_states(
    original: Callable[..., None],
    self: Any,
    model_param: Any,
    tensors: dict[str, Any],
    *args: Any,
    **named: Any,
) -> None:
    """Set weights and moments; the step count, the same for all, came with the parameter groups already."""
    original(self, model_param, {"step": None, **tensors}, *args, **named)

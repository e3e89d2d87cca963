"""What Megatron's optimizers lack for loading a parent: torch's Adam at any layout, other maximal rates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

Rates = tuple[float, float]

_declared_change: tuple[Rates, Rates] | None = None


def declare_rates(stored: Rates, own: Rates) -> None:
    """Say that the checkpoint to load was saved under `stored` (max_lr, min_lr) and this run has `own`."""
    global _declared_change
    _declared_change = (stored, own)


def renamed(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stored parameter groups under this run's rates; groups with rates of their own (decoupled) stay."""
    if _declared_change is None:
        return groups
    stored, own = _declared_change
    return [
        {**group, "max_lr": own[0], "min_lr": own[1]}
        if (group.get("max_lr"), group.get("min_lr")) == stored
        else group
        for group in groups
    ]


def wrap_load_state_dict(original: Callable[..., None]) -> Callable[..., None]:
    """Load a state that may have been saved under other rates, with a step count for each parameter."""

    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        inner = state_dict["optimizer"]
        groups = {"param_groups": renamed(inner["param_groups"])}
        original(self, {**state_dict, "optimizer": {**inner, **groups}})
        for state in self.optimizer.state.values():
            # One tensor was given to all parameters, so that torch's Adam would count every step many times.
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    return load_state_dict


def wrap_filter_and_reorder(original: Callable[..., Any]) -> Any:
    """Pair parameter groups that may have been saved under other rates."""

    @functools.wraps(original)
    def filter_and_reorder(
        current_groups: list[dict[str, Any]], state_dict_groups: list[dict[str, Any]]
    ) -> Any:
        return original(current_groups, renamed(state_dict_groups))

    return staticmethod(filter_and_reorder)


def wrap_sharded_state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    """Make the optimizer's state before it is described for loading, as Megatron does for other optimizers.

    The values made here are all replaced by the loaded ones.
    """

    @functools.wraps(original)
    def sharded_state_dict(
        self: Any, model_sharded_state_dict: Any, is_loading: bool = False, *rest: Any, **named: Any
    ) -> Any:
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return original(self, model_sharded_state_dict, is_loading, *rest, **named)

    return sharded_state_dict


def wrap_set_states(original: Callable[..., None]) -> Callable[..., None]:
    """Set weights and moments; the step count, the same for all, came with the parameter groups already."""

    @functools.wraps(original)
    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        original(self, model_param, {"step": None, **tensors})

    return set_states

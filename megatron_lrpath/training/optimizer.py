"""Additions to Megatron's optimizers for saving and loading: torch's Adam at any step, groups with other
rates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

Group = dict[str, Any]
PARAMETERS, STEP = "params", "step"
RATES = frozenset({"max_lr", "min_lr"})


def own_groups(stored: list[Group], current: list[Group]) -> list[Group]:
    """Return this run's parameter groups with the step of a checkpoint's.

    Rates, betas and similar values are this run's. Groups with another maximal rate, and groups that only
    one of the two has (such as a separate learning rate of the embeddings), are paired by their other
    settings.

    Args:
        stored: the groups in the checkpoint; their `params`, if present, are numbers.
        current: the groups of this run's optimizer.
    """
    numbers = numbered(current)
    paired = [{**closest(group, stored), **settings(group)} for group in current]
    return [
        {**group, PARAMETERS: ids} if any(PARAMETERS in one for one in stored) else group
        for group, ids in zip(paired, numbers, strict=True)
    ]


def settings(group: Group) -> Group:
    """Return a group's settings, without its parameters and progress."""
    return {name: value for name, value in group.items() if name not in (PARAMETERS, STEP)}


def numbered(groups: list[Group]) -> Iterator[list[int]]:
    """Yield the parameters of each group as torch numbers them in a state: consecutively over all groups."""
    first = 0
    for group in groups:
        yield list(range(first, first + len(group[PARAMETERS])))
        first += len(group[PARAMETERS])


def closest(group: Group, stored: list[Group]) -> Group:
    """Return the stored group with most settings in common with `group`, preferably one with its rates."""
    from megatron.core.optimizer.optimizer import (
        param_group_identifier_keys as keys,  # after the choice of the device
    )

    def in_common(other: Group) -> tuple[int, bool, int]:
        same = [key for key in keys if value_of(other, key) == value_of(group, key)]
        alike = other.get("default_config") == group.get("default_config")
        return len([key for key in same if key not in RATES]), alike, len(same)

    return max(stored, key=in_common)


def value_of(group: Group, key: str) -> Any:
    """Return the value of a key that distinguishes groups; NeMo's name for it begins with `pre_`."""
    return group.get(key, group.get(f"pre_{key}"))


def make_state(optimizer: Any) -> None:
    """Create the state that the first update would create, if there is none yet; its values are neutral.

    In fp16 the first steps are skipped until the loss scale fits; a save before the first update finds no
    state.
    """
    inner = optimizer.optimizer
    if inner is None or inner.state or optimizer.init_state_fn is None:
        return
    optimizer.init_state_fn(inner, optimizer.config)
    if isinstance(inner, torch.optim.Adam):
        for state in inner.state.values():
            state.setdefault(STEP, torch.tensor(0.0))


def sharded_state_dict(
    original: Callable[..., Any],
    self: Any,
    model_sharded_state_dict: Any,
    is_loading: bool = False,
    *rest: Any,
    **named: Any,
) -> Any:
    """Create the optimizer state before it is described, as Megatron does for other optimizers on loading.

    All values created for loading are replaced by the loaded ones.
    """
    if not is_loading:
        make_state(self)
    elif not self.optimizer.state:
        self._init_optimizer_states_with_dummy_values()
    return original(self, model_sharded_state_dict, is_loading, *rest, **named)


def sharded_state_dict_fp16(
    original: Callable[..., Any],
    self: Any,
    model_sharded_state_dict: Any,
    is_loading: bool = False,
    *rest: Any,
    **named: Any,
) -> Any:
    """Do the same for an optimizer that is not distributed, which omits a step count of 0."""
    if not is_loading:
        make_state(self)
    described = original(self, model_sharded_state_dict, is_loading, *rest, **named)
    if not is_loading and isinstance(self.optimizer, torch.optim.Adam):
        described["optimizer"]["state"].setdefault("common_step", torch.tensor(0.0))
    return described


def set_states(
    original: Callable[..., None],
    self: Any,
    model_param: Any,
    tensors: dict[str, Any],
    *args: Any,
    **named: Any,
) -> None:
    """Set weights and moments; the step count, the same for all, was set with the parameter groups."""
    original(self, model_param, {STEP: None, **tensors}, *args, **named)


def sharded_tensor(original: Callable[..., Any], model_param: Any, optim_param: Any, prefix: str) -> Any:
    """Describe a state of another shape than its parameter's, as SOAP's preconditioners are, by its own shape.

    The layer (and expert) that it belongs to stays an axis of the whole. No rank holds a part of it:
    `optimizer_problems` refuses tensor parallelism, at which each rank preconditions its part of a matrix alone.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values  # after the choice of the device
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    own = tuple(optim_param.shape)
    if own == tuple(model_param.data.shape):
        return original(model_param, optim_param, prefix)
    is_built = not isinstance(model_param, ShardedTensorFactory)
    like = model_param if is_built else next(iter(nested_values(model_param.build())))
    outer = like.prepend_axis_num
    return replace(
        like,
        key=f"{prefix}.{model_param.key}",
        data=optim_param,
        dtype=optim_param.dtype,
        local_shape=own,
        global_shape=(*like.global_shape[:outer], *own),
        global_offset=(*like.global_offset[:outer], *(0 for _ in own)),
        axis_fragmentations=(*like.axis_fragmentations[:outer], *(1 for _ in own)),
        allow_shape_mismatch=False,
    )


def spread_parameters(original: Callable[..., None], self: Any) -> None:
    """Send every updated matrix from the rank that updates it to all others."""
    self.broadcast_params()

"""How each recipe is laid out on nodes of eight GPUs, and whether a count of GPUs fits a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.models import resolve_model
from megatron_lrpath.plan import Plan


@dataclass(frozen=True)
class Layout:
    """A parallel layout: nodes of eight GPUs, model-parallel sizes, micro batch in samples, and why so."""

    nodes: int
    micro_batch_size: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    why: str = ""

    @property
    def model_parallel(self) -> int:
        """GPUs that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context


# THE place where the layouts stand. All of them shard the optimizer over the data-parallel ranks and overlap its
# communication with the computation; tensor parallelism stays within a node and brings sequence parallelism.
# Chosen for GPUs of 80 GB and 512 samples of 2,048 tokens a step; `python -m megatron_lrpath.launch.budget`
# prints memory and time of each.
LAYOUTS: dict[str, Layout] = {
    "203m": Layout(1, 8, why="data parallel; 64 samples a GPU and step keep it busy"),
    "406m": Layout(1, 8, why="data parallel"),
    "608m": Layout(2, 8, why="data parallel"),
    "1.2b": Layout(4, 4, why="data parallel; a smaller micro batch for wider layers"),
    "2.1b": Layout(4, 4, tensor=2, why="48 layers: tensor and sequence parallelism halve their activations"),
    "3.1b": Layout(8, 4, tensor=2, why="tensor and sequence parallel within the node"),
    "qwen-1.2b": Layout(4, 4, why="as 1.2b"),
}

_TENSOR = "tensor-model-parallel-size"
_SIZES = {
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "context": "context_parallel_size",
    "micro_batch_size": "micro_batch_size",
}


@dataclass(frozen=True)
class Allocation:
    """The processes of a job, `nodes` times `per_node`, and the Megatron arguments of its layout."""

    nodes: int
    per_node: int
    layout: Layout
    words: tuple[str, ...]

    @property
    def world_size(self) -> int:
        """All processes."""
        return self.nodes * self.per_node

    @property
    def data_parallel(self) -> int:
        """Copies of the model."""
        return self.world_size // self.layout.model_parallel


def layout_of(plan: Plan, extra: Sequence[str] = ()) -> Layout:
    """The recipe's layout with what the plan and then the command line (`extra`) say of the sizes on top.

    A model that is no recipe starts from one node, data parallel, with the plan's micro batch.
    """
    base = LAYOUTS.get(plan.model.recipe or "", Layout(1, plan.batch.micro_batch_size))
    given: dict[str, Any] = {**plan.model.overrides, **plan.megatron} | _said(extra)
    sizes = {field: given[name] for field, name in _SIZES.items() if name in given}
    for field, value in sizes.items():
        if not str(value).isdigit() or int(value) < 1:
            raise UserError(f"{_option(_SIZES[field])} {value}: not a whole number from 1 on")
    return Layout(**{**vars(base), **{field: int(value) for field, value in sizes.items()}})


def allocate(
    plan: Plan, nodes: int | None, per_node: int, device: str, extra: Sequence[str] = ()
) -> Allocation:
    """The training job's processes and layout; `nodes` None takes the layout's.

    Raises UserError, before anything starts, where the GPUs do not divide into copies of the model, or the
    plan's batch not into the copies. The batch is never changed to fit.
    """
    layout = layout_of(plan, extra)
    nodes = layout.nodes if nodes is None else nodes
    _check_model(plan, layout)
    if why := _misfit(plan, layout, nodes * per_node):
        most = max(64, 2 * nodes)
        fitting = [count for count in range(1, most + 1) if not _misfit(plan, layout, count * per_node)]
        counts = ", ".join(map(str, fitting[:12])) or f"none with {per_node} a node"
        raise UserError(
            f"{nodes} nodes with {per_node} processes each do not fit: {why}. Numbers of nodes that do: {counts}"
        )
    micro = _micro_batch(plan, layout, nodes * per_node)
    if "micro_batch_size" in _said(extra) and micro != layout.micro_batch_size:
        share = plan.batch.global_batch_size * layout.model_parallel // (nodes * per_node)
        size = layout.micro_batch_size
        raise UserError(
            f"--micro-batch-size {size} does not divide the {share} samples of a copy of the model"
        )
    layout = Layout(**{**vars(layout), "nodes": nodes, "micro_batch_size": micro})
    return Allocation(nodes, per_node, layout, tuple(_words(plan, layout, device, extra)))


def allocate_evaluation(plan: Plan, per_node: int, device: str, extra: Sequence[str] = ()) -> Allocation:
    """As few nodes as hold a copy of the model, and on the last one as many processes as divide the batch."""
    layout = layout_of(plan, extra)
    nodes = math.ceil(layout.model_parallel / per_node)
    while per_node > 1 and _misfit(plan, layout, nodes * per_node):
        per_node -= 1
    return allocate(plan, nodes, per_node, device, extra)


def _misfit(plan: Plan, layout: Layout, world: int) -> str | None:
    """Why `world` processes cannot carry out the plan's steps under this layout."""
    if world % layout.model_parallel:
        return (
            f"{world} processes are no multiple of the {layout.model_parallel} that hold a copy of the model"
        )
    copies = world // layout.model_parallel
    if plan.batch.global_batch_size % copies:
        return f"the batch of {plan.batch.global_batch_size} samples does not divide by {copies} model copies"
    return None


def _micro_batch(plan: Plan, layout: Layout, world: int) -> int:
    """The largest micro batch up to the layout's that divides what a copy of the model gets of a batch."""
    share = plan.batch.global_batch_size // (world // layout.model_parallel)
    return max(size for size in range(1, min(layout.micro_batch_size, share) + 1) if share % size == 0)


def _check_model(plan: Plan, layout: Layout) -> None:
    model = resolve_model(plan.model)
    heads, layers = int(model["num_attention_heads"]), int(model["num_layers"])
    if heads % layout.tensor:
        raise UserError(f"{heads} attention heads do not divide by --{_TENSOR} {layout.tensor}")
    if layers % layout.pipeline:
        raise UserError(f"{layers} layers do not divide by --pipeline-model-parallel-size {layout.pipeline}")


def _words(plan: Plan, layout: Layout, device: str, extra: Sequence[str]) -> list[str]:
    """Megatron arguments for the layout, without those that the plan or the command line gives itself."""
    given = {**plan.model.overrides, **plan.megatron} | _said(extra)
    words: list[str] = []
    for field, name in _SIZES.items():
        size = getattr(layout, field)
        usual = plan.batch.micro_batch_size if field == "micro_batch_size" else 1
        if size != usual and (name not in given or str(given[name]) != str(size)):
            words += [_option(name), str(size)]
    flags = ["sequence_parallel"] if layout.tensor > 1 else []
    flags += ["overlap_grad_reduce", "overlap_param_gather"] if device == "cuda" else []
    return words + [_option(name) for name in flags if name not in given]


def _said(extra: Sequence[str]) -> dict[str, str | bool]:
    """Options among Megatron words: `--name value`, `--name=value`; flags are True. Names with underscores."""
    found: dict[str, str | bool] = {}
    for index, word in enumerate(extra):
        if word.startswith("--"):
            name, joined, value = word[2:].partition("=")
            following = extra[index + 1] if index + 1 < len(extra) else "--"
            separate = True if following.startswith("--") else following
            found[name.replace("-", "_")] = value if joined else separate
    return found


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")

"""Lay out each recipe on nodes of eight GPUs, with memory and time (`python -m` prints them)."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_lrpath.devices import PEAKS
from megatron_lrpath.errors import UserError
from megatron_lrpath.launch.memory import GIB, GPU_SIZES, Memory, arguments_of, predict, sizes_of
from megatron_lrpath.launch.resources import given_options, sizes_to_divide
from megatron_lrpath.models import parameter_count, resolve_model
from megatron_lrpath.paradigms import OURS
from megatron_lrpath.plan import PARADIGMS, Plan, load_plan
from megatron_lrpath.shipped import shipped_folder
from megatron_lrpath.wording import plural

GPUS_PER_NODE = 8
MFU = 0.40  # assumed share of the peak; measure it in the first hundred steps
PEAK = {name: PEAKS[name] for name in ("H100", "A100")}
VOCABULARY = 100_000  # with it the paper's models have the sizes in their names
USUAL_GIGABYTES = 80  # default memory of a GPU


@dataclass(frozen=True)
class Layout:
    """A parallel layout: nodes of eight GPUs, model-parallel sizes, micro batch in samples, the reason."""

    nodes: int
    micro_batch_size: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    why: str = ""

    @property
    def model_parallel(self) -> int:
        """Number of GPUs with one copy of the model."""
        return self.tensor * self.pipeline * self.context


# The only definition of the layouts. All of them shard the optimizer over the data-parallel ranks and
# overlap its communication with the computation; tensor parallelism stays within a node and implies
# sequence parallelism. The micro batch is the largest to try, `tensor` the smallest: `fitted` chooses by the
# predicted GPU memory, for 512 samples of 2,048 tokens a step. 8 samples keep the logits of a micro batch
# (100,000 tokens of vocabulary) below 2**31 numbers, the limit of some kernels' indices.
# `python -m megatron_lrpath.launch.layouts` prints memory and time.
LAYOUTS: dict[str, Layout] = {
    "203m": Layout(1, 8, why="data parallel; 64 samples a GPU and step keep it busy"),
    "406m": Layout(1, 8, why="data parallel"),
    "608m": Layout(2, 8, why="data parallel"),
    "1.2b": Layout(4, 8, why="data parallel"),
    "2.1b": Layout(4, 8, why="data parallel where the GPU holds 48 layers"),
    "3.1b": Layout(8, 8, why="data parallel where the GPU holds it"),
    "qwen-1.2b": Layout(4, 8, why="as 1.2b"),
}

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
    arguments: tuple[str, ...]

    @property
    def world_size(self) -> int:
        """Number of all processes."""
        return self.nodes * self.per_node

    @property
    def data_parallel(self) -> int:
        """Number of copies of the model."""
        return self.world_size // self.layout.model_parallel


def layout_of(plan: Plan, extra: Sequence[str] = ()) -> Layout:
    """Return the recipe's layout with the sizes of the plan and then of the command line (`extra`).

    A model that is not a recipe starts with one node, data parallel, and the plan's micro batch.
    """
    base = LAYOUTS.get(plan.model.recipe or "", Layout(1, plan.batch.micro_batch_size))
    given: dict[str, Any] = {**plan.model.overrides, **plan.megatron} | given_options(extra)
    sizes = {field: given[name] for field, name in _SIZES.items() if name in given}
    for field, value in sizes.items():
        if not str(value).isdigit() or int(value) < 1:
            raise UserError(f"{_option(_SIZES[field])} {value}: not a whole number from 1 on")
    numbers: dict[str, Any] = {field: int(value) for field, value in sizes.items()}
    return replace(base, **numbers)


def fitted(
    plan: Plan,
    layout: Layout,
    world: int,
    per_node: int,
    gigabytes: int,
    extra: Sequence[str],
    left: Sequence[int] = (),
) -> Layout:
    """Return the first layout that fits into the GPUs' memory (GiB) as predicted: the smallest tensor
    parallelism, then the largest micro batch. Sizes given by plan and command line stay. Return `layout`
    itself if nothing fits, or the model is not a recipe.
    """
    given = arguments_of(plan, extra)
    if plan.model.recipe not in LAYOUTS or _misfit(plan, layout, world, left):
        return layout
    heads = int(given["num_attention_heads"])
    within_a_node = [size for size in (1, 2, 4, 8) if size <= per_node and heads % size == 0]
    least = layout.micro_batch_size if _SIZES["micro_batch_size"] in given else 1
    for tensor in [layout.tensor] if _SIZES["tensor"] in given else within_a_node:
        micro = layout.micro_batch_size
        while micro >= least:
            one = replace(layout, tensor=tensor, micro_batch_size=micro)
            if not _misfit(plan, one, world, left) and _fits(plan, one, world, gigabytes, extra):
                return one
            micro //= 2
    return layout


def _fits(plan: Plan, layout: Layout, world: int, gigabytes: int, extra: Sequence[str]) -> bool:
    vocabulary = plan.tokenizer.vocab_size or VOCABULARY
    try:
        return predicted(plan, layout, world, vocabulary, extra).fits(gigabytes * GIB)
    except UserError:  # a model whose parameters cannot be counted
        return True


def predicted(plan: Plan, layout: Layout, world: int, vocabulary: int, extra: Sequence[str] = ()) -> Memory:
    """Return the predicted memory of a GPU under a layout.

    Raises:
        UserError: the model's parameters cannot be counted.
    """
    arguments = (*_arguments(plan, layout, extra), *extra)
    return predict(plan, sizes_of(plan, world, arguments), vocabulary, arguments)


def allocate(
    plan: Plan,
    nodes: int | None,
    per_node: int,
    device: str,
    extra: Sequence[str] = (),
    gigabytes: int = USUAL_GIGABYTES,
    left: Sequence[int] = (),
) -> Allocation:
    """Return a training job's processes and layout for GPUs of `gigabytes` GiB; `nodes` None: the layout's.

    Raise UserError, before anything starts, if the GPUs are not a multiple of a copy of the model, or the
    copies do not divide the plan's batches (or those `left` to train with). No batch is changed to fit.
    """
    layout = layout_of(plan, extra)
    nodes = layout.nodes if nodes is None else nodes
    if device == "cuda":
        layout = fitted(plan, layout, nodes * per_node, per_node, gigabytes, extra, left)
    _check_model(plan, layout)
    if why := _misfit(plan, layout, nodes * per_node, left):
        most = max(64, 2 * nodes)
        fitting = [count for count in range(1, most + 1) if not _misfit(plan, layout, count * per_node, left)]
        counts = ", ".join(map(str, fitting[:12]))
        fewer = [count for count in range(1, per_node) if not _misfit(plan, layout, nodes * count, left)]
        if not fitting and fewer:
            counts = f"none; numbers of processes a node that do: {', '.join(map(str, fewer))}"
        raise UserError(
            f"{plural(nodes, 'node')} with {plural(per_node, 'process', 'es')} each: {why}. "
            f"Numbers of nodes that do: {counts or 'none'}"
        )
    # the largest micro batch, up to the layout's, that divides each copy's samples of a batch
    copies = nodes * per_node // layout.model_parallel
    share = math.gcd(*sizes_to_divide(plan, copies, left)) // copies
    most = layout.micro_batch_size
    micro = max(size for size in range(1, min(most, share) + 1) if share % size == 0)
    if "micro_batch_size" in given_options(extra) and micro != most:
        raise UserError(
            f"--micro-batch-size {most} does not divide the {share} samples of a copy of the model"
        )
    layout = replace(layout, nodes=nodes, micro_batch_size=micro)
    return Allocation(nodes, per_node, layout, tuple(_arguments(plan, layout, extra)))


def allocate_evaluation(
    plan: Plan, per_node: int, device: str, extra: Sequence[str] = (), gigabytes: int = USUAL_GIGABYTES
) -> Allocation:
    """Return the fewest nodes that hold a copy of the model, with processes that divide the batch."""
    layout = layout_of(plan, extra)
    nodes = math.ceil(layout.model_parallel / per_node)
    while per_node > 1 and _misfit(plan, layout, nodes * per_node):
        per_node -= 1
    return allocate(plan, nodes, per_node, device, extra, gigabytes)


def _misfit(plan: Plan, layout: Layout, world: int, left: Sequence[int] = ()) -> str | None:
    """Return why `world` processes cannot run the plan's steps at this layout; `left`: the remaining batch sizes."""
    if world % layout.model_parallel:
        return (
            f"{world} processes are no multiple of the {layout.model_parallel} that hold a copy of the model"
        )
    copies = world // layout.model_parallel
    for size in sizes_to_divide(plan, copies, left):
        if size % copies:
            return f"the batch of {size} samples does not divide by {copies} model copies"
    return None


def _check_model(plan: Plan, layout: Layout) -> None:
    model = resolve_model(plan.model)
    heads, layers = int(model["num_attention_heads"]), int(model["num_layers"])
    if heads % layout.tensor:
        raise UserError(
            f"{heads} attention heads do not divide by --tensor-model-parallel-size {layout.tensor}"
        )
    if layers % layout.pipeline:
        raise UserError(f"{layers} layers do not divide by --pipeline-model-parallel-size {layout.pipeline}")


def _arguments(plan: Plan, layout: Layout, extra: Sequence[str]) -> list[str]:
    """Return Megatron's arguments of the layout that the plan or the command line does not give."""
    given = {**plan.model.overrides, **plan.megatron} | given_options(extra)
    arguments: list[str] = []
    for field, name in _SIZES.items():
        size = getattr(layout, field)
        usual = plan.batch.micro_batch_size if field == "micro_batch_size" else 1
        if size != usual and (name not in given or str(given[name]) != str(size)):
            arguments += [_option(name), str(size)]
    flags = ["sequence_parallel"] if layout.tensor > 1 else []
    return arguments + [_option(name) for name in flags if name not in given]


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


SIZES = ("203m", "406m", "608m", "1.2b", "2.1b", "3.1b")
PAPER = shipped_folder("examples") / "paper"


def step_flops(plan: Plan) -> float:
    """Return the floating-point operations of one step, as Megatron counts them.

    6 for each weight of a matrix product and token (including the output layer, not the input table), and
    6·layers·hidden·length a token for the attention, which the causal mask halves.
    """
    model = resolve_model(plan.model)
    hidden, layers = int(model["hidden_size"]), int(model["num_layers"])
    products = parameter_count(model, VOCABULARY) - VOCABULARY * hidden
    return plan.batch.tokens * 6.0 * (products + layers * hidden * plan.batch.seq_length)


def seconds_per_step(plan: Plan, gpus: int, peak: float, mfu: float = MFU) -> float:
    """Return the seconds of a step on so many GPUs at this share of their peak (FLOP/s of one)."""
    return step_flops(plan) / (gpus * peak * mfu)


def gpu_seconds(plan: Plan, tokens: float, peak: float, mfu: float = MFU) -> float:
    """Return the seconds that one GPU needs to train on so many tokens at this share of its peak."""
    return tokens / plan.batch.tokens * seconds_per_step(plan, 1, peak, mfu)


def memory_table(plans: dict[str, Plan]) -> list[str]:
    """Return a Markdown table of each recipe's layout by the GPU's memory, with the predicted memory."""
    lines = [
        "| recipe | GPU | nodes × GPUs | tensor parallel | copies | micro batch | state | layers | other | total |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size, plan in plans.items():
        for gigabytes in GPU_SIZES:
            place = allocate(plan, None, GPUS_PER_NODE, "cuda", (), gigabytes)
            one = predicted(plan, place.layout, place.world_size, VOCABULARY)
            sizes = f"{place.nodes} × {GPUS_PER_NODE} | {place.layout.tensor} | {place.data_parallel}"
            parts = (one.state, one.activations, one.left_out, one.total)
            memory = " | ".join(f"{part / GIB:.1f} GiB" for part in parts)
            micro = place.layout.micro_batch_size
            lines.append(f"| {size} | {gigabytes} GB | {sizes} | {micro} | {memory} |")
    return lines


def time_table(plans: dict[str, Plan]) -> list[str]:
    """Return a Markdown table of the time of a step and of whole plans."""
    lines = [
        f"| recipe | GPU | s a step | longest chain | {' | '.join(f'{name}, GPU hours' for name in PARADIGMS)} |",
        "|---|---|---|---|---|---|---|",
    ]
    for size, plan in plans.items():
        gpus = allocate(plan, None, GPUS_PER_NODE, "cuda").world_size
        for name, peak in PEAK.items():
            seconds = seconds_per_step(plan, gpus, peak)
            days = max(run.last_step for run in plan.runs(OURS.name)) * seconds / 86400
            hours = [f"{plan.cost(paradigm).steps * seconds * gpus / 3600:,.0f}" for paradigm in PARADIGMS]
            lines.append(
                f"| {size} | {gpus} {name} | {seconds:.2f} | {days:.1f} days | {' | '.join(hours)} |"
            )
    return lines


def tables() -> str:
    """Return both tables."""
    plans = {size: replace(load_plan(PAPER / f"{size}.yaml"), path=Path(f"{size}.yaml")) for size in SIZES}
    return "\n".join([*memory_table(plans), "", *time_table(plans)])


if __name__ == "__main__":
    sys.stdout.write(tables() + "\n")

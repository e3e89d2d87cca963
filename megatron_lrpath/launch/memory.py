"""Predict the memory of a training on a GPU and on its node's host, from the model and the layout.

No figure here was measured on a GPU. State and activations follow Megatron's own formulas
(`megatron.training.theoretical_memory_usage`, whose import would take seconds; a test compares them). The
parts that those formulas omit are added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_lrpath.launch.resources import given_options
from megatron_lrpath.models import parameter_count, resolve_model
from megatron_lrpath.plan import Plan

GIB = 2**30
GPU_SIZES = (40, 80, 141)  # GiB of A100, H100 and H200, by the vendors' names
USABLE = 0.9  # of a GPU: the rest is for fragments and the driver
LIBRARIES = 2 * GIB  # CUDA's context, NCCL's and cuBLAS' buffers: assumed
OPTIMIZER_BYTES = 12  # fp32 weights and two moments, in a checkpoint
STEP_BYTES = 4  # of a parameter: temporary memory of torch's Adam, when the activations are freed
VOCABULARY_UNIT = 128  # the vocabulary is padded to a multiple of it
PARALLEL = ("tensor_model", "pipeline_model", "context")
WHOLE_STATE = ("use_precision_aware_optimizer", "distrib_optim_fully_reshardable_mem_efficient")


@dataclass(frozen=True)
class Sizes:
    """The sharding of a model: tensor, pipeline, context and data-parallel ranks, samples of a micro batch.

    `sequence` is sequence parallelism; without it, tensor-parallel ranks do not shard some activations.
    """

    micro_batch_size: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    copies: int = 1
    sequence: bool = True


@dataclass(frozen=True)
class Memory:
    """The memory of the GPU with the largest demand, in bytes.

    Attributes:
        state: weights, gradients, optimizer state.
        activations: the tensors kept for the backward pass, by Megatron's formula.
        left_out: the gate of SwiGLU, the logits next to their fp32 copy, libraries; or the temporary memory of the
            optimizer step, if that exceeds the activations and logits that are freed by then.
    """

    state: float
    activations: float
    left_out: float

    @property
    def total(self) -> float:
        """The total."""
        return self.state + self.activations + self.left_out

    def fits(self, size: float) -> bool:
        """Return whether it fits in a GPU of `size` bytes."""
        return self.total <= USABLE * size


def arguments_of(plan: Plan, extra: Sequence[str] = ()) -> dict[str, Any]:
    """Return Megatron's arguments in the plan, overridden by the command line (`extra`); names with
    underscores.
    """
    given = {**resolve_model(plan.model), **plan.megatron}
    return {name.replace("-", "_"): value for name, value in given.items()} | given_options(extra)


def sizes_of(plan: Plan, world: int, extra: Sequence[str] = ()) -> Sizes:
    """Return how `world` processes with these arguments shard the plan's model."""
    given = arguments_of(plan, extra)
    tensor, pipeline, context = (int(given.get(f"{name}_parallel_size") or 1) for name in PARALLEL)
    micro = int(given.get("micro_batch_size") or plan.batch.micro_batch_size)
    copies = max(1, world // (tensor * pipeline * context))
    return Sizes(micro, tensor, pipeline, context, copies, bool(given.get("sequence_parallel")))


def predict(plan: Plan, sizes: Sizes, vocabulary: int, extra: Sequence[str] = ()) -> Memory:
    """Predict the memory of the GPU with the largest demand; `extra` are further Megatron arguments, such as
    recomputation.

    Raises:
        UserError: the parameters of this model cannot be counted (experts, latent attention).
    """
    given = arguments_of(plan, extra)
    vocabulary = padded(vocabulary)
    small = is_small(given)
    copies = sizes.copies if given.get("use_distributed_optimizer", True) else 1
    parameters = parameters_of_fullest(given, sizes, vocabulary)
    state = parameters * (12 / copies + 6 if small else 8 / copies + 8)
    activations, gate = layers_hold(plan, given, sizes)
    tokens = plan.batch.seq_length * sizes.micro_batch_size / sizes.context
    rows = tokens / (sizes.tensor if sizes.sequence else 1)
    hidden = int(given["hidden_size"])
    activations += rows * (8 + hidden) * sizes.pipeline
    if sizes.pipeline == 1:
        activations += 4 * (rows * hidden + tokens * vocabulary / sizes.tensor)
    passing = gate + tokens * vocabulary * (6 if small else 4) / sizes.tensor
    step = STEP_BYTES * parameters / copies
    return Memory(state, activations, LIBRARIES + max(passing, step - activations))


def layers_hold(plan: Plan, given: Mapping[str, Any], sizes: Sizes) -> tuple[float, float]:
    """Return the bytes of the activations of all layers by Megatron's formula, and of SwiGLU's gates, which
    it omits.

    Korthikanti et al., arXiv 2205.05198, with an attention that does not store the square matrix: of the
    18 h and 4 FFN widths of a token, tensor-parallel ranks without sequence parallelism keep 10 h
    unsharded. Recomputed layers keep their inputs, and one of them is recomputed at a time.
    """
    hidden, layers = int(given["hidden_size"]), int(given["num_layers"])
    width = int(given.get("ffn_hidden_size") or 4 * hidden)
    precision = 1 if is_small(given) else 2  # the formula counts in 16 bits
    tokens = plan.batch.seq_length * sizes.micro_batch_size / sizes.context * precision
    rows = tokens / (sizes.tensor if sizes.sequence else 1)
    layer = rows * 10 * hidden + tokens * (8 * hidden + 4 * width) / sizes.tensor
    gate = tokens * 2 * width / sizes.tensor if given.get("swiglu") else 0.0
    if given.get("recompute_granularity") == "full":
        return layers * rows * 2 * hidden + layer, gate
    return layers * layer, layers * gate


def parameters_of_fullest(model: Mapping[str, Any], sizes: Sizes, vocabulary: int) -> float:
    """Return the parameters on the GPUs of the first pipeline stage, or of the only stage."""
    table = vocabulary * int(model["hidden_size"])
    tables = 2 if model.get("untie_embeddings_and_output_weights") else 1
    inner = parameter_count(dict(model), vocabulary) - tables * table
    return (inner / sizes.pipeline + table * (tables if sizes.pipeline == 1 else 1)) / sizes.tensor


def host_bytes(plan: Plan, processes: int, world: int, vocabulary: int, extra: Sequence[str] = ()) -> float:
    """Return the host memory that the `processes` of one node need for a save or a load, the larger of both.

    A save copies weights and optimizer state to the host, sharded over the ranks. A rank loads the
    whole state of each parameter if it holds a part of it, so that several ranks read the embedding tables.
    Optimizers with their own format of saves hold the whole state on every rank.
    """
    model = arguments_of(plan, extra)
    vocabulary = padded(vocabulary)
    parameters = parameter_count(dict(model), vocabulary)
    weights = 2 if is_small(model) else 4
    if any(model.get(name) for name in WHOLE_STATE):
        return processes * parameters * OPTIMIZER_BYTES + parameters * weights * processes / world
    written = parameters * (OPTIMIZER_BYTES + weights) * processes / world
    table = vocabulary * int(model["hidden_size"])
    tables = 2 if model.get("untie_embeddings_and_output_weights") else 1
    holders = min(processes, -(-table * world // parameters) + 1)
    return written + OPTIMIZER_BYTES * table * tables * max(0, holders - 1)


def is_small(model: Mapping[str, Any]) -> bool:
    """Return whether the training uses bf16 or fp16."""
    return bool(model.get("bf16") or model.get("fp16"))


def padded(vocabulary: int) -> int:
    """Return the vocabulary size padded for any number of tensor-parallel ranks."""
    return -(-vocabulary // VOCABULARY_UNIT) * VOCABULARY_UNIT

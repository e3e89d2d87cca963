"""The memory that a training takes of a GPU and of its node's host, predicted from the model and the layout.

Nothing here was measured on a GPU. State and activations are Megatron's own formulas
(`megatron.training.theoretical_memory_usage`, which would take seconds to import; a test compares them), and what
those leave out stands beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lrpath.models import parameter_count, resolve_model
from megatron_lrpath.plan import Plan

GIB = 2**30
GPU_SIZES = (40, 80, 141)  # GiB that A100, H100 and H200 have, by their makers' names
USABLE = 0.9  # of a GPU: fragments and what the driver keeps are the rest
LIBRARIES = 2 * GIB  # CUDA's context, NCCL's and cuBLAS' buffers: assumed
OPTIMIZER_BYTES = 12  # fp32 weights and two moments, in a checkpoint
WHOLE_STATE = ("use_precision_aware_optimizer", "distrib_optim_fully_reshardable_mem_efficient")


@dataclass(frozen=True)
class Sizes:
    """How a model is shared out: tensor, pipeline, context and data-parallel ranks, samples of a micro batch."""

    micro_batch_size: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    copies: int = 1


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest GPU.

    Attributes:
        state: weights, gradients, optimizer.
        activations: what the backward pass needs, by Megatron's formula.
        left_out: the gate of SwiGLU, the logits beside their fp32 copy, libraries.
    """

    state: float
    activations: float
    left_out: float

    @property
    def total(self) -> float:
        """All three."""
        return self.state + self.activations + self.left_out

    def fits(self, size: float) -> bool:
        """Whether a GPU of `size` bytes is enough."""
        return self.total <= USABLE * size


def predict(plan: Plan, sizes: Sizes, vocabulary: int) -> Memory:
    """Of the fullest GPU of a training with the distributed optimizer.

    Raises:
        UserError: a model whose parameters nobody can count (experts, latent attention).
    """
    model = {**resolve_model(plan.model), **plan.megatron}
    small = is_small(model)
    vocabulary = padded(vocabulary, sizes.tensor)
    shared = 12 / sizes.copies + 6 if small else 8 / sizes.copies + 8
    state = shared * parameters_of_fullest(model, sizes, vocabulary)
    hidden, layers = int(model["hidden_size"]), int(model["num_layers"])
    width = int(model.get("ffn_hidden_size") or 4 * hidden)
    tokens = plan.batch.seq_length * sizes.micro_batch_size / sizes.context
    precision = 1 if small else 2
    layer = tokens * (18 * hidden + 4 * width) * precision
    gate = tokens * 2 * width * precision if model.get("swiglu") else 0.0
    if (
        model.get("recompute_granularity") == "full"
    ):  # each layer keeps its input; one is computed anew at a time
        layer, gate = tokens * 2 * hidden * precision + layer / layers, gate / layers
    embedding = tokens * (8 + hidden) * sizes.pipeline
    last = 0.0 if sizes.pipeline > 1 else tokens * 4 * (hidden + vocabulary)
    logits = tokens * vocabulary * (6 if small else 4)
    activations = (layer * layers + embedding + last) / sizes.tensor
    return Memory(state, activations, (gate * layers + logits) / sizes.tensor + LIBRARIES)


def parameters_of_fullest(model: Mapping[str, Any], sizes: Sizes, vocabulary: int) -> float:
    """Parameters on the first pipeline stage's GPUs, or the only one's."""
    table = vocabulary * int(model["hidden_size"])
    tables = 2 if model.get("untie_embeddings_and_output_weights") else 1
    inner = parameter_count(dict(model), vocabulary) - tables * table
    return (inner / sizes.pipeline + table * (tables if sizes.pipeline == 1 else 1)) / sizes.tensor


def host_bytes(plan: Plan, processes: int, world: int, vocabulary: int) -> float:
    """Host memory that the `processes` of one node take for a save or a load, whichever is more.

    A save copies what it writes to the host: weights and optimizer state, shared out among the ranks. A load reads the
    whole state of each parameter of which a rank holds a part, so that the two tables are read by several. Optimizers
    that Megatron saves in its own way hold the whole state on every rank.
    """
    model = {**resolve_model(plan.model), **plan.megatron}
    vocabulary = padded(vocabulary, 1)
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
    """Whether it trains in bf16 or fp16."""
    return bool(model.get("bf16") or model.get("fp16"))


def padded(vocabulary: int, tensor: int) -> int:
    """The vocabulary as Megatron pads it."""
    unit = 128 * tensor
    return -(-vocabulary // unit) * unit

"""The memory that a training takes of a GPU and of its node's host, predicted from the model and the layout.

Nothing here was measured on a GPU. State and activations are Megatron's own formulas
(`megatron.training.theoretical_memory_usage`, which would take seconds to import; a test compares them), and what
those leave out stands beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_lrpath.launch.resources import given_options
from megatron_lrpath.models import parameter_count, resolve_model
from megatron_lrpath.plan import Plan

GIB = 2**30
GPU_SIZES = (40, 80, 141)  # GiB that A100, H100 and H200 have, by their makers' names
USABLE = 0.9  # of a GPU: fragments and what the driver keeps are the rest
LIBRARIES = 2 * GIB  # CUDA's context, NCCL's and cuBLAS' buffers: assumed
OPTIMIZER_BYTES = 12  # fp32 weights and two moments, in a checkpoint
STEP_BYTES = 4  # what torch's Adam takes beside them for a moment, while the activations are not there
VOCABULARY_UNIT = 128  # to which the vocabulary is padded
PARALLEL = ("tensor_model", "pipeline_model", "context")
WHOLE_STATE = ("use_precision_aware_optimizer", "distrib_optim_fully_reshardable_mem_efficient")


@dataclass(frozen=True)
class Sizes:
    """How a model is shared out: tensor, pipeline, context and data-parallel ranks, samples of a micro batch.

    `sequence` is sequence parallelism, without which tensor-parallel ranks keep some activations whole.
    """

    micro_batch_size: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    copies: int = 1
    sequence: bool = True


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest GPU.

    Attributes:
        state: weights, gradients, optimizer.
        activations: what the backward pass needs, by Megatron's formula.
        left_out: the gate of SwiGLU, the logits beside their fp32 copy, libraries; or what the optimizer's step
            takes for a moment, where that is more than the activations and logits that are gone by then.
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


def arguments_of(plan: Plan, extra: Sequence[str] = ()) -> dict[str, Any]:
    """Megatron's arguments as far as the plan and then the command line (`extra`) give them; names with underscores."""
    given = {**resolve_model(plan.model), **plan.megatron}
    return {name.replace("-", "_"): value for name, value in given.items()} | given_options(extra)


def sizes_of(plan: Plan, world: int, extra: Sequence[str] = ()) -> Sizes:
    """How `world` processes with these arguments share out the plan's model."""
    given = arguments_of(plan, extra)
    tensor, pipeline, context = (int(given.get(f"{name}_parallel_size") or 1) for name in PARALLEL)
    micro = int(given.get("micro_batch_size") or plan.batch.micro_batch_size)
    copies = max(1, world // (tensor * pipeline * context))
    return Sizes(micro, tensor, pipeline, context, copies, bool(given.get("sequence_parallel")))


def predict(plan: Plan, sizes: Sizes, vocabulary: int, extra: Sequence[str] = ()) -> Memory:
    """Of the fullest GPU; `extra` are Megatron arguments beside the plan's, of which recomputation matters.

    Raises:
        UserError: a model whose parameters nobody can count (experts, latent attention).
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
    """Bytes of activations that all layers keep, by Megatron's formula, and of SwiGLU's gates, which it leaves out.

    Korthikanti et al., arXiv 2205.05198, with an attention that keeps no square: of the 18 h and 4 FFN widths of a
    token, tensor-parallel ranks without sequence parallelism keep 10 h whole. Recomputed layers keep their inputs, and
    one of them is computed anew at a time.
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
    """Parameters on the first pipeline stage's GPUs, or the only one's."""
    table = vocabulary * int(model["hidden_size"])
    tables = 2 if model.get("untie_embeddings_and_output_weights") else 1
    inner = parameter_count(dict(model), vocabulary) - tables * table
    return (inner / sizes.pipeline + table * (tables if sizes.pipeline == 1 else 1)) / sizes.tensor


def host_bytes(plan: Plan, processes: int, world: int, vocabulary: int, extra: Sequence[str] = ()) -> float:
    """Host memory that the `processes` of one node take for a save or a load, whichever is more.

    A save copies what it writes to the host: weights and optimizer state, shared out among the ranks. A load reads the
    whole state of each parameter of which a rank holds a part, so that the two tables are read by several. Optimizers
    that Megatron saves in its own way hold the whole state on every rank.
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
    """Whether it trains in bf16 or fp16."""
    return bool(model.get("bf16") or model.get("fp16"))


def padded(vocabulary: int) -> int:
    """The vocabulary as it is padded at every number of tensor-parallel ranks."""
    return -(-vocabulary // VOCABULARY_UNIT) * VOCABULARY_UNIT

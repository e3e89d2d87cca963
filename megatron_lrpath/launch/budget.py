"""Memory and time of the recipes: `python -m megatron_lrpath.launch.budget` prints the tables of docs/cluster.md."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from megatron_lrpath.launch.layouts import Layout, allocate
from megatron_lrpath.models import parameter_count, resolve_model
from megatron_lrpath.models.devices import PEAKS
from megatron_lrpath.plan import PARADIGMS, Plan, load_plan
from megatron_lrpath.shipped import shipped_folder

GPUS_PER_NODE = 8
MFU = 0.40  # assumed share of the peak; measure yours in the first hundred steps
PEAK = {name: PEAKS[name] for name in ("H100", "A100")}
VOCABULARY = 100_000  # the paper's models fit their names with it
SIZES = ("203m", "406m", "608m", "1.2b", "2.1b", "3.1b")
PAPER = shipped_folder("examples") / "paper"


def memory_bytes(plan: Plan, layout: Layout, world: int) -> tuple[float, float]:
    """Bytes a GPU for (weights, gradients and optimizer; activations) by Megatron's theoretical figures.

    These are the functions of `megatron.training.theoretical_memory_usage`; its activations assume selective
    recomputation or flash attention, and with tensor parallelism sequence parallelism.
    """
    from megatron.training import theoretical_memory_usage as theory

    args = megatron_arguments(plan, layout, world)
    batches = plan.batch.global_batch_size // (layout.micro_batch_size * args.data_parallel_size)
    return theory.compute_weight_and_optimizer_memory(args), theory.compute_activation_memory(args, batches)


def megatron_arguments(plan: Plan, layout: Layout, world: int) -> Namespace:
    """What Megatron's memory formulas read of its arguments."""
    model = resolve_model(plan.model)
    unit = 128 * layout.tensor
    heads, hidden = int(model["num_attention_heads"]), int(model["hidden_size"])
    given = {
        "kv_channels": hidden // heads,
        "group_query_attention": False,
        "num_query_groups": heads,
        "padded_vocab_size": -(-VOCABULARY // unit) * unit,
        "seq_length": plan.batch.seq_length,
        "micro_batch_size": layout.micro_batch_size,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": None,
        "data_parallel_size": world // layout.model_parallel,
        "world_size": world,
        "use_distributed_optimizer": True,
        "expert_tensor_parallel_size": layout.tensor,
        "expert_model_parallel_size": 1,
        "multi_latent_attention": False,
        "num_experts": None,
        "moe_shared_expert_intermediate_size": None,
        "moe_latent_size": None,
        "mtp_num_layers": None,
    }
    return Namespace(**{**model, **given})


def step_flops(plan: Plan) -> float:
    """Floating-point operations of one step, as Megatron counts them.

    6 for each weight of a matrix product and token (the output layer's too, the input table's not), and
    6·layers·hidden·length a token for the attention, of which the causal mask leaves half.
    """
    model = resolve_model(plan.model)
    hidden, layers = int(model["hidden_size"]), int(model["num_layers"])
    products = parameter_count(model, VOCABULARY) - VOCABULARY * hidden
    return plan.batch.tokens * 6.0 * (products + layers * hidden * plan.batch.seq_length)


def seconds_per_step(plan: Plan, gpus: int, peak: float, mfu: float = MFU) -> float:
    """How long a step takes on that many GPUs at that share of their peak (FLOP/s of one)."""
    return step_flops(plan) / (gpus * peak * mfu)


def memory_table(plans: dict[str, Plan]) -> list[str]:
    """The layouts with memory a GPU, as lines of Markdown."""
    lines = [
        "| recipe | nodes × GPUs | tensor parallel | copies | micro batch | state | activations | a GPU in all |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size, plan in plans.items():
        place = allocate(plan, None, GPUS_PER_NODE, "cuda")
        fixed, activations = (part / 2**30 for part in memory_bytes(plan, place.layout, place.world_size))
        sizes = f"{place.nodes} × {GPUS_PER_NODE} | {place.layout.tensor} | {place.data_parallel}"
        memory = f"{fixed:.1f} GiB | {activations:.1f} GiB | {fixed + activations:.1f} GiB"
        lines.append(f"| {size} | {sizes} | {place.layout.micro_batch_size} | {memory} |")
    return lines


def time_table(plans: dict[str, Plan]) -> list[str]:
    """The time of a step and of whole plans, as lines of Markdown."""
    lines = [
        f"| recipe | GPU | s a step | longest chain | {' | '.join(f'{name}, GPU hours' for name in PARADIGMS)} |",
        "|---|---|---|---|---|---|---|",
    ]
    for size, plan in plans.items():
        gpus = allocate(plan, None, GPUS_PER_NODE, "cuda").world_size
        for name, peak in PEAK.items():
            seconds = seconds_per_step(plan, gpus, peak)
            days = max(run.last_step for run in plan.runs("ours")) * seconds / 86400
            hours = [f"{plan.cost(paradigm).steps * seconds * gpus / 3600:,.0f}" for paradigm in PARADIGMS]
            lines.append(
                f"| {size} | {gpus} {name} | {seconds:.2f} | {days:.1f} days | {' | '.join(hours)} |"
            )
    return lines


def tables() -> str:
    """Both tables."""
    plans = {size: replace(load_plan(PAPER / f"{size}.yaml"), path=Path(f"{size}.yaml")) for size in SIZES}
    return "\n".join([*memory_table(plans), "", *time_table(plans)])


if __name__ == "__main__":
    sys.stdout.write(tables() + "\n")

"""`lrpath budget`: the layout of a plan by the GPU's memory, what a GPU and a host hold, and GPU hours: predicted."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from megatron_lrpath.commands.options import add_plan, count_from

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_lrpath.plan import Plan

HELP = "predict the memory of GPUs and hosts for a plan, the layout that fits, and GPU hours"
EXAMPLE = "lrpath budget examples/paper/3.1b.yaml --gpu-memory 40 -- --recompute-granularity full"
TAKES_EXTRA = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The plan, the machine, and the form of the answer."""
    add_plan(parser)
    parser.add_argument(
        "--gpu-memory",
        type=count_from(1),
        metavar="GB",
        help="of one GPU (default: 40, 80 and 141 side by side)",
    )
    parser.add_argument(
        "--nodes", type=count_from(1), metavar="N", help="default: the layout of the plan's model"
    )
    parser.add_argument("--gpus-per-node", type=count_from(1), metavar="N", default=8, help="default: 8")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def execute(args: argparse.Namespace) -> int:
    """Print the prediction; 0, or 1 where no GPU of those asked for holds the training."""
    from megatron_lrpath.launch.memory import GPU_SIZES
    from megatron_lrpath.plan import load_plan

    plan = load_plan(args.plan)
    sizes = (args.gpu_memory,) if args.gpu_memory else GPU_SIZES
    rows = [row(plan, gigabytes, args.nodes, args.gpus_per_node, args.extra) for gigabytes in sizes]
    hours = gpu_hours(plan)
    if args.json:
        print(json.dumps({"predicted": True, "layouts": rows, "gpu_hours": hours}, indent=2))
    else:
        show(plan, rows, hours)
    return 0 if any(one["fits"] for one in rows) else 1


def row(plan: Plan, gigabytes: int, nodes: int | None, per_node: int, extra: Sequence[str]) -> dict[str, Any]:
    """The layout for GPUs of so many GiB; sizes in bytes.

    Raises:
        UserError: processes that do not fit the plan, or a model whose parameters nobody can count.
    """
    from megatron_lrpath.launch.layouts import allocate, predicted
    from megatron_lrpath.launch.memory import GIB, host_bytes
    from megatron_lrpath.readiness.tokenizer import tokenizer_check

    _, vocabulary = tokenizer_check(plan)
    place = allocate(plan, nodes, per_node, "cuda", extra, gigabytes)
    memory = predicted(with_recompute(plan, extra), place.layout, place.world_size, vocabulary)
    return {
        "gpu_memory": gigabytes * GIB,
        "nodes": place.nodes,
        "gpus_per_node": place.per_node,
        "tensor_parallel": place.layout.tensor,
        "pipeline_parallel": place.layout.pipeline,
        "copies": place.data_parallel,
        "micro_batch_size": place.layout.micro_batch_size,
        "state": round(memory.state),
        "activations": round(memory.activations),
        "other": round(memory.left_out),
        "total": round(memory.total),
        "host": round(host_bytes(plan, place.per_node, place.world_size, vocabulary)),
        "fits": memory.fits(gigabytes * GIB),
    }


def with_recompute(plan: Plan, extra: Sequence[str]) -> Plan:
    """The plan with what the command line says of recomputation, which the activations depend on."""
    from dataclasses import replace

    from megatron_lrpath.launch.resources import given_options

    chosen = given_options(extra).get("recompute_granularity")
    return replace(plan, megatron={**plan.megatron, "recompute_granularity": chosen}) if chosen else plan


def gpu_hours(plan: Plan) -> dict[str, dict[str, float]]:
    """By kind of GPU and paradigm: hours of the whole plan at the assumed share of the peak."""
    from megatron_lrpath.launch.layouts import PEAK, gpu_seconds
    from megatron_lrpath.plan import PARADIGMS

    return {
        name: {
            paradigm: round(gpu_seconds(plan, plan.tokens(plan.cost(paradigm).steps), peak) / 3600, 2)
            for paradigm in PARADIGMS
        }
        for name, peak in PEAK.items()
    }


def show(plan: Plan, rows: Sequence[dict[str, Any]], hours: dict[str, dict[str, float]]) -> None:
    """A table, and a line of hours for each GPU."""
    from rich.console import Console

    from megatron_lrpath.console import terminal_table
    from megatron_lrpath.launch.layouts import MFU

    titles = (
        "GPU",
        "nodes × GPUs",
        "TP",
        "PP",
        "copies",
        "micro batch",
        "state",
        "activations",
        "other",
        "in all",
    )
    table = terminal_table((*titles, "a save, host"), "LLrrrrrrrRr", map(cells, rows))
    console = Console(highlight=False)
    console.print(
        f"{plan.name}: GiB of a GPU, and of a node's host for a save or a load. Predicted, not measured."
    )
    console.print(table)
    for name, of in hours.items():
        told = ", ".join(f"{paradigm} {value:,.0f}" for paradigm, value in of.items())
        console.print(f"GPU hours on {name} at an assumed {MFU:.0%} of the peak: {told}")


def cells(one: dict[str, Any]) -> list[str]:
    """A layout as a row of the table; memory in GiB."""
    from megatron_lrpath.launch.memory import GIB

    sizes = [f"{one[name] / GIB:,.1f}" for name in ("state", "activations", "other", "total", "host")]
    sizes[3] += "" if one["fits"] else " (too much)"
    names = ("tensor_parallel", "pipeline_parallel", "copies", "micro_batch_size")
    machine = [f"{one['gpu_memory'] // GIB} GB", f"{one['nodes']} × {one['gpus_per_node']}"]
    return [*machine, *(str(one[name]) for name in names), *sizes]

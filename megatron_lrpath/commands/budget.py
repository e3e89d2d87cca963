"""`lrpath budget`: predict a plan's layout by GPU memory, the memory of GPUs and hosts, and GPU hours."""

from __future__ import annotations

import argparse
import json
import shlex
from typing import TYPE_CHECKING, Any

from megatron_lrpath.commands.options import add_plan, count_from
from megatron_lrpath.console import say_next
from megatron_lrpath.exits import BAD_INPUT
from megatron_lrpath.paradigms import MAIN, OURS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_lrpath.plan import Plan

HELP = "predict the memory of GPUs and hosts for a plan, the layout that fits, and GPU hours"
EXAMPLE = "lrpath budget examples/paper/3.1b.yaml --gpu-memory 40 -- --recompute-granularity full"
TAKES_EXTRA = True  # Megatron arguments of the trainings
TITLES = ("GPU", "nodes", "TP/PP", "micro", "state", "layers", "other", "total", "host")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plan, the machine, and the output format."""
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
    """Print the prediction; return 0, or 2 if the training fits on none of the given GPUs.

    Raises:
        UserError: arguments or numbers of processes that do not fit the plan; parameters that cannot be counted.
    """
    from megatron_lrpath.launch.memory import GPU_SIZES
    from megatron_lrpath.plan import load_plan

    plan = ready(load_plan(args.plan), args.extra)
    sizes = (args.gpu_memory,) if args.gpu_memory else GPU_SIZES
    rows = [row(plan, gigabytes, args.nodes, args.gpus_per_node, args.extra) for gigabytes in sizes]
    hours = gpu_hours(plan)
    if args.json:
        print(json.dumps({"predicted": True, "layouts": rows, "gpu_hours": hours}, indent=2))
    else:
        show(plan, rows, hours)
        say_next(following(args, rows))
    return 0 if any(one["fits"] for one in rows) else BAD_INPUT


def following(args: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> str:
    """Return the command for the smallest GPU that fits, or a budget with more nodes if none fits."""
    fitting = [one for one in rows if one["fits"]]
    words = ["lrpath", "submit" if fitting else "budget", str(args.plan)]
    one = (fitting or rows[-1:])[0]
    nodes = one["nodes"] if fitting else 2 * one["nodes"]
    words += ["--gpu-memory", str(one["gpu_memory"] // 2**30), "--nodes", str(nodes)]
    words += ["--gpus-per-node", str(args.gpus_per_node)]
    words += ["--dry-run"] if fitting else []
    return shlex.join([*words, *(["--", *args.extra] if args.extra else [])])


def ready(plan: Plan, extra: Sequence[str]) -> Plan:
    """Return the plan with the size of its tokenizer's vocabulary.

    Raises:
        UserError: arguments after `--` that a training would refuse.
    """
    from megatron_lrpath.readiness import refuse
    from megatron_lrpath.readiness.arguments import argument_checks
    from megatron_lrpath.readiness.data import with_vocabulary

    refuse([(plan, argument_checks(plan, [plan.run(OURS.name, MAIN.prefix)], extra))])
    return with_vocabulary(plan)


def row(plan: Plan, gigabytes: int, nodes: int | None, per_node: int, extra: Sequence[str]) -> dict[str, Any]:
    """Return the layout for GPUs with this memory (GiB); sizes in bytes."""
    from megatron_lrpath.launch.layouts import allocate
    from megatron_lrpath.launch.memory import GIB, host_bytes, predict, sizes_of

    place = allocate(plan, nodes, per_node, "cuda", extra, gigabytes)
    arguments, vocabulary = (*place.arguments, *extra), plan.tokenizer.vocab_size or 0
    sizes = sizes_of(plan, place.world_size, arguments)
    memory = predict(plan, sizes, vocabulary, arguments)
    return {
        "gpu_memory": gigabytes * GIB,
        "nodes": place.nodes,
        "gpus_per_node": place.per_node,
        "tensor_parallel": sizes.tensor,
        "pipeline_parallel": sizes.pipeline,
        "copies": sizes.copies,
        "micro_batch_size": sizes.micro_batch_size,
        "arguments": list(place.arguments),
        "state": round(memory.state),
        "activations": round(memory.activations),
        "other": round(memory.left_out),
        "total": round(memory.total),
        "host": round(host_bytes(plan, place.per_node, place.world_size, vocabulary, arguments)),
        "fits": memory.fits(gigabytes * GIB),
    }


def gpu_hours(plan: Plan) -> dict[str, dict[str, float]]:
    """Return the hours of the whole plan by kind of GPU and paradigm, at the assumed utilization."""
    from megatron_lrpath.launch.layouts import PEAK, gpu_seconds
    from megatron_lrpath.plan import PARADIGMS

    return {
        name: {
            paradigm: round(gpu_seconds(plan, plan.cost(paradigm).tokens, peak) / 3600, 2)
            for paradigm in PARADIGMS
        }
        for name, peak in PEAK.items()
    }


def show(plan: Plan, rows: Sequence[dict[str, Any]], hours: dict[str, dict[str, float]]) -> None:
    """Print a table, the arguments of each layout, and a line of hours for each GPU."""
    from rich.console import Console

    from megatron_lrpath.console import terminal_table
    from megatron_lrpath.launch.layouts import MFU
    from megatron_lrpath.launch.memory import GIB

    console = Console(highlight=False)
    console.print(
        f"{plan.name}: GiB of a GPU, and of a node's host for a save. Predicted, not measured.", markup=False
    )
    console.print(terminal_table(TITLES, "LLrrrrrRr", map(cells, rows)))
    for one in rows:
        chosen = " ".join(one["arguments"]) or "the plan's arguments"
        advice = (
            "" if one["fits"] else ". It does NOT fit: more nodes, a smaller micro batch, or recomputation"
        )
        console.print(f"GPUs of {one['gpu_memory'] // GIB} GB: {chosen}{advice}", markup=False)
    for name, of in hours.items():
        told = ", ".join(f"{one} {value:,.0f}" if value >= 1 else f"{one} < 1" for one, value in of.items())
        console.print(f"GPU hours on {name} at an assumed {MFU:.0%} of the peak: {told}", markup=False)


def cells(one: dict[str, Any]) -> list[str]:
    """Return a layout as a row of the table; memory in GiB."""
    from megatron_lrpath.launch.memory import GIB

    sizes = [f"{one[name] / GIB:,.1f}" for name in ("state", "activations", "other", "total", "host")]
    split = f"{one['tensor_parallel']}/{one['pipeline_parallel']}"
    machine = [f"{one['gpu_memory'] // GIB} GB", f"{one['nodes']} × {one['gpus_per_node']}", split]
    return [*machine, str(one["micro_batch_size"]), *sizes]

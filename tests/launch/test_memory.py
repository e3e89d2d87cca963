"""Predicted memory: Megatron's formulas, the layout for each GPU, and the command that prints it."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from typing import Any

import pytest

from megatron_lrpath.cli import main
from megatron_lrpath.launch.layouts import PAPER, SIZES, allocate
from megatron_lrpath.launch.memory import GIB, GPU_SIZES, Sizes, host_bytes, padded, predict, sizes_of
from megatron_lrpath.models import resolve_model
from megatron_lrpath.plan import Plan, load_plan

VOCABULARY = 100_000
SHAPES = (Sizes(4, copies=8), Sizes(2, tensor=2, copies=4), Sizes(1, pipeline=2, copies=16))


def paper(size: str) -> Plan:
    return load_plan(PAPER / f"{size}.yaml")


def megatrons_arguments(plan: Plan, sizes: Sizes) -> Namespace:
    """Return the arguments that Megatron's formulas read."""
    model = resolve_model(plan.model)
    heads = int(model["num_attention_heads"])
    given: dict[str, Any] = {
        "kv_channels": int(model["hidden_size"]) // heads,
        "group_query_attention": False,
        "num_query_groups": heads,
        "padded_vocab_size": padded(VOCABULARY),
        "seq_length": plan.batch.seq_length,
        "micro_batch_size": sizes.micro_batch_size,
        "tensor_model_parallel_size": sizes.tensor,
        "pipeline_model_parallel_size": sizes.pipeline,
        "virtual_pipeline_model_parallel_size": None,
        "data_parallel_size": sizes.copies,
        "world_size": sizes.copies * sizes.tensor * sizes.pipeline,
        "use_distributed_optimizer": True,
        "expert_tensor_parallel_size": sizes.tensor,
        "expert_model_parallel_size": 1,
        "multi_latent_attention": False,
        "num_experts": None,
        "moe_shared_expert_intermediate_size": None,
        "moe_latent_size": None,
        "mtp_num_layers": None,
    }
    return Namespace(**{**model, **given})


@pytest.mark.slow
@pytest.mark.parametrize("size", ["203m", "3.1b"])
@pytest.mark.parametrize("sizes", SHAPES, ids=["data", "tensor", "pipeline"])
def test_state_and_activations_are_megatrons(size: str, sizes: Sizes) -> None:
    from megatron.training import theoretical_memory_usage as theory

    plan, args = paper(size), megatrons_arguments(paper(size), sizes)
    ours = predict(plan, sizes, VOCABULARY)
    assert ours.state == pytest.approx(theory.compute_weight_and_optimizer_memory(args), rel=0.01)
    assert ours.activations == pytest.approx(theory.compute_activation_memory(args, 64), rel=0.01)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("gigabytes", GPU_SIZES)
def test_every_recipe_fits_every_gpu_with_as_little_tensor_parallelism_as_fits(
    size: str, gigabytes: int
) -> None:
    place = allocate(paper(size), None, 8, "cuda", (), gigabytes)
    assert place.layout.tensor == 1
    sizes = Sizes(place.layout.micro_batch_size, copies=place.data_parallel)
    assert predict(paper(size), sizes, VOCABULARY).fits(gigabytes * GIB)


@pytest.mark.parametrize(
    ("gigabytes", "extra", "tensor", "micro"),
    [
        (80, (), 1, 4),
        (40, (), 1, 1),
        (16, (), 4, 2),
        (80, ("--tensor-model-parallel-size", "2"), 2, 8),
        (40, ("--micro-batch-size", "4"), 2, 4),
        (1, (), 1, 8),
    ],
    ids=["80", "40", "16", "the command line's TP", "the command line's micro batch", "none fits"],
)
def test_the_layout_follows_the_gpu(gigabytes: int, extra: tuple[str, ...], tensor: int, micro: int) -> None:
    layout = allocate(paper("3.1b"), None, 8, "cuda", extra, gigabytes).layout
    assert (layout.tensor, layout.micro_batch_size) == (tensor, micro)


def test_the_cpu_has_the_plans_layout() -> None:
    assert allocate(paper("3.1b"), 8, 8, "cpu", (), 16).layout.tensor == 1


def test_recomputation_keeps_an_input_a_layer() -> None:
    plan = paper("1.2b")
    whole = replace(plan, megatron={**plan.megatron, "recompute_granularity": "full"})
    usual, little = (predict(one, Sizes(4, copies=32), VOCABULARY) for one in (plan, whole))
    assert little.state == usual.state
    assert little.activations < usual.activations / 2


def test_tensor_parallel_ranks_without_sequence_parallelism_keep_more() -> None:
    plan = paper("1.2b")
    kept = [predict(plan, Sizes(4, 4, copies=8, sequence=on), VOCABULARY).activations for on in (True, False)]
    assert kept[0] < kept[1] < 4 * kept[0]
    arguments = ("--tensor-model-parallel-size", "4", "--sequence-parallel")
    assert sizes_of(plan, 32, arguments) == Sizes(4, 4, copies=8)
    assert not sizes_of(plan, 32, arguments[:2]).sequence


def test_a_step_of_the_optimizer_counts_where_it_takes_more_than_the_activations() -> None:
    plan = paper("3.1b")
    alone, many = (predict(plan, Sizes(1, copies=copies), VOCABULARY) for copies in (1, 64))
    assert alone.activations + alone.left_out > many.activations + many.left_out
    undistributed = replace(plan, megatron={**plan.megatron, "use_distributed_optimizer": False})
    assert predict(undistributed, Sizes(1, copies=64), VOCABULARY).state == alone.state


def test_a_node_holds_its_share_of_a_save_unless_every_rank_holds_the_whole_state() -> None:
    plan = paper("1.2b")
    one, four = host_bytes(plan, 8, 8, VOCABULARY), host_bytes(plan, 8, 32, VOCABULARY)
    assert four < one < 40 * GIB
    gathered = replace(plan, megatron={**plan.megatron, "use_precision_aware_optimizer": True})
    assert host_bytes(gathered, 8, 8, VOCABULARY) > 100 * GIB


def test_budget_prints_what_fits_as_a_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    plan = str(PAPER / "3.1b.yaml")
    assert main(["budget", plan]) == 0
    text = capsys.readouterr().out
    assert "Predicted, not measured" in " ".join(text.split())
    assert all(f"{size} GB" in text for size in GPU_SIZES)
    assert main(["budget", plan, "--gpu-memory", "40", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    (layout,) = answer["layouts"]
    assert (answer["predicted"], layout["tensor_parallel"], layout["fits"]) == (True, 1, True)
    assert layout["total"] == pytest.approx(layout["state"] + layout["activations"] + layout["other"], abs=3)
    full = ["budget", plan, "--gpu-memory", "40", "--json", "--", "--recompute-granularity", "full"]
    assert main(full) == 0
    recomputed = json.loads(capsys.readouterr().out)["layouts"][0]
    assert recomputed["micro_batch_size"] > layout["micro_batch_size"]


def test_budget_refuses_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    plan = str(PAPER / "3.1b.yaml")
    assert main(["budget", plan, "--gpu-memory", "1"]) == 2
    assert "It does NOT fit" in capsys.readouterr().out
    assert main(["budget", plan, "--", "--recompute-granularty", "full"]) == 2
    assert "did you mean '--recompute-granularity'" in capsys.readouterr().err
    assert main(["budget", plan, "--nodes", "3"]) == 2
    assert "Numbers of nodes that do" in capsys.readouterr().err

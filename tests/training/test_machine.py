"""Effects of the machine on a training: kernels by what they need, refusals without it, overlap."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lrpath.plan.arguments import find, flag
from megatron_lrpath.plan.needs import ENGINE, GPU, WORDS, needs, unmet
from megatron_lrpath.runs.history import HistoryWriter, read_history
from tests.support import ROOT
from tests.support.training_fixtures import history, make_plan, run_words, train
from tests.training.test_training_branch import refusal

EVERYTHING = frozenset(WORDS)


# ---------------------------------------------------------------- gradients added inside the product


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_added_inside_the_product_are_those_of_two_steps(kind: torch.dtype) -> None:
    from megatron_lrpath.training import fused_gradients

    generator = torch.Generator().manual_seed(1)
    inputs, grads = (torch.randn(40, width, generator=generator).to(kind) for width in (24, 16))
    total = torch.randn(16, 24, generator=generator)
    wanted = total + grads.t().matmul(inputs)
    fused_gradients.wgrad_gemm_accum_fp32(inputs, grads, total)
    assert torch.allclose(total, wanted, rtol=1e-6, atol=1e-5)
    assert kind == torch.float32 or torch.equal(total, wanted)
    half = torch.zeros(16, 24, dtype=kind)
    fused_gradients.wgrad_gemm_accum_fp16(inputs, grads, half)
    assert torch.allclose(half.float(), grads.t().float() @ inputs.float(), rtol=2e-2, atol=5e-2)


def test_megatron_finds_the_module_where_apex_is_not_installed() -> None:
    """This holds in a process that chooses a GPU before Megatron is imported."""
    program = (
        "from megatron_lrpath.training import machine; machine.activate('cuda')\n"
        "from megatron.core.tensor_parallel import layers\n"
        "print(layers._grad_accum_fusion_available, layers.fused_weight_gradient_mlp_cuda.__name__)"
    )
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert answer.stdout.split() == ["True", "megatron_lrpath.training.fused_gradients"], answer.stderr


def test_a_training_with_them_is_the_one_without(tmp_path: Path) -> None:
    losses = []
    for name, probe in (("two steps", "nothing"), ("one", "fused_gradients")):
        plan = make_plan(tmp_path / name, (4,), megatron={"bf16": True})
        outcome = train(run_words(plan, "ours", "main"), probe=probe).ok()
        losses.append([line["loss"] for line in history(plan.parent / "runs/ours/main")])
    assert set(outcome.probed[0]) == {"torch.bfloat16"}
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# ---------------------------------------------------------------- flags


def flags(monkeypatch: pytest.MonkeyPatch, device: str, *there: str, packed: bool = False) -> dict[str, Any]:
    """Return the flags on a machine with these modules."""
    from megatron_lrpath.training import machine

    monkeypatch.setattr(machine, "importable", lambda name: name in there)
    monkeypatch.setattr(machine, "installed", lambda device: {GPU, ENGINE} if device == "cuda" else set())
    return machine.flags(device, packed)


def test_with_transformer_engine_and_without_apex_a_training_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = "transformer_engine.pytorch"
    found = flags(monkeypatch, "cuda", engine)
    # the fusion stays: our module is installed
    assert found == {"create_attention_mask_in_dataloader": False}
    without = flags(monkeypatch, "cuda")
    assert without["transformer_impl"] == "local"
    assert without["no_persist_layer_norm"] is True
    assert "gradient_accumulation_fusion" not in without
    assert flags(monkeypatch, "cuda", engine, packed=True) == without
    assert "no_persist_layer_norm" not in flags(monkeypatch, "cuda", "apex.normalization.fused_layer_norm")
    assert flags(monkeypatch, "cpu", engine)["gradient_accumulation_fusion"] is False


def test_a_rank_takes_a_gpu_that_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_lrpath.training import machine

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # --gpus-per-task=1
    assert [machine.device_number(rank) for rank in range(3)] == [0, 0, 0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert machine.device_number(5) == 5


@pytest.mark.parametrize(
    ("layout", "off", "wanted"),
    [
        ({"world_size": 8}, set(), (True, True)),
        ({"world_size": 8, "tensor_model_parallel_size": 4}, set(), (True, True)),
        ({"world_size": 1}, set(), (False, False)),
        (
            {"world_size": 8, "tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2},
            set(),
            (False, False),
        ),
        ({"world_size": 8, "use_distributed_optimizer": False}, set(), (False, False)),
        ({"world_size": 8, "optimizer": "muon"}, set(), (False, False)),
        ({"world_size": 8}, {"overlap_param_gather"}, (True, False)),
        ({"world_size": 8}, {"overlap_grad_reduce"}, (False, False)),
        ({"world_size": 8, "save_params_interval": 5}, set(), (True, False)),
    ],
)
def test_communication_overlaps_where_there_is_some(
    layout: dict[str, Any], off: set[str], wanted: tuple[bool, bool]
) -> None:
    from megatron_lrpath.training.options.from_machine import overlap_communication

    sizes = {f"{kind}_parallel_size": 1 for kind in ("tensor_model", "pipeline_model", "context")}
    usual = {"use_distributed_optimizer": True, "optimizer": "adam", "save_params_interval": None}
    args = Namespace(**sizes | usual | layout, overlap_grad_reduce=False, overlap_param_gather=False)
    overlap_communication(args, frozenset(off))
    assert (args.overlap_grad_reduce, args.overlap_param_gather) == wanted


# ---------------------------------------------------------------- what arguments need


def test_a_row_of_needs_names_arguments_and_values_that_there_are() -> None:
    for need in needs():
        argument = find(need.name)
        assert argument is not None, need
        assert need.of in WORDS
        for form in argument.forms.values():
            assert not form.choices or set(need.only) <= set(map(str, form.choices)), need


def test_the_document_names_every_argument_that_needs_something() -> None:
    text = (ROOT / "docs/gpus.md").read_text()
    assert [name for need in needs() if f"`{(name := flag(need.name))}`" not in text] == []


DEFAULTS = """
import json
from megatron_lrpath.training import machine
machine.activate("cpu")
from megatron_lrpath.plan.needs import unmet
from argparse import Namespace
from megatron_lrpath.training.gpu.measures import Setting, choose
from megatron_lrpath.training.options.arguments import full_parser
defaults = {action.dest: action.default for action in full_parser()._actions}
print(json.dumps([unmet(defaults, frozenset()), sorted(choose(None, Setting(Namespace(**defaults)))[0])]))
"""


def test_nothing_is_needed_by_megatrons_defaults() -> None:
    """The check runs in a separate process, which the CPU backend changes permanently."""
    argv = [sys.executable, "-W", "ignore", "-c", DEFAULTS]
    answer = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    needed, kernels = json.loads(answer.stdout.splitlines()[-1])
    assert needed == []
    assert kernels == ["adam", "grad_norm"]  # neither rotary embeddings nor bf16


def test_nothing_is_missing_where_all_is_there() -> None:
    given = {need.name: need.only[0] if need.only else True for need in needs()}
    assert unmet(given, EVERYTHING) == []
    assert len(unmet(given, frozenset())) >= len({need.name for need in needs()})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"fp8_format": "hybrid"}, "--fp8-format hybrid needs Transformer Engine on a GPU: without it"),
        ({"context_parallel_size": 2}, "--context-parallel-size 2"),
        ({"attention_backend": "fused"}, "--attention-backend fused"),
        ({"multi_latent_attention": True}, "--multi-latent-attention needs"),
        ({"exp_avg_dtype": "bf16"}, "--exp-avg-dtype bf16"),
        ({"use_precision_aware_optimizer": True}, "--use-precision-aware-optimizer needs"),
        ({"cuda_graph_scope": ["full_iteration"]}, "--cuda-graph-scope full_iteration"),
        ({"optimizer_cuda_graph": True}, "--optimizer-cuda-graph needs plain Megatron: a replayed update"),
        (
            {
                "context_parallel_size": "1",
                "attention_backend": "auto",
                "fp8_format": False,
                "optimizer": "adam",
            },
            "",
        ),
    ],
)
def test_what_is_not_there_is_named(given: dict[str, Any], said: str) -> None:
    found = unmet(given, {GPU})
    assert [line.startswith(said) for line in found] == ([True] if said else [])


def test_all_that_is_missing_is_refused_in_one_message_before_anything_is_built(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, (4,), megatron={"bf16": True, "fp8_format": "hybrid"})
    argv = run_words(plan, "ours", "main", "--attention-backend", "flash", "--cuda-graph-impl", "local")
    message = refusal(argv)
    for said in ("--fp8-format hybrid", "--attention-backend flash", "--cuda-graph-impl local needs a GPU"):
        assert said in message
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_is_not_finite_is_null_in_the_history(tmp_path: Path) -> None:
    writer = HistoryWriter(tmp_path, 0)
    writer.append({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.1})
    writer.sync()
    line = (tmp_path / "history.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda word: pytest.fail(word))["loss"] is None
    assert len(read_history(tmp_path)) == 1

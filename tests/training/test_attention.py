"""The core attention without Transformer Engine equals Megatron's unfused one, without silent omissions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.training_fixtures import (
    MODEL,
    begin_process_group,
    history,
    launch,
    make_plan,
    run_words,
    train,
)

# heads, query groups, type, layer number, further settings of the configuration
CASES: list[dict[str, Any]] = [
    {},
    {"num_query_groups": 2},
    {"num_query_groups": 1},
    {"bf16": True},
    {"bf16": True, "num_query_groups": 2},
    {"kv_channels": 12},
    {"layer": 5, "apply_query_key_layer_scaling": True},
    {"scale": 0.25},
]
REFUSED: dict[str, dict[str, Any]] = {
    "--window-size": {"window_size": (8, 0)},
    "--softmax-type": {"softmax_type": "learnable"},
    "--qk-clip": {"qk_clip": True},
    "--log-max-attention-logit": {"log_max_attention_logit": True},
    "--context-parallel-size": {"context_parallel_size": 2},
    "attention mask of type padding": {"mask": "padding"},
    "attention mask of type no_mask": {"mask": "no_mask"},
}


def build(kind: Any, case: dict[str, Any]) -> Any:
    """Return a core attention module of this kind for a case."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings = dict(case)
    mask = AttnMaskType[settings.pop("mask", "causal")]
    layer, scale = settings.pop("layer", 1), settings.pop("scale", None)
    sizes = {"num_layers": 8, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 4}
    config = TransformerConfig(**{**sizes, "attention_dropout": 0.0, **settings})
    return kind(config, layer, mask, "self", softmax_scale=scale)


def compare(argv: list[str]) -> None:
    """Compare outputs and gradients on this rank's heads, in a separate process."""
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_lrpath.training.layers import SDPACoreAttention

    begin_process_group()
    world = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    for case in json.loads(argv[0]):
        ours, theirs = build(SDPACoreAttention, case), build(DotProductAttention, case)
        config = ours.config
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if config.bf16 else {"rtol": 1e-5, "atol": 1e-6}
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        heads = [count // world for count in (config.num_attention_heads, *[config.num_query_groups] * 2)]
        generator = torch.Generator().manual_seed(1)
        inputs = [torch.randn(24, 3, n, config.kv_channels, generator=generator).to(dtype) for n in heads]
        weights = torch.randn(24, 3, heads[0] * config.kv_channels, generator=generator).to(dtype)
        results = []
        for module in (ours, theirs):
            states = [state.clone().requires_grad_() for state in inputs]
            output = module(*states, attention_mask=None)
            (output * weights).sum().backward()
            results.append([output, *(state.grad for state in states)])
        for mine, other in zip(*results, strict=True):
            assert mine.shape == other.shape, case
            torch.testing.assert_close(
                mine, other, **tolerance, msg=lambda text, case=case: f"{case}: {text}"
            )
        first = results[0][0][0]
        assert not torch.allclose(first, results[0][0][-1]), "the outputs say nothing"
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("nproc", [1, 2])
def test_outputs_and_gradients_are_megatrons_unfused_attentions(nproc: int) -> None:
    cases = [case for case in CASES if case.get("num_query_groups", 4) >= nproc]
    launch("tests.training.test_attention:compare", [json.dumps(cases)], nproc).ok()


def refuse(argv: list[str]) -> None:
    """Build the refused cases and check their messages, in a separate process."""
    import torch
    from megatron.core import parallel_state

    from megatron_lrpath.errors import UserError
    from megatron_lrpath.training.layers import SDPACoreAttention

    begin_process_group()
    parallel_state.initialize_model_parallel()
    for name, case in json.loads(argv[0]).items():
        with pytest.raises(UserError) as refusal:
            build(SDPACoreAttention, case)
        assert name in str(refusal.value)
        assert "Transformer Engine" in str(refusal.value)
    module, states = build(SDPACoreAttention, {}), [torch.ones(4, 1, 4, 8) for _ in range(3)]
    for further in ({"packed_seq_params": object()}, {"attention_bias": torch.ones(4, 4)}):
        with pytest.raises(UserError, match="need Transformer Engine"):
            module(*states, attention_mask=None, **further)


def test_what_it_does_not_compute_is_refused() -> None:
    launch("tests.training.test_attention:refuse", [json.dumps(REFUSED)]).ok()


def test_a_refusal_is_one_message_of_the_training(tmp_path: Path) -> None:
    outcome = train(run_words(make_plan(tmp_path, (6,)), "ours", "main", "--window-size", "8,0"))
    assert outcome.status == [2]
    assert "- --window-size (8, 0) needs Transformer Engine" in outcome.output
    assert "Traceback" not in outcome.output


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_trains_to_the_losses_of_megatrons_unfused_attention(tmp_path: Path, precision: str) -> None:
    losses = []
    for folder, probe in (("ours", None), ("theirs", "unfused_attention")):
        plan = make_plan(tmp_path / folder, (6,), megatron={"bf16": precision == "bf16"})
        outcome = train(run_words(plan, "ptfs", "scratch-v1"), probe=probe).ok()
        assert probe is None or outcome.probed[0][:4] == [1, 2, 1, 2]
        losses.append([line["loss"] for line in history(tmp_path / folder / "runs/ptfs/scratch-v1")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if precision == "fp32" else 3e-3)


def test_attention_dropout_is_drawn_from_the_ranks_own_generator(tmp_path: Path) -> None:
    """Two starts give the same losses, which differ from those without dropout."""
    losses = []
    for number, dropout in enumerate((0.3, 0.3, 0.0)):
        folder = tmp_path / str(number)
        model = {**MODEL, "attention_dropout": dropout}
        train(run_words(make_plan(folder, (6,), model=model), "ptfs", "scratch-v1")).ok()
        losses.append([line["loss"] for line in history(folder / "runs/ptfs/scratch-v1")])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]

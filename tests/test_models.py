"""Model recipes: their sizes fit their names, and they reach Megatron as arguments."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from megatron_lrpath.errors import UserError
from megatron_lrpath.models import (
    RECIPES,
    ROPE_FACTOR,
    ModelSpec,
    megatron_flags,
    parameter_count,
    resolve_model,
    trained_rope_factor,
)

MILLIONS = {"203m": 203.1, "406m": 406.2, "608m": 607.5, "1.2b": 1213, "2.1b": 2119, "3.1b": 3094}


@pytest.mark.parametrize(("name", "millions"), MILLIONS.items())
def test_parameter_counts_are_the_papers(name: str, millions: float) -> None:
    count = parameter_count(RECIPES[name].arguments, 100_000) / 1e6
    assert round(count, 1 if millions < 1000 else 0) == millions


@pytest.mark.parametrize("name", [*MILLIONS, "qwen-1.2b"])
def test_names_fit_at_the_digits_they_have(name: str) -> None:
    number, unit = float(name.removeprefix("qwen-")[:-1]), {"m": 1e6, "b": 1e9}[name[-1]]
    assert parameter_count(RECIPES[name].arguments, 100_000) == pytest.approx(number * unit, rel=0.012)


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "heads", "max_lr"),
    [
        ("203m", 24, 512, 8, 1e-3),
        ("406m", 12, 1024, 16, 6e-4),
        ("608m", 24, 1024, 16, 6e-4),
        ("1.2b", 24, 1536, 16, 3e-4),
        ("2.1b", 48, 1536, 16, 3e-4),
        ("3.1b", 40, 2048, 32, 3e-4),
    ],
)
def test_shapes_are_table_9(name: str, layers: int, hidden: int, heads: int, max_lr: float) -> None:
    recipe = RECIPES[name]
    shape = [recipe.arguments[key] for key in ("num_layers", "hidden_size", "num_attention_heads")]
    assert shape == [layers, hidden, heads]
    assert recipe.arguments["ffn_hidden_size"] == 4 * hidden
    assert recipe.max_lr == max_lr


def test_the_printed_hidden_size_of_3_1b_would_be_another_model() -> None:
    printed = RECIPES["3.1b"].arguments | {"hidden_size": 8192, "ffn_hidden_size": 4 * 8192}
    assert parameter_count(printed, 100_000) == pytest.approx(44.6e9, rel=0.002)


def test_qwen_has_biases_in_qkv_alone() -> None:
    llama, qwen = RECIPES["1.2b"].arguments, RECIPES["qwen-1.2b"].arguments
    assert qwen == llama | {"add_qkv_bias": True}
    assert parameter_count(qwen, 1) - parameter_count(llama, 1) == 24 * 3 * 1536


def test_tiny_is_tiny() -> None:
    assert 1e6 <= parameter_count(RECIPES["tiny"].arguments, 4096) <= 2e6


@pytest.mark.parametrize(
    "extra",
    [{}, {"group_query_attention": True, "num_query_groups": 2}, {"kv_channels": 64}, {"add_qkv_bias": True}],
)
def test_the_formula_counts_what_the_same_llama_has(extra: dict) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    arguments = RECIPES["tiny"].arguments | extra
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=arguments["hidden_size"],
        intermediate_size=arguments["ffn_hidden_size"],
        num_hidden_layers=arguments["num_layers"],
        num_attention_heads=arguments["num_attention_heads"],
        num_key_value_heads=extra.get("num_query_groups"),
        head_dim=extra.get("kv_channels"),
        tie_word_embeddings=not arguments.get("untie_embeddings_and_output_weights"),
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    expected = sum(parameter.numel() for parameter in model.parameters())
    if extra.get("add_qkv_bias"):
        expected += arguments["num_layers"] * 3 * arguments["hidden_size"]
    assert parameter_count(arguments, 1000) == expected


def test_the_formula_counts_a_gpt_of_megatrons_defaults() -> None:
    """The model is GPT-2 small: LayerNorm, biases, learned positions, tied embeddings, an FFN of 4h."""
    gpt2 = {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "max_position_embeddings": 1024}
    assert parameter_count(gpt2, 50_257) == 124_439_808


def test_the_formula_refuses_what_it_does_not_cover() -> None:
    with pytest.raises(UserError, match="num_experts"):
        parameter_count(RECIPES["tiny"].arguments | {"num_experts": 8}, 1000)


def test_a_model_is_its_recipe_with_overrides_on_top() -> None:
    resolved = resolve_model(ModelSpec("tiny", {"num_layers": 2, "swiglu": False}))
    assert resolved == RECIPES["tiny"].arguments | {"num_layers": 2, "swiglu": False}
    assert RECIPES["tiny"].arguments["num_layers"] != 2


def test_an_unknown_recipe_or_a_model_without_a_size_is_refused() -> None:
    with pytest.raises(UserError, match="203m"):
        resolve_model(ModelSpec("204m"))
    with pytest.raises(UserError, match="num_attention_heads"):
        resolve_model(ModelSpec(None, {"num_layers": 2, "hidden_size": 8}))


def test_arguments_become_words() -> None:
    arguments = {
        "num_layers": 4,
        "swiglu": True,
        "bf16": False,
        "seed": None,
        "split": ["99", 1],
        "norm_epsilon": 1e-5,
        "min_loss_scale": -3,
        "tokenizer-prompt": "-x",
    }
    words = (
        "--num-layers 4 --swiglu --split 99 1 --norm-epsilon 1e-05 --min-loss-scale -3 --tokenizer-prompt=-x"
    )
    assert megatron_flags(arguments) == words.split()


def test_megatron_parses_every_recipe() -> None:
    arguments = pytest.importorskip("megatron.training.arguments")
    argparse = pytest.importorskip("argparse")
    parser = argparse.ArgumentParser(allow_abbrev=False)
    arguments.add_megatron_arguments(parser)
    for name, recipe in RECIPES.items():
        parsed = parser.parse_args(megatron_flags(recipe.arguments))
        assert parsed.hidden_size == recipe.arguments["hidden_size"], name
        assert parsed.add_bias_linear is False
        assert parsed.swiglu is True
        assert parsed.normalization == "RMSNorm"
        assert parsed.add_qkv_bias is (name == "qwen-1.2b")


@pytest.mark.parametrize(
    ("stored", "factor"),
    [
        ({"use_rope_scaling": False, "rope_scaling_factor": 32.0, "consumed_train_samples": 4}, None),
        ({"use_rope_scaling": True, "rope_scaling_factor": 32.0, "consumed_train_samples": 0}, 32.0),
        ({"use_rope_scaling": True, "rope_scaling_factor": 32.0, "consumed_train_samples": 4}, 8.0),
        (
            {
                "use_rope_scaling": True,
                "rope_scaling_factor": 32.0,
                "consumed_train_samples": 4,
                ROPE_FACTOR: 32.0,
            },
            32.0,
        ),
    ],
    ids=["plain", "imported", "trained by Megatron", "trained here"],
)
def test_the_factor_that_a_model_was_trained_with(stored: dict[str, Any], factor: float | None) -> None:
    assert trained_rope_factor(Namespace(**stored)) == factor

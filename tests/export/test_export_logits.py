"""Exported models have Megatron's logits: every recipe's configuration, real text, real transformers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lrpath.models import RECIPES
from tests.support import ROOT
from tests.support.export_worker import transformers_model
from tests.support.training_fixtures import MODEL, launch, make_plan, run_words

TEXT = (ROOT / "docs/plan-file.md").read_text(encoding="utf-8")
VOCABULARY = 403  # odd, so that Megatron pads it


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a SentencePiece model trained on real text."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in TEXT.splitlines() if line.strip()]),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=3,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def reduced(recipe: str) -> dict[str, Any]:
    """Return the recipe with one layer and a quarter of heads and widths: same head width, same ratios."""
    arguments = dict(RECIPES[recipe].arguments)
    for name in ("hidden_size", "ffn_hidden_size", "num_attention_heads"):
        arguments[name] //= 4
    return arguments | {"num_layers": 1}


MODELS = {name: reduced(name) for name in RECIPES} | {
    "grouped-tied": MODEL | {"untie_embeddings_and_output_weights": False},
    "qwen-grouped-tied": MODEL | {"untie_embeddings_and_output_weights": False, "add_qkv_bias": True},
    "qwen3-grouped-wide-heads": MODEL | {"qk_layernorm": True, "kv_channels": 12},
    "all-biases-wide-heads": MODEL | {"disable_bias_linear": False, "kv_channels": 12, "rotary_base": 50000},
    "llama3-rope": MODEL | {"use_rope_scaling": True, "rope_scaling_factor": 8.0},
    # as LLaMA 3.2: not the factor that Megatron uses by default
    "llama3-rope-32": MODEL | {"use_rope_scaling": True, "rope_scaling_factor": 32.0, "rotary_base": 500000},
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_megatrons(name: str, tmp_path: Path, tokenizer: Path) -> None:
    import sentencepiece

    plan = make_plan(
        tmp_path,
        model=MODELS[name],
        tokenizer={"type": "SentencePieceTokenizer", "model": str(tokenizer)},
        batch={"global_batch_size": 4, "micro_batch_size": 2, "seq_length": 128},
    )
    ids = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).encode(TEXT)
    tokens = [ids[:128], ids[128:256]]
    argv = [str(tmp_path), json.dumps(tokens), *run_words(plan, "ours", "main")]
    launch("tests.support.export_worker:save_and_export", argv).ok()
    ours = torch.load(tmp_path / "logits.pt")
    model = transformers_model(tmp_path / "hf")
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits
    assert (theirs.shape[-1], ours.shape[-1]) == (VOCABULARY, 512), "padded rows are not removed"
    assert theirs.abs().max() > 0.1, "the logits say nothing"
    assert (ours[..., :VOCABULARY] - theirs).abs().max() < 1e-5 * theirs.abs().max()
    kind = "Qwen3" if "qwen3" in name else "Qwen2" if "qwen" in name else "Llama"
    assert type(model).__name__ == f"{kind}ForCausalLM"
    assert (tmp_path / "hf/model.safetensors.index.json").is_file()

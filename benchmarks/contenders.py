"""Shared parts of the step-time benchmarks: model shape, plan with random data, Hugging Face's model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARY_UNIT = 128  # Megatron pads the vocabulary to a multiple of this


@dataclass(frozen=True)
class Shape:
    """Model and batch, the same for all; the vocabulary includes Megatron's padding."""

    hidden: int = 256
    ffn: int = 1024
    layers: int = 6
    heads: int = 8
    vocabulary: int = 8192
    sequence: int = 256
    batch: int = 8

    @property
    def parameters(self) -> int:
        """Number of weights, embeddings included (untied)."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.ffn + 2 * self.hidden
        return 2 * self.vocabulary * self.hidden + self.layers * layer + self.hidden

    @property
    def flops_per_token(self) -> float:
        """Floating-point operations of a token in training, as Megatron counts them (half the attention)."""
        products = (
            self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.ffn) + self.vocabulary * self.hidden
        )
        return 6.0 * (products + self.layers * self.hidden * self.sequence)


def write_plan(
    shape: Shape,
    folder: Path,
    name: str,
    total: int,
    micro: int | None = None,
    max_lr: float = 1e-3,
    **megatron: Any,
) -> Path:
    """Write a plan of one version of `total` steps with random tokens; `micro` None is the whole batch."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from megatron_lrpath.data.indexed import fingerprint_source
    from megatron_lrpath.data.slice import Slice, SliceSource

    prefix, tokens = folder / "tokens", total * shape.batch * shape.sequence + 1
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    random = np.random.default_rng(0)  # the same for all contenders, so that their losses can be compared
    for length in (tokens, shape.sequence + 1):
        builder.add_document(torch.from_numpy(random.integers(1, shape.vocabulary - 1, length)), [length])
    builder.finalize(f"{prefix}.idx")
    fingerprint = fingerprint_source(prefix)
    for document, (slice_name, length) in enumerate([("v1", tokens), ("valid", shape.sequence + 1)]):
        documents = np.array([document], dtype=np.int32)
        source = SliceSource(prefix, fingerprint, "random", documents, length)
        Slice(slice_name, 1, (source,)).save(folder / f"{slice_name}.slice")
    model = {"num_layers": shape.layers, "hidden_size": shape.hidden, "ffn_hidden_size": shape.ffn}
    plan = {
        "name": "step-time",
        "model": {"recipe": "tiny", **model, "num_attention_heads": shape.heads},
        "schedule": {
            "style": "cosine",
            "max_lr": max_lr,
            "min_lr": max_lr / 10,
            "warmup_steps": min(10, total // 4),
        },
        "batch": {
            "global_batch_size": shape.batch,
            "micro_batch_size": micro or shape.batch,
            "seq_length": shape.sequence,
        },
        "tokenizer": {"type": "NullTokenizer", "vocab_size": shape.vocabulary - 1},
        "data": {"slices": str(folder), "valid": str(folder / "valid")},
        "megatron": megatron,
        "versions": [{"name": "v1", "steps": total}],
        "output": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(plan))  # JSON is YAML
    return path


def run_argv(plan: Path, device: str) -> list[str]:
    """Return the command line of the plan's only run."""
    return ["--plan", str(plan), "--paradigm", "ptfs", "--run", "scratch-v1", "--device", device]


def llama(shape: Shape, device: str = "cpu", **config: Any) -> Any:
    """Return Hugging Face's `LlamaForCausalLM` of this shape (sdpa), ready to train."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            vocab_size=shape.vocabulary,
            max_position_embeddings=shape.sequence,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
            use_cache=False,
            **config,
        )
    ).to(device)
    assert sum(weight.numel() for weight in model.parameters()) == shape.parameters
    return model.train()

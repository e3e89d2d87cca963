"""The tokenizer of an imported folder, as the plan names it, returns the ids of the model's training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_lrpath.errors import UserError
from megatron_lrpath.tokenizers.files import load_tokenizer, sentencepiece_tokenizer, write_tokenizer
from megatron_lrpath.tokenizers.imported import import_tokenizer
from tests.support import GOLDEN

MODEL = GOLDEN / "sp.model"


def write(path: Path, value: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(value), encoding="utf-8")


def imported(source: Path) -> dict[str, str] | None:
    """Return the plan's section for the tokenizer in `source`."""
    return import_tokenizer(source, source.parent / "place", Path("target/tokenizer"))


def test_a_model_alone_is_named_as_sentencepiece(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    shutil.copy(MODEL, source / "tokenizer.model")
    write(
        source / "tokenizer_config.json",
        {"tokenizer_class": "LlamaTokenizer", "chat_template": "{{ bos_token }}"},
    )
    named = imported(source)
    assert named == {"type": "SentencePieceTokenizer", "model": "target/tokenizer/tokenizer.model"}
    assert capsys.readouterr().err == ""
    found = sentencepiece_tokenizer("SentencePieceTokenizer", tmp_path / "place/tokenizer.model")
    (tmp_path / "out").mkdir()
    write_tokenizer(found, tmp_path / "out", 64)
    assert load_tokenizer(tmp_path / "out").chat_template == "{{ bos_token }}"


@pytest.mark.parametrize("place", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_added_to_a_model_alone_are_reported(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    shutil.copy(MODEL, source / "tokenizer.model")
    added: dict[str, Any] = {"<|im_end|>": 90000, "<s>": 1}
    if place == "tokenizer_config.json":
        added = {"added_tokens_decoder": {str(number): {"content": token} for token, number in added.items()}}
    write(source / place, added)
    assert imported(source) is not None
    said = capsys.readouterr().err
    assert "<|im_end|> will be text like any other" in said
    assert "<s>" not in said


def test_both_kinds_of_files_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    write_tokenizer(sentencepiece_tokenizer("SentencePieceTokenizer", MODEL), source, 4096)
    config = json.loads((source / "tokenizer_config.json").read_text())
    del config["megatron_tokenizer_type"]
    write(source / "tokenizer_config.json", config)
    assert imported(source) == {"type": "HuggingFaceTokenizer", "model": "target/tokenizer"}
    assert capsys.readouterr().err == ""
    shutil.rmtree(tmp_path / "place")
    fast = json.loads((source / "tokenizer.json").read_text())
    write(source / "tokenizer.json", fast | {"normalizer": {"type": "Lowercase"}})
    assert imported(source) == {"type": "HuggingFaceTokenizer", "model": "target/tokenizer"}
    assert "transformers gives other ids than tokenizer.model for" in capsys.readouterr().err


def test_another_format_under_the_models_name(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    (source / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's
    with pytest.raises(UserError, match="not a SentencePiece model"):
        imported(source)

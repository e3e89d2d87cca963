"""Exported tokenizers return the ids of the original, on difficult text, offline."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lrpath.errors import UserError
from megatron_lrpath.tokenizers.files import (
    find_tokenizer,
    hugging_face_tokenizer,
    load_tokenizer,
    sentencepiece_tokenizer,
    write_tokenizer,
)
from megatron_lrpath.tokenizers.sentencepiece_model import NASTY
from tests.support import ROOT

LINES = [
    line
    for path in (ROOT / "README.md", Path(__file__), ROOT / "docs/plan-file.md")
    for line in path.read_text(encoding="utf-8").splitlines()
    if line.strip()
]
LOSSLESS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
KINDS: dict[str, dict[str, Any]] = {
    "bpe": {"model_type": "bpe", "byte_fallback": True, "split_digits": True, **LOSSLESS},
    "bpe-control": {"model_type": "bpe", "byte_fallback": True, "control_symbols": ["<ctl>"], **LOSSLESS},
    "bpe-symbols": {
        "model_type": "bpe", "byte_fallback": True, "user_defined_symbols": ["<|im_start|>", "<|im"],
        **LOSSLESS,
    },
    "bpe-unknown": {"model_type": "bpe", "byte_fallback": False, **LOSSLESS},
    "unigram": {"model_type": "unigram", "byte_fallback": True, **LOSSLESS},
    "no-prefix": {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False, **LOSSLESS},
    "squeezed": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
}  # fmt: skip
PARTS = [
    *"ab  \n\t<>s/▁é中😀x=1._\u200b\u0301",
    "<s>",
    "</s>",
    "<ctl>",
    "  ",
    "self",
    "<|im",
    "<|im_start|>",
    "<0x0A>",
    "plan",
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """Return the original and the exported tokenizer of each kind, the latter as transformers loads it."""
    return {name: export(tmp_path_factory.mktemp(name), options) for name, options in KINDS.items()}


def export(folder: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    """Train a tokenizer and export it; return both."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        **({"vocab_size": 600, "pad_id": 3, "minloglevel": 2, "hard_vocab_limit": False} | options),
    )
    path = folder / "original.model"
    path.write_bytes(model.getvalue())
    (folder / "hf").mkdir()
    notes = write_tokenizer(sentencepiece_tokenizer("SentencePieceTokenizer", path), folder / "hf", 64)
    assert notes == []
    return sentencepiece.SentencePieceProcessor(model_file=str(path)), load_tokenizer(folder / "hf")


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_sentencepieces_on_nasty_text(kind: str, exported: dict[str, tuple[Any, Any]]) -> None:
    original, fast = exported[kind]
    for text in [*NASTY, *LINES]:
        assert fast(text)["input_ids"] == original.encode(text), text


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(list(KINDS)), parts=st.lists(st.sampled_from(PARTS), max_size=40))
def test_ids_are_sentencepieces_on_any_text(
    kind: str, parts: list[str], exported: dict[str, tuple[Any, Any]]
) -> None:
    original, fast = exported[kind]
    text = "".join(parts)
    if kind == "bpe-symbols":  # the documented exception: a control symbol alone between user-defined ones
        text = text.replace("<s>", "").replace("</s>", "").replace("<0x0A>", "")
    assert fast(text)["input_ids"] == original.encode(text)


def test_special_tokens_are_right(exported: dict[str, tuple[Any, Any]]) -> None:
    original, fast = exported["bpe-control"]
    assert (fast.bos_token_id, fast.eos_token_id, fast.pad_token_id) == (1, 2, 3)
    assert fast.unk_token_id == original.unk_id()
    assert fast.convert_tokens_to_ids("<ctl>") == original.piece_to_id("<ctl>")
    assert len(fast) == original.get_piece_size()
    assert fast("a <s> b")["input_ids"].count(1) == 0, "text becomes no control token"
    assert fast("a <s> b", split_special_tokens=False)["input_ids"].count(1) == 1
    text = "naïve  中文\n\tdef f(x): 😀"
    assert fast.decode(fast(text)["input_ids"]) == text
    assert fast.decode([*fast("end")["input_ids"], 2], skip_special_tokens=True) == "end"


def test_a_difference_from_sentencepiece_is_reported(tmp_path: Path) -> None:
    options = KINDS["bpe"] | {"normalization_rule_name": "nmt_nfkc"}
    with pytest.raises(AssertionError, match=r"tokenizer\.json differs"):
        export(tmp_path, options)


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc", "nmt_nfkc_cf"])
def test_line_ends_under_a_character_map(rule: str, tmp_path: Path) -> None:
    options = KINDS["bpe"] | {"normalization_rule_name": rule, "vocab_size": 600, "minloglevel": 2}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=model, **options)
    (tmp_path / "m.model").write_bytes(model.getvalue())
    (tmp_path / "hf").mkdir()
    write_tokenizer(
        sentencepiece_tokenizer("SentencePieceTokenizer", tmp_path / "m.model"), tmp_path / "hf", 512
    )
    original = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    fast = load_tokenizer(tmp_path / "hf")
    for text in ("a\r\nb", "\r\n\r\n", "a\n\rb\r", "one\r\n two\t\r\n"):
        assert fast(text)["input_ids"] == original.encode(text), text


def test_hugging_face_tokenizers_are_copied_without_code(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    source, target = tmp_path / "source", tmp_path / "target"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(source)
    (source / "tokenization_own.py").write_text("raise SystemExit")
    target.mkdir()
    found = hugging_face_tokenizer(source)
    assert (found.vocab_size, found.tokens) == (4, {"eos_token_id": 2})
    write_tokenizer(found, target, 64)
    assert load_tokenizer(target)("a b c")["input_ids"] == [0, 1, 3]
    assert not list(target.glob("*.py"))
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_tokenizer_that_is_gone_is_asked_for(tmp_path: Path) -> None:
    import argparse

    args = argparse.Namespace(special_tokens=None, vocab_size=None)
    with pytest.raises(UserError, match="--tokenizer"):
        find_tokenizer("SentencePieceTokenizer", str(tmp_path / "gone.model"), args, None)
    with pytest.raises(UserError, match="--vocab-size"):
        find_tokenizer("TikTokenizer", None, args, None)
    (tmp_path / "broken.model").write_bytes(json.dumps([1]).encode())
    with pytest.raises(UserError, match="not a SentencePiece model"):
        find_tokenizer("SentencePieceTokenizer", str(tmp_path / "broken.model"), args, None)

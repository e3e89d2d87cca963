"""The fast tokenizers return the ids of the exact ones, for every text and model."""

from __future__ import annotations

import io
import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_lrpath.errors import UserError
from megatron_lrpath.tokenizers import fast_bpe as merges
from megatron_lrpath.tokenizers.encoders import SPOT_CHECK_EVERY, SentencePieceEncoder, TextError
from megatron_lrpath.tokenizers.fast_bpe import AWKWARD, FastBpe, NotExactError, plain_pieces
from tests.golden.make import PARAGRAPHS, texts
from tests.support.preprocess_fixtures import GOLDEN

SYMBOLS = ["<s>", "</s>", "<unk>", "<pad>", "<ctl>", "<0x41>", "<sep>", "foo bar", "  ", "1234"]
VARIANTS: list[dict[str, Any]] = [
    {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    {"normalization_rule_name": "nmt_nfkc"},
    {"normalization_rule_name": "nfkc_cf", "add_dummy_prefix": False},
    {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": False, "split_digits": True},
    {"user_defined_symbols": ["<sep>", "1234", "foo bar", "  "], "control_symbols": ["<ctl>"]},
    {"split_by_whitespace": False, "allow_whitespace_only_pieces": True, "remove_extra_whitespaces": False},
]


def train(**options: Any) -> bytes:
    model = io.BytesIO()
    settings = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 900, "character_coverage": 0.99}
    lines = [line for text in texts() for line in text.split("\n") if line and "\x00" not in line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 3), model_writer=model, hard_vocab_limit=False, minloglevel=2,
        **{**settings, **options},
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="module", params=range(len(VARIANTS)))
def both(request: pytest.FixtureRequest) -> tuple[FastBpe, Any]:
    """Return the fast path of a model, and SentencePiece with the same model."""
    model = train(**VARIANTS[request.param])
    exact = sentencepiece.SentencePieceProcessor(model_proto=model)
    return FastBpe(model, exact), exact


def fragments() -> st.SearchStrategy[str]:
    """Return a strategy for pieces of difficult text."""
    anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    ascii_text = st.text(st.characters(max_codepoint=127), max_size=20)
    spaces = st.text(" \t\n\r\u00a0\u3000", max_size=6)
    return st.one_of(
        anything, ascii_text, spaces, st.sampled_from([*AWKWARD, *SYMBOLS, *PARAGRAPHS]),
        st.text("学习率数据模型的一", max_size=8),
    )  # fmt: skip


SLOW = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SLOW
@given(parts=st.lists(fragments(), max_size=12))
@example(parts=["</s", "\x1f", ">"])  # is a control symbol only after normalization
@example(parts=["\uff1c", "s>"])
@example(parts=[" "])
@example(parts=["\x01 a"])
@example(parts=["a \x01 b\x02"])
def test_sentencepiece_ids_are_the_same(both: tuple[FastBpe, Any], parts: list[str]) -> None:
    fast, exact = both
    text = "".join(parts)
    assert fast.encode([text])[0].tolist() == exact.encode_as_ids(text)


def test_runs_of_the_models_own_pieces(both: tuple[FastBpe, Any]) -> None:
    fast, exact = both
    pieces = plain_pieces(exact)
    fast.prove(["".join(pieces[i : i + 40]) for i in range(0, len(pieces), 7)])


def test_every_character_there_is(both: tuple[FastBpe, Any]) -> None:
    fast, _ = both
    assigned = [
        chr(c) for c in range(sys.maxunicode) if unicodedata.category(chr(c)) not in ("Cs", "Cn", "Co")
    ]
    for start in range(0, len(assigned), 64):
        text = "".join(f"a{c} {c}1{c}" for c in assigned[start : start + 64])
        assert fast.agrees(text), (start, text[:40])


@pytest.mark.parametrize(
    "text", ["a" * 300_000, " " * 100_000, "\x00" * 50_000, "学" * 100_000, "ab\n" * 80_000]
)
def test_very_long_texts(text: str) -> None:
    fast, exact = golden_bpe()
    assert fast.encode([text])[0].tolist() == exact.encode_as_ids(text)


def golden_bpe() -> tuple[FastBpe, Any]:
    exact = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / "sp.model"))
    return FastBpe((GOLDEN / "sp.model").read_bytes(), exact), exact


def test_control_symbols_in_text_never_become_control_tokens() -> None:
    fast, exact = golden_bpe()
    control = {i for i in range(exact.get_piece_size()) if exact.is_control(i)}
    assert control
    for symbol in ("<s>", "</s>", "<pad>", "</s></s>", "a</s>b"):
        assert not control & set(fast.encode([symbol])[0].tolist())


@pytest.mark.parametrize("options", [{"model_type": "unigram"}, {"byte_fallback": False}])
def test_a_model_of_another_kind_falls_back_with_a_notice(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "other.model"
    path.write_bytes(train(vocab_size=400, **options))
    encoder = SentencePieceEncoder(str(path), exact_only=False)
    assert encoder.fast is None
    assert "tokenizing with SentencePiece, which is slower" in encoder.notice
    exact = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert encoder.encode(PARAGRAPHS[0]).tolist() == exact.encode_as_ids(PARAGRAPHS[0])


def test_a_fast_path_that_is_wrong_is_found_out_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    model = (GOLDEN / "sp.model").read_bytes()
    other = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / "nfkc.model"))
    with pytest.raises(NotExactError, match="disagrees"):
        FastBpe(model, other)


def test_a_fast_path_that_goes_wrong_later_stops_the_run() -> None:
    encoder = SentencePieceEncoder(str(GOLDEN / "sp.model"), exact_only=False)
    assert encoder.fast is not None
    encoder.encode_many(["fine"] * SPOT_CHECK_EVERY)
    encoder.fast.encode = lambda texts: [np.zeros(3, int)] * len(texts)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="--exact-tokenizer"):
        encoder.encode_many(["not fine"])


def test_without_the_fast_library_the_exact_one_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    encoder = SentencePieceEncoder(str(GOLDEN / "sp.model"), exact_only=False)
    assert encoder.fast is None
    assert "not installed" in encoder.notice


def test_a_cache_that_grew_is_dropped_and_the_ids_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, exact = golden_bpe()
    loaded = []
    original = merges.Merges.load
    monkeypatch.setattr(merges, "CHECK_EVERY", 50)
    monkeypatch.setattr(merges, "CACHE_BYTES", -1)
    monkeypatch.setattr(merges.Merges, "load", lambda self: (loaded.append(1), original(self)))
    for text in PARAGRAPHS * 3:
        assert fast.encode([text])[0].tolist() == exact.encode_as_ids(text)
    assert len(loaded) > 3


def test_half_a_surrogate_pair_is_no_text() -> None:
    encoder = SentencePieceEncoder(str(GOLDEN / "sp.model"), exact_only=False)
    found = encoder.encode_many(["good", "\ud800", "bad \udfff end"])
    assert [isinstance(ids, TextError) for ids in found] == [False, True, True]


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return an encoder of a byte-level BPE like GPT-2's, which has the fast path."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from megatron_lrpath.tokenizers.encoders import HuggingFaceEncoder
    from tools.preprocess_data import build_parser

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=700, special_tokens=["<|end|>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    tokenizer.add_tokens(["<extra>"])
    end = tokenizer.token_to_id("<|end|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", end)]
    )
    folder = tmp_path_factory.mktemp("hf")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    arguments = ["--input", "-", "--output-prefix", "x", "--tokenizer-type", "HuggingFaceTokenizer"]
    return HuggingFaceEncoder(build_parser().parse_args([*arguments, "--tokenizer-model", str(folder)]))


@SLOW
@given(parts=st.lists(fragments() | st.sampled_from(["<|end|>", "<extra>", "'s", " 's"]), max_size=12))
def test_huggingface_ids_are_the_same(huggingface: Any, parts: list[str]) -> None:
    assert huggingface.fast is not None
    text = "".join(parts)
    assert huggingface.encode(text).tolist() == huggingface.encode_exactly(text).tolist()


def test_huggingface_special_tokens_in_text_stay_text(huggingface: Any) -> None:
    end = huggingface.eod
    assert (
        huggingface.encode("a<|end|>b<|end|>").tolist().count(end) == 1
    )  # the token at the beginning of every text
    huggingface._parse = True
    assert huggingface.encode("a<|end|>b<|end|>").tolist().count(end) == 3
    huggingface._parse = False


def test_huggingface_half_a_surrogate_pair(huggingface: Any) -> None:
    assert isinstance(huggingface.encode_many(["\ud83d"])[0], TextError)


def test_json_escapes_of_a_whole_pair_are_fine() -> None:
    fast, exact = golden_bpe()
    text = json.loads('"\\ud83d\\ude00"')
    assert fast.encode([text])[0].tolist() == exact.encode_as_ids("😀")

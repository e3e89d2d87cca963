"""The fast tokenizers return the original's ids for every Unicode character, with tables of any version."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from megatron_lrpath.tokenizers.encoders import HuggingFaceEncoder
from megatron_lrpath.tokenizers.fast_hugging_face import NOT_SURELY_NFC
from tests.golden.make import texts
from tools.preprocess_data import build_parser

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
NORMALIZERS: dict[str, Any] = {
    "none": None,
    "NFC": normalizers.NFC(),
    "NFKC, lower case": normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
}
PLACES = [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000), *range(0x10FF00, 0x110000)]
CHARACTERS = [chr(code) for code in PLACES]
MARKS = [c for c in CHARACTERS if unicodedata.category(c).startswith("M")]
LATER = [0x898, 0x89F, 0x1ACC, 0x1ACF, 0x10EFA, 0x10EFD, 0x113CE, 0x11F5A, 0x1E08F, 0x1E4EE, 0x1E5EE]
WORDS = ["ab", "\u0627\u0898\u064e", "e\u0301\u0323", "ن\u064e", "\u0915\u093c"]


@pytest.fixture(scope="module", params=NORMALIZERS)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceEncoder:
    """Return an encoder of a byte-level BPE that splits like Qwen2's, with one of the normalizers."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    if NORMALIZERS[request.param] is not None:
        tokenizer.normalizer = NORMALIZERS[request.param]
    cut = pre_tokenizers.Split(Regex(QWEN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    # neighbors of all kinds become tokens, so that a different split or order is detected
    neighbours = [f"{word}{chr(code)}{word} {chr(code)}1{chr(code)}" for word in WORDS for code in LATER]
    tokenizer.train_from_iterator(texts() + neighbours * 5, trainer)
    folder = tmp_path_factory.mktemp("hf")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    argv = ["--input", "-", "--output-prefix", "x", "--tokenizer-type", "HuggingFaceTokenizer"]
    made = HuggingFaceEncoder(build_parser().parse_args([*argv, "--tokenizer-model", str(folder)]))
    assert made.fast is not None, made.notice
    return made


def in_texts(pieces: Iterator[str], number: int = 512) -> Iterator[str]:
    """Yield the pieces joined, `number` to a text."""
    held = list(pieces)
    return ("".join(held[start : start + number]) for start in range(0, len(held), number))


def require_equal(encoder: HuggingFaceEncoder, found: Iterator[str]) -> None:
    """Check that both ways return the same ids for every text."""
    assert encoder.fast is not None
    for text in found:
        assert encoder.fast.agrees(text), ascii(text[:200])


def test_every_character_alone(encoder: HuggingFaceEncoder) -> None:
    assert encoder.fast is not None
    # Without those that are left to the library, which would pull in whole texts of others.
    differing = encoder.fast._differing  # type: ignore[attr-defined]
    assert len(differing) < 20_000
    fast = (c for c in CHARACTERS if c not in differing)
    require_equal(encoder, in_texts(f"a{c} {c}1" for c in fast))
    require_equal(encoder, (f"a{c}1{c} {c}b" for c in sorted(differing)[::40]))


def test_every_mark_next_to_marks_and_letters(encoder: HuggingFaceEncoder) -> None:
    marks = sorted({*MARKS, *map(chr, LATER)})
    others = [chr(code) for code in (0x301, 0x323, 0x64E, 0x93C, 0x94D, 0x3099, 0x898, 0x1E4EE)]
    pairs = (f"{base}{one}{two} {base}{two}{one}" for one in marks for two in others for base in "e\u0627")
    require_equal(encoder, in_texts(pairs, 1))


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from([*map(chr, LATER), *WORDS, *"e\u0301\u0323\u1100\u1161\u11a8 1'\u017f\n"])))
def test_any_sequence_of_them(encoder: HuggingFaceEncoder, parts: list[str]) -> None:
    require_equal(encoder, iter(["".join(parts)]))


def test_the_case_that_was_found(encoder: HuggingFaceEncoder) -> None:
    found = encoder.encode_many(["plain", "\u0627\u0898\u064e"])[1]
    assert not isinstance(found, Exception)
    assert found.tolist() == encoder.encode_exactly("\u0627\u0898\u064e").tolist()


def test_what_is_passed_by_nfc_is_unchanged_by_it() -> None:
    nfc = normalizers.NFC()
    sure = [c for c in CHARACTERS if not NOT_SURELY_NFC.search(c)]
    assert len(sure) > 30_000
    for text in in_texts(iter(sure), 4096):
        assert nfc.normalize_str(text) == text
    assert all(unicodedata.combining(c) == 0 for c in sure)
    assert not any(c in "\u1161\u11a8\u3099\u0301" for c in sure)


def test_a_normalizer_without_tables_is_left_to_the_fast_library() -> None:
    """A tokenizer without tables is passed to gigatoken unchanged."""
    from megatron_lrpath.tokenizers.fast_hugging_face import take_normalizer

    plain = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}]}
    description = {"normalizer": plain}
    assert take_normalizer(description, None) is None
    assert description == {"normalizer": plain}

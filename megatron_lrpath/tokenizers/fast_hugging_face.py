"""Hugging Face's fast BPE tokenizers by gigatoken, with the original's normalization and character classes.

Tokenizers split texts by classes of characters (letters, numbers, symbols) before they merge. Each library uses the
tables of one version of Unicode; the tables differ in characters that are missing in the older version.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unicodedata import ucd_3_2_0 as first_tables  # characters of these tables have the same class everywhere

import numpy as np

from megatron_lrpath.tokenizers.fast_bpe import (
    FastPath,
    Ids,
    Merges,
    NotExactError,
    common_character,
    trial_texts,
)

# Normalizers without Unicode tables; gigatoken implements them.
PLAIN_NORMALIZERS = ("Prepend", "Replace")
UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
# Characters that NFC leaves unchanged, alone and next to each other, in every version of Unicode.
NOT_SURELY_NFC = re.compile(
    "[^\x00-\u02ff\u0400-\u0482\u048a-\u04ff\u2010-\u2027\u3000-\u3029\u3041-\u3096\u30a1-\u30ff"
    "\u4e00-\u9fa5\uac00-\ud7a3\uff01-\uff60]"
)
MARKS_OF_LATER = [
    "\u0627\u0898\u064e", "\u0627\u064e\u0898", "e\u0301\u0323", "e\u1acc\u0301", "\u0915\u093c\u11f5a",
    "a\U00010efd\u0301", "a\U0001e08f\u0323", "\u0c3c\u0c4d", "\u212b\u2126", "\u0958", "\U0001d15e",
]  # fmt: skip


class FastHuggingFace(FastPath):
    """Encode by gigatoken with the same ids, including the special tokens that the tokenizer adds to every
    text.

    The tokenizer's own normalizer is used, because gigatoken has another version of the Unicode tables.
    Texts with a character whose class differs, or with an added token as text, are encoded by the library.

    Args:
        tokenizer: a fast tokenizer of transformers.
        added: the spellings of all its added tokens.
        exactly: returns its ids for a text.

    Raises:
        NotExactError: gigatoken does not support the tokenizer or disagrees with it.
    """

    library = "Hugging Face's"

    def __init__(self, tokenizer: Any, added: list[str], exactly: Callable[[str], Ids]) -> None:
        self.exactly = exactly
        self._added = added
        self._hint = common_character(added) if added else "\x00"  # searched for first
        backend = tokenizer.backend_tokenizer
        if backend.normalizer is not None and any(
            token.normalized for token in tokenizer.added_tokens_decoder.values()
        ):
            raise NotExactError("the tokenizer matches added tokens in normalized text")
        self._before, self._after = specials_around(tokenizer)
        description = json.loads(backend.to_str())
        self._normalize = take_normalizer(description, backend.normalizer)
        self._merges = Merges(json.dumps(description))
        self._differing = characters_that_differ(description)
        self._perhaps = quick_filter(self._differing)
        pieces = [tokenizer.convert_tokens_to_string([piece]) for piece in list(tokenizer.get_vocab())[:8000]]
        self.prove(trial_texts(pieces, added[:256]) + MARKS_OF_LATER)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Return the token ids of each text."""
        merge = self._merges.encoder(sum(map(len, texts)))
        around = bool(self._before.size or self._after.size)
        ids: list[Ids] = []
        for text in texts:
            if self._hint in text and any(token in text for token in self._added):
                ids.append(self.exactly(text))
                continue
            normal = text if self._normalize is None else self._normalize(text)
            if self._has_differing(normal):
                ids.append(self.exactly(text))
            elif around:
                ids.append(np.concatenate([self._before, merge(normal), self._after]))
            else:
                ids.append(merge(normal))
        return ids

    def _has_differing(self, text: str) -> bool:
        """Return whether a text contains a character whose class differs."""
        if text.isascii() or self._perhaps is None or not self._perhaps.search(text):
            return False
        return not self._differing.isdisjoint(text)


def specials_around(tokenizer: Any) -> tuple[Ids, Ids]:
    """Return the special tokens that the tokenizer puts before and after every text; raise NotExactError."""
    around = tokenizer("a").input_ids
    alone = tokenizer("a", add_special_tokens=False).input_ids
    starts = [i for i in range(len(around)) if around[i : i + len(alone)] == alone]
    if not alone or not starts:
        raise NotExactError("the tokenizer changes a text when it adds special tokens")
    first, last = starts[0], starts[0] + len(alone)
    return np.array(around[:first], dtype=np.uint32), np.array(around[last:], dtype=np.uint32)


def take_normalizer(description: dict[str, Any], normalizer: Any) -> Callable[[str], str] | None:
    """Remove a normalizer that depends on Unicode tables from a `tokenizer.json`; return the function to call
    instead.

    Return None if there is no such normalizer; a normalizer without tables stays in the description.
    """
    steps = normalizer_steps(description.get("normalizer"))
    if all(step["type"] in PLAIN_NORMALIZERS and "Regex" not in step.get("pattern", {}) for step in steps):
        return None
    description["normalizer"] = None
    whole: Callable[[str], str] = normalizer.normalize_str
    kinds = {step["type"] for step in steps}
    if kinds == {"NFC"}:
        return lambda text: whole(text) if NOT_SURELY_NFC.search(text) else text
    if kinds <= set(UNICODE_FORMS):
        return lambda text: text if text.isascii() else whole(text)
    return whole


def normalizer_steps(normalizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a normalizer in `tokenizer.json`, with sequences resolved."""
    if normalizer is None:
        return []
    if normalizer["type"] == "Sequence":
        return [step for part in normalizer["normalizers"] for step in normalizer_steps(part)]
    return [normalizer]


def quick_filter(characters: frozenset[str]) -> re.Pattern[str] | None:
    """Return a fast pattern that matches every text with one of the characters; None if there are no
    characters.
    """
    if not characters:
        return None
    low = sorted(re.escape(character) for character in characters if character < "\U00010000")
    high = "\U00010000-\U0010ffff" if max(characters) >= "\U00010000" else ""
    return re.compile(f"[{''.join(low)}{high}]")


ASSIGNABLE = (range(0xD800), range(0xE000, 0x40000), range(0xE0000, 0xE1000))  # without private planes
PER_TEXT = 128  # characters tested at once
NEIGHBOURS = b"a1A"  # the characters that `between_classes` puts around a character


def characters_that_differ(description: dict[str, Any]) -> frozenset[str]:
    """Return the characters at which Hugging Face's library and gigatoken split texts differently.

    `description` is the content of a `tokenizer.json`. Its merges are replaced by merges of every
    character with its neighbors, so that each split is visible in the ids.

    Raises:
        NotExactError: the test does not support this kind of tokenizer.
    """
    kinds = pre_tokenizer_kinds(description.get("pre_tokenizer"))
    if kinds <= {"Metaspace"}:  # splits only at spaces
        return frozenset()
    if "ByteLevel" not in kinds:
        raise NotExactError(f"its pre-tokenizer ({', '.join(sorted(kinds))}) cannot be compared")
    from tokenizers import Tokenizer

    shown = {**description, "normalizer": None, "added_tokens": [], "post_processor": None}
    shown["model"] = joining_model(description["model"])
    source = json.dumps(shown)
    exact, fast = Tokenizer.from_str(source), Merges(source).encoder(0)

    def differs(text: str) -> bool:
        """Return whether the two libraries split a text differently."""
        return bool(exact.encode_batch_fast([text])[0].ids != fast(text).tolist())

    young = list(younger_characters())
    found: set[str] = set()
    for start in range(0, len(young), PER_TEXT):
        some = young[start : start + PER_TEXT]
        if differs("".join(map(between_classes, some))):
            found.update(character for character in some if differs(between_classes(character)))
    return frozenset(found)


def pre_tokenizer_kinds(pre_tokenizer: dict[str, Any] | None) -> set[str]:
    """Return the names of a pre-tokenizer's steps in `tokenizer.json`."""
    if pre_tokenizer is None:
        return set()
    if pre_tokenizer["type"] == "Sequence":
        return {kind for part in pre_tokenizer["pretokenizers"] for kind in pre_tokenizer_kinds(part)}
    return {pre_tokenizer["type"]}


def between_classes(character: str) -> str:
    """Return a text with the character after a lower-case letter, a digit and an upper-case letter."""
    return f"a{character}1{character}A{character}"


def younger_characters() -> Iterator[str]:
    """Yield all characters that are missing in the oldest tables, assigned in later ones or not."""
    for codes in ASSIGNABLE:
        for code in codes:
            if first_tables.category(character := chr(code)) == "Cn":
                yield character


def joining_model(model: dict[str, Any]) -> dict[str, Any]:
    """Return a byte-level BPE model like the given one, whose merges join single bytes with `NEIGHBOURS`."""
    spelled = byte_spellings()
    vocabulary = {character: byte for byte, character in spelled.items()}
    merges: list[list[str]] = []
    starts = [*range(0x20, 0x7F), *range(0xC2, 0xF5)]
    pairs = [(near, byte) for near in NEIGHBOURS for byte in starts]
    pairs += [(byte, near) for near in NEIGHBOURS for byte in range(0x80, 0xC0)]
    for pair in pairs:
        merge = [spelled[byte] for byte in pair]
        if "".join(merge) not in vocabulary:
            vocabulary["".join(merge)] = len(vocabulary)
            merges.append(merge)
    return {**model, "ignore_merges": False, "unk_token": None, "vocab": vocabulary, "merges": merges}


def byte_spellings() -> dict[int, str]:
    """Return the characters that represent the bytes in byte-level vocabularies."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {
        byte: chr(0x100 + number) for number, byte in enumerate(others)
    }

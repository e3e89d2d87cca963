"""Find the characters that two libraries classify differently as letters, numbers or symbols.

Tokenizers split texts by such classes before they merge. Each library uses the tables of one version of
Unicode; the tables differ in characters that are missing in the older version.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from unicodedata import ucd_3_2_0 as first_tables  # what these know has the same class everywhere

from megatron_lrpath.tokenizers.fast_bpe import Merges, NotExactError

ASSIGNABLE = (range(0xD800), range(0xE000, 0x40000), range(0xE0000, 0xE1000))  # no private planes
PER_TEXT = 128  # characters tried at once
NEIGHBOURS = b"a1A"  # those that `between_classes` puts around a character


def characters_that_differ(description: dict[str, Any]) -> frozenset[str]:
    """Return the characters at which Hugging Face's library and gigatoken split texts differently.

    `description` is the content of a `tokenizer.json`. Its merges are replaced by merges of every
    character with its neighbours, so that each split is visible in the ids.

    Raises:
        NotExactError: the test does not support this kind of tokenizer.
    """
    kinds = pre_tokenizer_kinds(description.get("pre_tokenizer"))
    if kinds <= {"Metaspace"}:  # cuts at spaces alone
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
    """Return all characters that are missing in the oldest tables, assigned in later ones or not."""
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

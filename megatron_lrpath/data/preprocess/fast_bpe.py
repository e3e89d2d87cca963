"""SentencePiece BPE at ten times its speed, token for token the same.

The package gigatoken merges exactly as SentencePiece does, but normalizes text differently and takes a
spelled-out `<s>` for the control token. So the text is normalized here, as SentencePiece does it: by the
library itself, or for plain ASCII by a byte table read off it; and a text that spells out a control symbol,
the unknown symbol or a byte piece is left to SentencePiece. A model is taken only after a trial on texts
made to be difficult for it, and a sample of every run is compared again.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lrpath.data.preprocess.merges import Merges, NotExactError, trial_texts

SPACE = "\u2581"  # SentencePiece's visible space
USER_DEFINED = 4  # the piece type in SentencePiece's model file


@dataclass(frozen=True)
class AsciiRules:
    """How a model normalizes plain ASCII: a byte table, bytes to drop, and what happens to spaces."""

    table: bytes
    dropped: bytes
    prefix: bytes
    squeeze: bool

    @cached_property
    def changes(self) -> bool:
        """Whether any character becomes another or is dropped."""
        return bool(self.dropped) or self.table != bytes(range(256))

    def apply(self, text: bytes) -> bytes:
        """`text` normalized, with plain spaces where SentencePiece has its visible ones."""
        normal = text.translate(self.table, self.dropped) if self.changes else text
        if self.squeeze:
            normal = normal.strip(b" ")
            if b"  " in normal:
                normal = re.sub(b" {2,}", b" ", normal)
            if not normal:
                return b""
        return self.prefix + normal if text else b""


class FastBpe:
    """Encodes like the SentencePiece model `model` (its bytes), which `exact` has loaded.

    Raises:
        NotExactError: gigatoken is missing, does not support the model, or disagrees with it.
    """

    def __init__(self, model: bytes, exact: Any) -> None:
        self._exact = exact
        self._merges = Merges(without_normalizer(model))
        self._symbols = reserved_symbols(exact)
        self._symbols_ascii = [symbol.encode() for symbol in self._symbols]
        self._hint = common_character(self._symbols)  # looked for first
        self._hint_ascii = self._hint.encode()
        self._ascii = read_ascii_rules(model, exact)
        self._lossless = is_lossless(model)
        self.prove(trial_texts(plain_pieces(exact), self._symbols))

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.integer[Any]]]:
        """Token ids of each text."""
        merge = self._merges.encoder(sum(map(len, texts)))
        ids: list[npt.NDArray[np.integer[Any]]] = []
        for text in texts:
            if self._ascii is not None and (self._lossless or text.isascii()):
                plain = self._ascii.apply(text.encode())
                spelled = self._hint_ascii in plain and any(symbol in plain for symbol in self._symbols_ascii)
                ids.append(self._exactly(text) if spelled else merge(plain))
            else:
                normal = self._exact.normalize(text)
                spelled = self._hint in normal and any(symbol in normal for symbol in self._symbols)
                ids.append(self._exactly(text) if spelled else merge(normal))
        return ids

    def _exactly(self, text: str) -> npt.NDArray[np.integer[Any]]:
        return np.array(self._exact.encode_as_ids(text), dtype=np.int32)

    def agrees(self, text: str) -> bool:
        """Whether SentencePiece itself gives the same ids for `text`."""
        return self.encode([text])[0].tolist() == self._exact.encode_as_ids(text)

    def prove(self, texts: list[str]) -> None:
        """Raise `NotExactError` when one of `texts` comes out differently."""
        for text in texts:
            if not self.agrees(text):
                raise NotExactError(f"gigatoken disagrees with SentencePiece on {text[:60]!r}")


def without_normalizer(model: bytes) -> bytes:
    """The model with a normalizer that does nothing: in a protobuf message the later field wins."""
    no_prefix, no_squeeze = b"\x18\x00", b"\x20\x00"  # add_dummy_prefix (3), remove_extra_whitespaces (4)
    return model + b"\x1a\x04" + no_prefix + no_squeeze  # normalizer_spec is field 3


def reserved_symbols(exact: Any) -> list[str]:
    """Spellings that text may contain but that must never become the token of that name."""
    size = exact.get_piece_size()
    pieces = [exact.id_to_piece(i) for i in range(size) if exact.is_control(i) or exact.is_unknown(i)]
    symbols = [piece.replace(SPACE, " ") for piece in pieces] + pieces + ["<0x"]
    return sorted({symbol for symbol in symbols if symbol})


def common_character(symbols: list[str]) -> str:
    """A character that all of `symbols` hold, most often `<`; "" when there is none."""
    return min(set(symbols[0]).intersection(*symbols[1:]), default="")


def read_ascii_rules(model: bytes, exact: Any) -> AsciiRules | None:
    """How the model normalizes ASCII, or None when that is more than a byte table can say."""
    spec = normalizer_spec(model)
    squeeze, prefixed, escaped = (bool(spec.get(field, 1)) for field in (4, 3, 5))
    charsmap = spec.get(2, b"")
    if not escaped or not isinstance(charsmap, bytes) or has_ascii_sequences(charsmap):
        return None
    table, dropped = bytearray(range(256)), bytearray()
    for code in range(128):
        # between two letters, so that neither the prefix nor the squeezing of spaces touches it
        normal = exact.normalize(f"a{chr(code)}a").removeprefix(SPACE if prefixed else "")
        middle = normal[1:-1].replace(SPACE, " ")
        if normal[:1] != "a" or normal[-1:] != "a" or len(middle) > 1 or not middle.isascii():
            return None
        if middle:
            table[code] = ord(middle)
        else:
            dropped.append(code)
    rules = AsciiRules(bytes(table), bytes(dropped), b"", False)
    kept_whole = [piece for piece in user_defined(model) if piece.isascii()]  # the normalizer passes them by
    if any(" " in piece or rules.apply(piece.encode()) != piece.encode() for piece in kept_whole):
        return None
    return AsciiRules(bytes(table), bytes(dropped), b" " if prefixed else b"", squeeze)


def is_lossless(model: bytes) -> bool:
    """Whether the model leaves text as it is but for the spaces' sign: then its ASCII rules hold for any text."""
    spec = normalizer_spec(model)
    return not spec.get(2) and not spec.get(4, 1)


def normalizer_spec(model: bytes) -> dict[int, int | bytes]:
    """The fields of the model's NormalizerSpec by their number."""
    spec: dict[int, int | bytes] = {}
    for field, value in protobuf_fields(model):
        if field == 3 and isinstance(value, bytes):
            spec.update(protobuf_fields(value))
    return spec


def user_defined(model: bytes) -> list[str]:
    """The pieces that the model's user defined, as they stand in text."""
    messages = (value for field, value in protobuf_fields(model) if field == 1 and isinstance(value, bytes))
    found = [
        piece.get(1) for piece in map(dict, map(protobuf_fields, messages)) if piece.get(3) == USER_DEFINED
    ]
    return [text.decode().replace(SPACE, " ") for text in found if isinstance(text, bytes)]


def protobuf_fields(message: bytes) -> list[tuple[int, int | bytes]]:
    """(number, value) of each field of a protobuf message; sub-messages and fixed-width numbers as bytes."""
    fields: list[tuple[int, int | bytes]] = []
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            number, at = _varint(message, at)
            fields.append((key >> 3, number))
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise NotExactError("not a SentencePiece model")
        fields.append((key >> 3, message[at : at + size]))
        at += size
    return fields


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message):
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise NotExactError("not a SentencePiece model")


def has_ascii_sequences(charsmap: bytes) -> bool:
    """Whether a normalization rule begins with two ASCII characters.

    The rules are a double-array trie of 32-bit units after its size in bytes (SentencePiece's
    `precompiled_charsmap`, the trie in darts-clone's layout).
    """
    if not charsmap:
        return False
    (size,) = struct.unpack_from("<I", charsmap)
    units = np.frombuffer(charsmap, dtype="<u4", count=size // 4, offset=4).tolist()

    def child(position: int, label: int) -> int | None:
        unit = units[position]
        following = position ^ ((unit >> 10) << ((unit & (1 << 9)) >> 6)) ^ label
        found = following < len(units) and units[following] & 0x800000FF == label
        return following if found else None

    firsts = [child(0, code) for code in range(1, 128)]
    return any(child(at, code) is not None for at in firsts if at is not None for code in range(1, 128))


def plain_pieces(exact: Any) -> list[str]:
    """The model's pieces as text, without control, unknown and byte pieces."""
    ids = range(exact.get_piece_size())
    special = (exact.is_control, exact.is_byte, exact.is_unknown)
    return [exact.id_to_piece(i).replace(SPACE, " ") for i in ids if not any(test(i) for test in special)]

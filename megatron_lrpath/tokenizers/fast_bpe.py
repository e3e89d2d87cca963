"""SentencePiece BPE at ten times its speed with identical tokens, in bounded memory."""

from __future__ import annotations

import random
import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from megatron_lrpath.tokenizers.sentencepiece_model import SPACE, USER_DEFINED, parse_model

type Ids = npt.NDArray[np.integer[Any]]

CACHE_BYTES = 256 << 20  # growth of the process after which gigatoken's cache of words is dropped
CHECK_EVERY = 8 << 20  # characters between two checks of that
TRIALS = 400
AWKWARD = [
    *"\x00\ufeff\u2581\n\t\x1f\x7f\x85\u00a0\u3000\u200b\u2028\ufffd\u0300\ufb01\u2460\u2167\U0001f600\u0130\u00df",
    *"\uac00\u1100\uff9e\ufdfa\U0010ffff\ue000<>1aZ.'\"\\_-",
    *("\r\n", "e\u0301", "\u4e2d\u6587", "\uff71\uff9e", "\u1100\u1161", "</", "<unk", "<0x41", "2024"),
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
]


class NotExactError(Exception):
    """The fast tokenizer cannot replace this model; the text gives the reason."""


class FastPath(ABC):
    """A faster way to the ids of `library`, verified on test texts against `exactly` when it is created."""

    library: str
    exactly: Callable[[str], Ids]

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Return the token ids of each text."""

    def agrees(self, text: str) -> bool:
        """Return whether both ways give the same ids for `text`."""
        return bool(np.array_equal(self.encode([text])[0], self.exactly(text)))

    def prove(self, texts: list[str]) -> None:
        """Raise `NotExactError` if the ids of one of `texts` differ."""
        for text in texts:
            if not self.agrees(text):
                raise NotExactError(f"gigatoken disagrees with {self.library} on {text[:60]!r}")


class Merges:
    """A tokenizer loaded into gigatoken, from a SentencePiece model's bytes or from a `tokenizer.json`.

    Raises:
        NotExactError: gigatoken is not installed or does not support this kind.
    """

    def __init__(self, source: bytes | str) -> None:
        self._source = source
        self.load()

    def load(self) -> None:
        """Reload with an empty cache; from the second time on from the converted form, if there is one."""
        try:
            import gigatoken
        except ImportError:
            raise NotExactError("the package gigatoken is not installed") from None
        kinds = gigatoken.Tokenizer
        try:
            read = kinds.from_sentencepiece if isinstance(self._source, bytes) else kinds.from_json
            self._tokenizer: Any = read(self._source)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the library is not an Exception
            raise NotExactError(f"gigatoken: {str(error).splitlines()[0]}") from None
        self._source = getattr(self._tokenizer, "_hf_json", None) or self._source
        self._seen, self._floor = 0, psutil.Process().memory_info().rss

    def encoder(self, characters: int) -> Callable[[str | bytes], npt.NDArray[np.uint32]]:
        """Return the function that encodes a text, for texts of `characters` characters in total.

        The cache, which grows with every new word, is dropped here from time to time.
        """
        self._seen += characters
        if self._seen > CHECK_EVERY:
            self._seen = 0
            if psutil.Process().memory_info().rss - self._floor > CACHE_BYTES:
                del self._tokenizer
                self.load()
        function: Callable[[str | bytes], npt.NDArray[np.uint32]] = self._tokenizer.backend.encode
        return function


def trial_texts(pieces: list[str], symbols: list[str]) -> list[str]:
    """Return test texts on which tokenizers tend to differ: sequences of the model's pieces, rare characters,
    its symbols.
    """
    rng = random.Random(20)
    pieces = rng.sample(pieces, min(len(pieces), 4000)) or ["a"]
    texts = ["", " ", "  a  b ", "\n", "\x00", *AWKWARD, *symbols, *(f"a {s} b{s}{s}" for s in symbols[:64])]
    texts += [first + second for first, second in pairwise(AWKWARD)]
    for number in range(TRIALS):
        source = (pieces, AWKWARD, pieces + AWKWARD * 20, [*pieces[:50], "  ", " "])[number % 4]
        texts.append("".join(rng.choices(source, k=rng.choice((2, 5, 20, 80)))))
        texts.append(" ".join(rng.choices(pieces, k=rng.choice((2, 5, 20)))))
    return texts


@dataclass(frozen=True)
class AsciiRules:
    """The normalization of plain ASCII by a model: a byte table, bytes to drop, and the treatment of spaces."""

    table: bytes
    dropped: bytes
    prefix: bytes
    squeeze: bool

    @cached_property
    def changes(self) -> bool:
        """Return whether any character is changed or dropped."""
        return bool(self.dropped) or self.table != bytes(range(256))

    def apply(self, text: bytes) -> bytes:
        """Return `text` normalized, with plain spaces in place of SentencePiece's visible ones."""
        normal = text.translate(self.table, self.dropped) if self.changes else text
        if self.squeeze:
            normal = normal.strip(b" ")
            if b"  " in normal:
                normal = re.sub(b" {2,}", b" ", normal)
            if not normal:
                return b""
        return self.prefix + normal if text else b""


class FastBpe(FastPath):
    """Encode like the SentencePiece model `model` (its bytes), which `exact` has loaded.

    Raises:
        NotExactError: gigatoken is missing, does not support the model, or disagrees with it.
    """

    library = "SentencePiece"

    def __init__(self, model: bytes, exact: Any) -> None:
        self._exact = exact
        self.exactly = lambda text: np.array(exact.encode_as_ids(text), dtype=np.int32)
        # A normalizer that does nothing: in a protobuf message the later field wins.
        no_prefix, no_squeeze = b"\x18\x00", b"\x20\x00"  # add_dummy_prefix (3), remove_extra_whitespaces (4)
        self._merges = Merges(model + b"\x1a\x04" + no_prefix + no_squeeze)  # normalizer_spec is field 3
        # spellings that texts can contain but that must not become the token with that name
        size = exact.get_piece_size()
        pieces = [exact.id_to_piece(i) for i in range(size) if exact.is_control(i) or exact.is_unknown(i)]
        symbols = [piece.replace(SPACE, " ") for piece in pieces] + pieces + ["<0x"]
        self._symbols = sorted({symbol for symbol in symbols if symbol})
        self._symbols_ascii = [symbol.encode() for symbol in self._symbols]
        self._hint = common_character(self._symbols)  # searched for first
        self._hint_ascii = self._hint.encode()
        parsed = parse_model(model)
        self._ascii = read_ascii_rules(parsed, exact)
        # Such a model changes only the sign for spaces, so that its rules for ASCII apply to any text.
        spec = parsed.normalizer_spec
        self._lossless = not spec.precompiled_charsmap and not spec.remove_extra_whitespaces
        self.prove(trial_texts(plain_pieces(exact), self._symbols))

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Return the token ids of each text."""
        merge = self._merges.encoder(sum(map(len, texts)))
        ids: list[Ids] = []
        for text in texts:
            if self._ascii is not None and (self._lossless or text.isascii()):
                plain = self._ascii.apply(text.encode())
                spelled = self._hint_ascii in plain and any(symbol in plain for symbol in self._symbols_ascii)
                ids.append(self.exactly(text) if spelled else merge(plain))
            else:
                normal = self._exact.normalize(text)
                spelled = self._hint in normal and any(symbol in normal for symbol in self._symbols)
                ids.append(self.exactly(text) if spelled else merge(normal))
        return ids


def common_character(symbols: list[str]) -> str:
    """Return a character that all of `symbols` contain, most often `<`; "" if there is none."""
    return min(set(symbols[0]).intersection(*symbols[1:]), default="")


def read_ascii_rules(model: Any, exact: Any) -> AsciiRules | None:
    """Return the normalization of ASCII by the parsed model, or None if a byte table cannot express it."""
    spec = model.normalizer_spec
    if not spec.escape_whitespaces or has_ascii_sequences(spec.precompiled_charsmap):
        return None
    prefixed = spec.add_dummy_prefix
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
    user_defined = (piece.piece.replace(SPACE, " ") for piece in model.pieces if piece.type == USER_DEFINED)
    kept_whole = [piece for piece in user_defined if piece.isascii()]  # the normalizer skips them
    if any(" " in piece or rules.apply(piece.encode()) != piece.encode() for piece in kept_whole):
        return None
    return AsciiRules(bytes(table), bytes(dropped), b" " if prefixed else b"", spec.remove_extra_whitespaces)


def has_ascii_sequences(charsmap: bytes) -> bool:
    """Return whether a normalization rule begins with two ASCII characters.

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
    """Return the model's pieces as text, without control, unknown and byte pieces."""
    ids = range(exact.get_piece_size())
    special = (exact.is_control, exact.is_byte, exact.is_unknown)
    return [exact.id_to_piece(i).replace(SPACE, " ") for i in ids if not any(test(i) for test in special)]

"""The BPE merges of a tokenizer as the package gigatoken carries them out, in bounded memory."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

CACHE_BYTES = 256 << 20  # growth of the process after which gigatoken's cache of words is dropped
CHECK_EVERY = 8 << 20  # characters between two looks at that
TRIALS = 400
AWKWARD = [
    *"\x00\ufeff\u2581\n\t\x1f\x7f\x85\u00a0\u3000\u200b\u2028\ufffd\u0300\ufb01\u2460\u2167\U0001f600\u0130\u00df",
    *"\uac00\u1100\uff9e\ufdfa\U0010ffff\ue000<>1aZ.'\"\\_-",
    *("\r\n", "e\u0301", "\u4e2d\u6587", "\uff71\uff9e", "\u1100\u1161", "</", "<unk", "<0x41", "2024"),
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
]


class NotExactError(Exception):
    """The fast tokenizer cannot stand in for this model; the text says why."""


class Merges:
    """A tokenizer loaded into gigatoken: from a SentencePiece model's bytes, or from a `tokenizer.json`.

    Raises:
        NotExactError: gigatoken is not there or does not know this kind.
    """

    def __init__(self, source: bytes | str) -> None:
        self._source = source
        self.load()

    def load(self) -> None:
        """Load anew, with an empty cache; the second time from the converted form, if there is one."""
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
        except BaseException as error:  # a panic of the library is no Exception
            raise NotExactError(f"gigatoken: {str(error).splitlines()[0]}") from None
        self._source = getattr(self._tokenizer, "_hf_json", None) or self._source
        self._seen, self._floor = 0, resident_bytes()

    def encoder(self, characters: int) -> Callable[[str | bytes], npt.NDArray[np.uint32]]:
        """The function that gives the ids of a text, for texts of so many `characters` together.

        Now and then the cache, which grows with every new word, is dropped here.
        """
        self._seen += characters
        if self._seen > CHECK_EVERY:
            self._seen = 0
            if resident_bytes() - self._floor > CACHE_BYTES:
                del self._tokenizer
                self.load()
        function: Callable[[str | bytes], npt.NDArray[np.uint32]] = self._tokenizer.backend.encode
        return function


def resident_bytes() -> int:
    """Memory that this process occupies; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def trial_texts(pieces: list[str], symbols: list[str]) -> list[str]:
    """Texts that try a model where tokenizers differ: runs of its own pieces, odd characters, its symbols."""
    rng = random.Random(20)
    pieces = rng.sample(pieces, min(len(pieces), 4000)) or ["a"]
    texts = ["", " ", "  a  b ", "\n", "\x00", *AWKWARD, *symbols, *(f"a {s} b{s}{s}" for s in symbols[:64])]
    texts += [first + second for first, second in pairwise(AWKWARD)]
    for number in range(TRIALS):
        source = (pieces, AWKWARD, pieces + AWKWARD * 20, [*pieces[:50], "  ", " "])[number % 4]
        texts.append("".join(rng.choices(source, k=rng.choice((2, 5, 20, 80)))))
        texts.append(" ".join(rng.choices(pieces, k=rng.choice((2, 5, 20)))))
    return texts

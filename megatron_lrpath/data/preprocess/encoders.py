"""Tokenizers as Megatron-LM's tool applies them, without importing Megatron where that can be helped."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_lrpath.data.preprocess.merges import NotExactError
from megatron_lrpath.errors import UserError

type Ids = npt.NDArray[np.integer[Any]]

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
SPOT_CHECK_EVERY = 1024  # texts of the fast path of which the beginning of one is encoded again exactly
SPOT_CHECK_CHARACTERS = 1 << 16


class TextError(ValueError):
    """A text that the tokenizer cannot take; the document is rejected with this reason."""


class Encoder:
    """Turns texts into token ids. `eod` is None where the tokenizer has no end-of-document token."""

    vocab_size: int
    eod: int | None
    notice: str = ""

    def encode(self, text: str) -> Ids:
        """Token ids of one text. Raises `TextError`."""
        raise TextError("this tokenizer takes no text")

    def encode_many(self, texts: Sequence[str]) -> list[Ids | TextError]:
        """Token ids of each text, or why there are none."""
        return [self.attempt(text) for text in texts]

    def attempt(self, text: str) -> Ids | TextError:
        """Token ids of one text, or why there are none."""
        try:
            return self.encode(text)
        except TextError as error:
            return error
        except (RuntimeError, TypeError, UnicodeError):  # which of them depends on the library
            if is_unicode(text):
                raise
            return TextError("half a surrogate pair: the text is not valid Unicode")


class FastPath(Protocol):
    """A faster way to the same ids, proved on trial texts when it was made."""

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of each text."""

    def agrees(self, text: str) -> bool:
        """Whether the slow way gives the same."""


class QuickEncoder(Encoder):
    """An encoder that may have a fast path, of which a sample of every run is compared again."""

    fast: FastPath | None = None
    _encoded = 0

    def take_fast_path(self, name: str, exact_only: bool, make: Callable[[], FastPath]) -> None:
        """Use the fast path if it can be made; otherwise `notice` says why `name` itself is used."""
        if exact_only:
            self.notice = f"tokenizing with {name} itself, as asked"
            return
        try:
            self.fast = make()
        except NotExactError as error:
            self.notice = f"tokenizing with {name} itself, which is slower: {error}"

    def encode(self, text: str) -> Ids:
        """Token ids of one text."""
        return self.encode_exactly(text) if self.fast is None else self.fast.encode([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[Ids | TextError]:
        """Token ids of each text, or why there are none."""
        if self.fast is None:
            return self.encode_many_exactly(texts)
        try:
            found: list[Ids | TextError] = list(self.fast.encode(texts))
        except (RuntimeError, TypeError, UnicodeError):
            found = super().encode_many(texts)  # one of them is no valid text
        for at in range(-self._encoded % SPOT_CHECK_EVERY, len(texts), SPOT_CHECK_EVERY):
            if not isinstance(found[at], TextError):
                self._compare(self.fast, texts[at][:SPOT_CHECK_CHARACTERS])
        self._encoded += len(texts)
        return found

    def _compare(self, fast: FastPath, text: str) -> None:
        if not fast.agrees(text):
            raise UserError(
                f"the fast tokenizer disagrees with the exact one on a text that begins {text[:60]!r}; "
                f"run again with --exact-tokenizer"
            )

    def encode_many_exactly(self, texts: Sequence[str]) -> list[Ids | TextError]:
        """As `encode_many`, by the library that Megatron-LM uses."""
        return super().encode_many(texts)

    def encode_exactly(self, text: str) -> Ids:
        """Token ids by the library that Megatron-LM uses."""
        raise TextError("this tokenizer takes no text")


class SentencePieceEncoder(QuickEncoder):
    """A SentencePiece model: by the fast path where it is exact, by the library itself elsewhere."""

    def __init__(self, path: str, exact_only: bool) -> None:
        import sentencepiece

        from megatron_lrpath.data.preprocess.fast_bpe import FastBpe

        model = _read_model(path)
        self._exact = sentencepiece.SentencePieceProcessor()
        try:
            self._exact.LoadFromSerializedProto(model)
        except RuntimeError:
            raise UserError(f"--tokenizer-model {path}: not a SentencePiece model") from None
        self.vocab_size = self._exact.get_piece_size()
        eod = self._exact.eos_id()
        self.eod = eod if eod >= 0 else None
        self.take_fast_path("SentencePiece", exact_only, lambda: FastBpe(model, self._exact))

    def encode_exactly(self, text: str) -> Ids:
        """Token ids by SentencePiece itself."""
        return np.array(self._exact.encode_as_ids(text), dtype=np.int32)


class NullEncoder(Encoder):
    """Texts that are token ids already, separated by single spaces."""

    def __init__(self, args: Namespace) -> None:
        if not args.vocab_size:
            raise UserError("--tokenizer-type NullTokenizer needs --vocab-size")
        self.vocab_size = args.vocab_size
        eod = args.null_tokenizer_eod_id
        self.eod = self.vocab_size - 1 if eod is None else eod

    def encode(self, text: str) -> Ids:
        """The numbers that `text` spells."""
        try:
            ids = np.array(list(map(int, text.split(" "))), dtype=np.int64)
        except (ValueError, OverflowError):
            raise TextError("NullTokenizer takes whole numbers separated by single spaces") from None
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            outside = ids.min() if ids.min() < 0 else ids.max()
            raise TextError(f"token id {outside} is outside the vocabulary of {self.vocab_size}")
        return ids


class MegatronEncoder(Encoder):
    """Any other tokenizer of Megatron's, by Megatron's own code (which imports torch)."""

    def __init__(self, args: Namespace) -> None:
        try:
            from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
        except ImportError as error:
            raise UserError(f"--tokenizer-type {args.tokenizer_type} needs megatron-core: {error}") from None
        settings = Namespace(
            **vars(args),
            rank=1,
            make_vocab_size_divisible_by=128,
            tensor_model_parallel_size=1,
            pad_vocab_size=False,
        )
        try:
            self._tokenizer = build_tokenizer(settings)
        except (ValueError, OSError, AssertionError, ImportError) as error:
            raise UserError(f"--tokenizer-type {args.tokenizer_type}: {error}") from None
        self.vocab_size = self._tokenizer.vocab_size
        self.eod = self._tokenizer.eod

    def encode(self, text: str) -> Ids:
        """Token ids of one text."""
        try:
            return np.array(self._tokenizer.tokenize(text), dtype=np.int64)
        except (ValueError, TypeError) as error:
            raise TextError(f"the tokenizer refuses the text: {error}") from None


def build_encoder(args: Namespace) -> Encoder:
    """The encoder that the tokenizer arguments describe.

    Raises:
        UserError: the model is missing or damaged, or the arguments contradict each other.
    """
    kind = args.tokenizer_type
    plain = not args.tokenizer_sentencepiece_legacy and args.tokenizer_sentencepiece_ignore_extra_whitespaces
    if kind in SENTENCEPIECE_TYPES and plain and not args.special_tokens and not args.metadata_path:
        return SentencePieceEncoder(_needed(args), args.exact_tokenizer)
    if kind == "HuggingFaceTokenizer" and not args.metadata_path:
        _needed(args)
        from megatron_lrpath.data.preprocess.huggingface import HuggingFaceEncoder

        return HuggingFaceEncoder(args)
    if kind == "NullTokenizer":
        return NullEncoder(args)
    return MegatronEncoder(args)


def is_unicode(text: str) -> bool:
    """Whether a string can be written as UTF-8; JSON's escapes can spell one that cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _needed(args: Namespace) -> str:
    if not args.tokenizer_model:
        raise UserError(f"--tokenizer-type {args.tokenizer_type} needs --tokenizer-model")
    return str(args.tokenizer_model)


def _read_model(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--tokenizer-model {path}: {error.strerror}") from None

"""Tokenizers as Megatron-LM's tool applies them, without importing Megatron where that can be helped."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lrpath.data.preprocess.fast_bpe import FastBpe, NotExactError
from megatron_lrpath.errors import UserError

type Ids = npt.NDArray[np.integer[Any]]

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
SPOT_CHECK_EVERY = 256  # documents of the fast path of which one is encoded again by SentencePiece


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
        return [self._attempt(text) for text in texts]

    def _attempt(self, text: str) -> Ids | TextError:
        try:
            return self.encode(text)
        except TextError as error:
            return error


class SentencePieceEncoder(Encoder):
    """A SentencePiece model: by the fast path where it is exact, by the library itself elsewhere."""

    def __init__(self, path: str, exact_only: bool) -> None:
        import sentencepiece

        model = _read_model(path)
        self._exact = sentencepiece.SentencePieceProcessor()
        try:
            self._exact.LoadFromSerializedProto(model)
        except RuntimeError:
            raise UserError(f"--tokenizer-model {path}: not a SentencePiece model") from None
        self.vocab_size = self._exact.get_piece_size()
        eod = self._exact.eos_id()
        self.eod = eod if eod >= 0 else None
        self._fast: FastBpe | None = None
        self._turn = 0
        if exact_only:
            self.notice = "tokenizing with SentencePiece itself, as asked"
            return
        try:
            self._fast = FastBpe(model, self._exact)
        except NotExactError as error:
            self.notice = f"tokenizing with SentencePiece itself, which is slower: {error}"

    @property
    def fast(self) -> bool:
        """Whether the fast path is taken."""
        return self._fast is not None

    def encode(self, text: str) -> Ids:
        """Token ids of one text; now and then the fast path is checked against SentencePiece."""
        try:
            if self._fast is None:
                return np.array(self._exact.encode_as_ids(text), dtype=np.int32)
            self._turn += 1
            if self._turn % SPOT_CHECK_EVERY == 1 and not self._fast.agrees(text):
                raise UserError(
                    f"the fast tokenizer disagrees with SentencePiece on a text that begins {text[:60]!r}; "
                    f"run again with --exact-tokenizer"
                )
            return self._fast.encode(text)
        except UnicodeEncodeError:
            raise TextError("half a surrogate pair: the text is not valid Unicode") from None


class HuggingFaceEncoder(Encoder):
    """`AutoTokenizer`, a batch at a time. Control tokens spelled out in a text stay text unless `parse`."""

    def __init__(self, args: Namespace) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        files = {"vocab_file": args.vocab_file, "merges_file": args.merge_file if args.vocab_file else None}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                args.tokenizer_model,
                use_fast=not args.tokenizer_hf_no_use_fast,
                trust_remote_code=args.trust_remote_code,
                **{name: value for name, value in files.items() if value},
            )
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"--tokenizer-model {args.tokenizer_model}: {reason}") from None
        self._with_specials = not args.tokenizer_hf_no_include_special_tokens
        self._parse = args.parse_special_tokens
        self._name_special_tokens(args.special_tokens or [])
        added = self._tokenizer.added_tokens_decoder.values()
        self._specials = sorted({token.content for token in added if token.special})
        self.vocab_size = len(self._tokenizer)
        self.eod = self._tokenizer.eos_token_id

    def _name_special_tokens(self, additional: list[str]) -> None:
        """Fill in missing special tokens as Megatron-LM's wrapper does; new ones enlarge the vocabulary."""
        tokenizer, names = self._tokenizer, {}
        if tokenizer.sep_token is None and tokenizer.eos_token:
            names["sep_token"] = tokenizer.eos_token
        elif tokenizer.eos_token is None and tokenizer.sep_token:
            names["eos_token"] = tokenizer.sep_token
        if tokenizer.bos_token is None and tokenizer.cls_token:
            names["bos_token"] = tokenizer.cls_token
        elif tokenizer.cls_token is None and tokenizer.bos_token:
            names["cls_token"] = tokenizer.bos_token
        tokenizer.add_special_tokens({**names, "additional_special_tokens": additional})

    def encode(self, text: str) -> Ids:
        """Token ids of one text."""
        spelled = not self._parse and any(special in text for special in self._specials)
        options = {"split_special_tokens": True} if spelled else {}
        try:
            if self._with_specials:
                ids = self._tokenizer(text, **options).input_ids
            else:
                ids = self._tokenizer.convert_tokens_to_ids(self._tokenizer.tokenize(text, **options))
        except (UnicodeEncodeError, TypeError):
            raise TextError("half a surrogate pair: the text is not valid Unicode") from None
        return np.array(ids, dtype=np.int64)

    def encode_many(self, texts: Sequence[str]) -> list[Ids | TextError]:
        """Token ids of each text; texts without spelled-out control tokens go as one batch."""
        plain = [not any(special in text for special in self._specials) for text in texts]
        if not self._with_specials or not any(plain):
            return super().encode_many(texts)
        try:
            batch = self._tokenizer([text for text, alone in zip(texts, plain, strict=True) if alone])
        except (UnicodeEncodeError, TypeError):
            return super().encode_many(texts)
        encoded = iter(batch.input_ids)
        return [
            np.array(next(encoded), dtype=np.int64) if alone else self._attempt(text)
            for text, alone in zip(texts, plain, strict=True)
        ]


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
            raise TextError(f"token id {ids.max()} is outside the vocabulary of {self.vocab_size}")
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
        return HuggingFaceEncoder(args)
    if kind == "NullTokenizer":
        return NullEncoder(args)
    return MegatronEncoder(args)


def _needed(args: Namespace) -> str:
    if not args.tokenizer_model:
        raise UserError(f"--tokenizer-type {args.tokenizer_type} needs --tokenizer-model")
    return str(args.tokenizer_model)


def _read_model(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--tokenizer-model {path}: {error.strerror}") from None

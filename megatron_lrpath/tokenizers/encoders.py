"""Encode texts as in Megatron-LM's preprocessing, with a faster library if its ids are proved equal."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import Plan
from megatron_lrpath.tokenizers.fast_bpe import FastBpe, FastPath, Ids, NotExactError
from megatron_lrpath.tokenizers.fast_hugging_face import FastHuggingFace
from megatron_lrpath.tokenizers.files import HUGGING_FACE, NO_TOKENIZER, open_hugging_face
from megatron_lrpath.tokenizers.sentencepiece_model import SENTENCEPIECE, open_model

SPOT_CHECK_EVERY = 1024  # texts of the fast path: the beginning of one in so many is also encoded exactly
SPOT_CHECK_CHARACTERS = 1 << 16
DEFAULT_OFF = (
    "parse_special_tokens", "tokenizer_sentencepiece_legacy", "tokenizer_hf_no_use_fast",
    "tokenizer_hf_no_include_special_tokens", "trust_remote_code",
)  # fmt: skip


class TextError(ValueError):
    """A text that the tokenizer cannot encode; the document is rejected with this reason."""


class Encoder:
    """Encode texts to token ids. `eod` is None if the tokenizer has no end-of-document token."""

    vocab_size: int
    eod: int | None
    notice: str = ""

    def encode(self, text: str) -> Ids:
        """Return the token ids of one text. Raise `TextError`."""
        raise TextError("this tokenizer takes no text")

    def encode_many(self, texts: Sequence[str]) -> list[Ids | TextError]:
        """Return the token ids of each text, or the reason for its rejection."""
        return [self.attempt(text) for text in texts]

    def attempt(self, text: str) -> Ids | TextError:
        """Return the token ids of one text, or the reason for its rejection."""
        try:
            return self.encode(text)
        except TextError as error:
            return error
        except (RuntimeError, TypeError, UnicodeError):  # which of them depends on the library
            try:
                text.encode()  # JSON's escapes can represent a string that cannot be written as UTF-8
            except UnicodeEncodeError:
                return TextError("half a surrogate pair: the text is not valid Unicode")
            raise


class QuickEncoder(Encoder):
    """An encoder with an optional fast path, which is compared with the exact one on a sample of every run."""

    fast: FastPath | None = None
    _encoded = 0

    def take_fast_path(self, name: str, exact_only: bool, make: Callable[[], FastPath]) -> None:
        """Use the fast path if possible; otherwise `notice` gives the reason why `name` itself is used."""
        if exact_only:
            self.notice = f"tokenizing with {name}, as requested"
            return
        try:
            self.fast = make()
        except NotExactError as error:
            self.notice = f"tokenizing with {name}, which is slower: {error}"

    def encode(self, text: str) -> Ids:
        """Return the token ids of one text."""
        return self.encode_exactly(text) if self.fast is None else self.fast.encode([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[Ids | TextError]:
        """Return the token ids of each text, or the reason for its rejection."""
        if self.fast is None:
            return self.encode_many_exactly(texts)
        try:
            found: list[Ids | TextError] = list(self.fast.encode(texts))
        except (RuntimeError, TypeError, UnicodeError):
            found = super().encode_many(texts)  # one of them is not valid text
        for at in range(-self._encoded % SPOT_CHECK_EVERY, len(texts), SPOT_CHECK_EVERY):
            if not isinstance(found[at], TextError):
                text = texts[at][:SPOT_CHECK_CHARACTERS]
                if not self.fast.agrees(text):
                    raise UserError(
                        f"the fast tokenizer and the exact one differ for a text that begins {text[:60]!r}; "
                        f"run again with --exact-tokenizer"
                    )
        self._encoded += len(texts)
        return found

    def encode_many_exactly(self, texts: Sequence[str]) -> list[Ids | TextError]:
        """Encode like `encode_many`, with the library that Megatron-LM uses."""
        return super().encode_many(texts)

    def encode_exactly(self, text: str) -> Ids:
        """Return the token ids by the library that Megatron-LM uses."""
        raise TextError("this tokenizer takes no text")


class SentencePieceEncoder(QuickEncoder):
    """A SentencePiece model: by the fast path if it is exact, else by the library itself."""

    def __init__(self, path: str, exact_only: bool) -> None:
        model, self._exact = open_model(path, "--tokenizer-model")
        self.vocab_size = self._exact.get_piece_size()
        eod = self._exact.eos_id()
        self.eod = eod if eod >= 0 else None
        self.take_fast_path("SentencePiece", exact_only, lambda: FastBpe(model, self._exact))

    def encode_exactly(self, text: str) -> Ids:
        """Return the token ids by SentencePiece itself."""
        return np.array(self._exact.encode_as_ids(text), dtype=np.int32)


class NullEncoder(Encoder):
    """Texts that are already token ids, separated by single spaces."""

    def __init__(self, args: Namespace) -> None:
        if not args.vocab_size or args.vocab_size < 1:
            raise UserError("--tokenizer-type NullTokenizer needs --vocab-size, at least 1")
        self.vocab_size = args.vocab_size
        eod = args.null_tokenizer_eod_id
        self.eod = self.vocab_size - 1 if eod is None else eod

    def encode(self, text: str) -> Ids:
        """Return the numbers in `text`."""
        try:
            ids = np.array(list(map(int, text.split(" "))), dtype=np.int64)
        except (ValueError, OverflowError):
            raise TextError("NullTokenizer expects integers separated by single spaces") from None
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            outside = ids.min() if ids.min() < 0 else ids.max()
            raise TextError(f"token id {outside} is outside the vocabulary of {self.vocab_size}")
        return ids


class MegatronEncoder(Encoder):
    """Any other tokenizer of Megatron, by Megatron's own code (which imports torch)."""

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
            reason = str(error) or f"Megatron cannot load it ({type(error).__name__})"
            model = f", --tokenizer-model {args.tokenizer_model}" if args.tokenizer_model else ""
            raise UserError(f"--tokenizer-type {args.tokenizer_type}{model}: {reason}") from None
        self.vocab_size = self._tokenizer.vocab_size
        self.eod = self._tokenizer.eod

    def encode(self, text: str) -> Ids:
        """Return the token ids of one text."""
        try:
            return np.array(self._tokenizer.tokenize(text), dtype=np.int64)
        except (ValueError, TypeError) as error:
            raise TextError(f"the tokenizer cannot encode the text: {error}") from None


def build_encoder(args: Namespace) -> Encoder:
    """Return the encoder for the tokenizer arguments.

    Raises:
        UserError: the model is missing or damaged, or the arguments contradict each other.
    """
    kind = args.tokenizer_type
    plain = not args.tokenizer_sentencepiece_legacy and args.tokenizer_sentencepiece_ignore_extra_whitespaces
    fast = kind in SENTENCEPIECE and plain and not args.special_tokens and not args.metadata_path
    if fast or (kind == HUGGING_FACE and not args.metadata_path):
        if not args.tokenizer_model:
            raise UserError(f"--tokenizer-type {kind} needs --tokenizer-model")
        if fast:
            return SentencePieceEncoder(args.tokenizer_model, args.exact_tokenizer)
        return HuggingFaceEncoder(args)
    if kind == NO_TOKENIZER:
        return NullEncoder(args)
    return MegatronEncoder(args)


def encoder_of_plan(plan: Plan) -> Encoder:
    """Return the encoder of a plan's tokenizer, with the default options of preprocess_data.py.

    Raises:
        UserError: see `build_encoder`.
    """
    more = plan.megatron
    names = ("null_tokenizer_eod_id", "vocab_file", "merge_file")
    options = {name: more.get(name) for name in names} | dict.fromkeys(DEFAULT_OFF, False)
    tokens = more.get("tokenizer_special_tokens") or more.get("special_tokens")
    return build_encoder(
        Namespace(
            tokenizer_type=plan.tokenizer.type,
            tokenizer_model=plan.tokenizer.model,
            vocab_size=plan.tokenizer.vocab_size,
            special_tokens=tokens,
            metadata_path=None,
            exact_tokenizer=True,
            tokenizer_sentencepiece_ignore_extra_whitespaces=True,
            **options,
        )
    )


class HuggingFaceEncoder(QuickEncoder):
    """A tokenizer of `AutoTokenizer`. Special tokens in a text are plain text unless `--parse-special-tokens`
    is given.
    """

    def __init__(self, args: Namespace) -> None:
        self._tokenizer = load_with_options(args)
        self.with_specials = not args.tokenizer_hf_no_include_special_tokens
        self._parse = args.parse_special_tokens
        added = self._tokenizer.added_tokens_decoder.values()
        self.added = sorted({token.content for token in added})
        self._specials = sorted({token.content for token in added if token.special})
        self.vocab_size = len(self._tokenizer)
        self.eod = self._tokenizer.eos_token_id
        self.take_fast_path("Hugging Face's library", args.exact_tokenizer, self._replacement)

    def _replacement(self) -> FastPath:
        if not self.with_specials or not self._tokenizer.is_fast:
            raise NotExactError("only fast tokenizers that add their special tokens have a fast path")
        return FastHuggingFace(self._tokenizer, self.added, self.encode_exactly)

    def encode_exactly(self, text: str) -> Ids:
        """Return the token ids of one text by the library itself."""
        spelled = not self._parse and any(special in text for special in self._specials)
        options = {"split_special_tokens": True} if spelled else {}
        if self.with_specials:
            ids = self._tokenizer(text, **options).input_ids
        else:
            ids = self._tokenizer.convert_tokens_to_ids(self._tokenizer.tokenize(text, **options))
        return np.array(ids, dtype=np.int64)

    def encode_many_exactly(self, texts: Sequence[str]) -> list[Ids | TextError]:
        """Return the token ids of each text; texts without special tokens are encoded in one batch."""
        plain = [not any(special in text for special in self._specials) for text in texts]
        if not self.with_specials or not any(plain):
            return super().encode_many_exactly(texts)
        try:
            batch = self._tokenizer([text for text, alone in zip(texts, plain, strict=True) if alone])
        except (UnicodeEncodeError, TypeError):
            return super().encode_many_exactly(texts)
        encoded = iter(batch.input_ids)
        return [
            np.array(next(encoded), dtype=np.int64) if alone else self.attempt(text)
            for text, alone in zip(texts, plain, strict=True)
        ]


def load_with_options(args: Namespace) -> Any:
    """Return the tokenizer, with the options and special tokens of Megatron-LM's wrapper; new ones enlarge
    the vocabulary.

    Raises:
        UserError: it cannot be found or read.
    """
    from transformers.utils import logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are already parallel
    logging.set_verbosity_error()
    options = {"use_fast": not args.tokenizer_hf_no_use_fast, "trust_remote_code": args.trust_remote_code}
    files = {"vocab_file": args.vocab_file, "merges_file": args.merge_file if args.vocab_file else None}
    options |= {name: value for name, value in files.items() if value}
    tokenizer = open_hugging_face(args.tokenizer_model, "--tokenizer-model", **options)
    names = {}
    if tokenizer.sep_token is None and tokenizer.eos_token:
        names["sep_token"] = tokenizer.eos_token
    elif tokenizer.eos_token is None and tokenizer.sep_token:
        names["eos_token"] = tokenizer.sep_token
    if tokenizer.bos_token is None and tokenizer.cls_token:
        names["bos_token"] = tokenizer.cls_token
    elif tokenizer.cls_token is None and tokenizer.bos_token:
        names["cls_token"] = tokenizer.bos_token
    tokenizer.add_special_tokens({**names, "additional_special_tokens": args.special_tokens or []})
    return tokenizer

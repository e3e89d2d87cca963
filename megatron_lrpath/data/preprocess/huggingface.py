"""Hugging Face tokenizers as Megatron-LM's tool applies them, by a faster library where that is exact."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_lrpath.data.preprocess.encoders import Ids, QuickEncoder, TextError
from megatron_lrpath.data.preprocess.fast_bpe import common_character
from megatron_lrpath.data.preprocess.merges import Merges, NotExactError, trial_texts
from megatron_lrpath.errors import UserError


class HuggingFaceEncoder(QuickEncoder):
    """`AutoTokenizer`. Special tokens spelled out in a text stay text unless `--parse-special-tokens`."""

    def __init__(self, args: Namespace) -> None:
        self._tokenizer = load_tokenizer(args)
        self._with_specials = not args.tokenizer_hf_no_include_special_tokens
        self._parse = args.parse_special_tokens
        name_special_tokens(self._tokenizer, args.special_tokens or [])
        added = self._tokenizer.added_tokens_decoder.values()
        self.added = sorted({token.content for token in added})
        self._specials = sorted({token.content for token in added if token.special})
        self.vocab_size = len(self._tokenizer)
        self.eod = self._tokenizer.eos_token_id
        self.take_fast_path("Hugging Face's library", args.exact_tokenizer, self._make_fast)

    def _make_fast(self) -> FastHuggingFace:
        if not self._with_specials or not self._tokenizer.is_fast:
            raise NotExactError("it is only replaced where it is fast itself and adds its special tokens")
        return FastHuggingFace(self, self._tokenizer)

    def encode_exactly(self, text: str) -> Ids:
        """Token ids of one text by the library itself."""
        spelled = not self._parse and any(special in text for special in self._specials)
        options = {"split_special_tokens": True} if spelled else {}
        if self._with_specials:
            ids = self._tokenizer(text, **options).input_ids
        else:
            ids = self._tokenizer.convert_tokens_to_ids(self._tokenizer.tokenize(text, **options))
        return np.array(ids, dtype=np.int64)

    def encode_many_exactly(self, texts: Sequence[str]) -> list[Ids | TextError]:
        """Token ids of each text; those that spell no special token go as one batch."""
        plain = [not any(special in text for special in self._specials) for text in texts]
        if not self._with_specials or not any(plain):
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


class FastHuggingFace:
    """The same ids by gigatoken, with the special tokens that the tokenizer puts around every text.

    Texts that spell out an added token of any kind are left to the library.

    Raises:
        NotExactError: gigatoken does not support the tokenizer or disagrees with it.
    """

    def __init__(self, encoder: HuggingFaceEncoder, tokenizer: Any) -> None:
        self._encoder = encoder
        self._added = encoder.added
        self._hint = common_character(self._added) if self._added else "\x00"  # looked for first
        backend = tokenizer.backend_tokenizer
        if backend.normalizer is not None and any(
            token.normalized for token in tokenizer.added_tokens_decoder.values()
        ):
            raise NotExactError("the tokenizer looks for added tokens in normalized text")
        around = tokenizer("a").input_ids
        alone = tokenizer("a", add_special_tokens=False).input_ids
        starts = [i for i in range(len(around)) if around[i : i + len(alone)] == alone]
        if not alone or not starts:
            raise NotExactError("the tokenizer changes a text when it adds special tokens")
        self._before = np.array(around[: starts[0]], dtype=np.uint32)
        self._after = np.array(around[starts[0] + len(alone) :], dtype=np.uint32)
        self._merges = Merges(backend.to_str())
        self._prove(tokenizer)

    def _prove(self, tokenizer: Any) -> None:
        pieces = [tokenizer.convert_tokens_to_string([piece]) for piece in list(tokenizer.get_vocab())[:8000]]
        for text in trial_texts(pieces, self._added[:256]):
            if not self.agrees(text):
                raise NotExactError(f"gigatoken disagrees with it on {text[:60]!r}")

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of each text."""
        merge = self._merges.encoder(sum(map(len, texts)))
        around = bool(self._before.size or self._after.size)
        ids: list[Ids] = []
        for text in texts:
            if self._hint in text and any(token in text for token in self._added):
                ids.append(self._encoder.encode_exactly(text))
            elif around:
                ids.append(np.concatenate([self._before, merge(text), self._after]))
            else:
                ids.append(merge(text))
        return ids

    def agrees(self, text: str) -> bool:
        """Whether the library itself gives the same ids for `text`."""
        return bool(np.array_equal(self.encode([text])[0], self._encoder.encode_exactly(text)))


def load_tokenizer(args: Namespace) -> Any:
    """The tokenizer, with the options of Megatron-LM's wrapper.

    Raises:
        UserError: it cannot be found or read.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    files = {"vocab_file": args.vocab_file, "merges_file": args.merge_file if args.vocab_file else None}
    try:
        return AutoTokenizer.from_pretrained(
            args.tokenizer_model,
            use_fast=not args.tokenizer_hf_no_use_fast,
            trust_remote_code=args.trust_remote_code,
            **{name: value for name, value in files.items() if value},
        )
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--tokenizer-model {args.tokenizer_model}: {reason}") from None


def name_special_tokens(tokenizer: Any, additional: list[str]) -> None:
    """Fill in missing special tokens as Megatron-LM's wrapper does; new ones enlarge the vocabulary."""
    names = {}
    if tokenizer.sep_token is None and tokenizer.eos_token:
        names["sep_token"] = tokenizer.eos_token
    elif tokenizer.eos_token is None and tokenizer.sep_token:
        names["eos_token"] = tokenizer.sep_token
    if tokenizer.bos_token is None and tokenizer.cls_token:
        names["bos_token"] = tokenizer.cls_token
    elif tokenizer.cls_token is None and tokenizer.bos_token:
        names["cls_token"] = tokenizer.bos_token
    tokenizer.add_special_tokens({**names, "additional_special_tokens": additional})

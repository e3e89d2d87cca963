"""Open and parse SentencePiece models, and convert them to a `tokenizer.json` with the same ids."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError, cause

SENTENCEPIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")  # Megatron's types
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # sentencepiece_model.proto
UNIGRAM, BPE = 1, 2
SPACE = "▁"

# Text on which converted tokenizers tend to fail: spaces, symbols as text, scripts, emoji, controls.
NASTY = (
    "", " ", "   ", "\n", "\t\t x", " leading", "trailing ", "two  spaces   three", "a\n\n\nb\r\nc",
    "\u00a0nbsp\u3000wide",
    "<s>", "</s> <unk><pad>", "<s>text</s>", "<0x41><0x0A>", "▁literal▁▁ ▁", "naïve café nai\u0308ve",
    "ﬁﬂ ½ ² Å Ⅷ",
    "中文字符。日本語カタカナ", "한국어 العربية עברית हिन्दी ไทย", "👩‍👩‍👧‍👦🏳️‍🌈 😀😀",
    "\u200b\u200d\ufeff\u2028",
    "\x01\x7f",
    "aaaaaaaaaaaaaaaaaaaaa", "=" * 37, "0123456789 3.14159 1e-5", "def f(x):\n    return x  # ok\n", "İıſẞß",
    "\U00010348\U0001f9ff\U000e0001", "[INST] <<SYS>> <|im_start|>user\n", "e\u0301\u0301\u0301", "x" * 300,
)  # fmt: skip


def open_model(path: Path | str, option: str = "") -> tuple[bytes, Any]:
    """Return the bytes of a model file, and SentencePiece's processor for it.

    Raises:
        UserError: it cannot be read or is not a model; the message begins with `option`, if that option named the file.
    """
    import sentencepiece

    place = f"{option} {path}".lstrip()
    processor = sentencepiece.SentencePieceProcessor()
    try:
        model = Path(path).read_bytes()
        processor.LoadFromSerializedProto(model)
    except OSError as error:
        raise UserError(f"{place}: {cause(error)}") from None
    except RuntimeError:
        raise UserError(f"{place}: not a SentencePiece model") from None
    return model, processor


def parse_model(model: bytes) -> Any:
    """Return the `ModelProto` of a loaded SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(model)


def fast_tokenizer(model: Any) -> Any:
    """Convert a parsed SentencePiece model (BPE or Unigram) to a `tokenizers.Tokenizer`.

    Control symbols are special tokens; in a text they are plain text, as in SentencePiece, if the
    tokenizer splits special tokens (`split_special_tokens` in its configuration). Two cases differ from
    SentencePiece: a control symbol as text between two user-defined symbols, and, with a character map
    such as NFKC, combining marks (the tokenizers library maps whole graphemes).

    Raises:
        UserError: a model of another type, or with spaces as suffixes.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers

    if model.trainer_spec.model_type not in (UNIGRAM, BPE) or model.trainer_spec.treat_whitespace_as_suffix:
        raise UserError(
            "only SentencePiece models of type bpe or unigram, with spaces as prefixes, are converted."
        )
    symbols = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    tokenizer = Tokenizer(
        bpe_model(model, bool(symbols)) if model.trainer_spec.model_type == BPE else unigram_model(model)
    )
    tokenizer.normalizer = normalizer(model.normalizer_spec)
    if symbols:
        # Longest first, as SentencePiece matches them; each is one token and nothing merges across it.
        spelled = sorted(
            (symbol.replace(" ", SPACE) for symbol in symbols), key=lambda text: (-len(text), text)
        )
        pattern = Regex("|".join(map(re.escape, spelled)))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    tokenizer.decoder = decoder(model.normalizer_spec)
    special = [piece.piece for piece in model.pieces if piece.type in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    tokenizer.encode_special_tokens = True
    return tokenizer


def bpe_model(model: Any, whole_words: bool) -> Any:
    """Return the BPE model: SentencePiece joins the neighbors whose joint piece has the best score.

    With `whole_words`, a word that is a piece becomes that piece directly (for symbols without merges).
    """
    from tokenizers import models

    return models.BPE(
        vocab={piece.piece: number for number, piece in enumerate(model.pieces)},
        merges=list(merges(model)),
        unk_token=model.trainer_spec.unk_piece,
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
        ignore_merges=whole_words,
    )


def merges(model: Any) -> Iterator[tuple[str, str]]:
    """Yield all merges of two pieces into one, best piece first."""
    normal = {piece.piece for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED, UNUSED)}
    ranked = sorted((piece for piece in model.pieces if piece.type == NORMAL), key=lambda piece: -piece.score)
    for piece in ranked:
        word = piece.piece
        for cut in range(1, len(word)):
            if word[:cut] in normal and word[cut:] in normal:
                yield word[:cut], word[cut:]


def unigram_model(model: Any) -> Any:
    """Return the unigram language model; symbols that never occur in texts get a score that excludes them."""
    from tokenizers import models

    worst = min((piece.score for piece in model.pieces if piece.type == NORMAL), default=0.0) - 10.0

    def score(piece: Any) -> float:
        if piece.type == USER_DEFINED:
            return 0.0
        return float(piece.score if piece.type == NORMAL else (len(piece.piece) + 1) * worst)

    vocabulary = [(piece.piece, score(piece)) for piece in model.pieces]
    return models.Unigram(vocabulary, model.trainer_spec.unk_id, model.trainer_spec.byte_fallback)


def normalizer(spec: Any) -> Any:
    """Return SentencePiece's normalization: character map, extra spaces, leading space, spaces as ▁."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        mapped = normalizers.Precompiled(spec.precompiled_charsmap)
        steps += [*line_ends(mapped), mapped]
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    if spec.remove_extra_whitespaces:  # only now at the end: SentencePiece removes a ▁ of the text there, too
        trailing = f"[ {SPACE}]+\\z" if spec.escape_whitespaces else r" +\z"
        steps.append(normalizers.Replace(Regex(trailing), ""))
    return normalizers.Sequence(steps)


def line_ends(mapped: Any) -> list[Any]:
    """Return a step that protects CR LF, a single grapheme to the library, from losing its second half in
    `mapped`.
    """
    from tokenizers import normalizers

    one, other, both = (mapped.normalize_str(text) for text in ("\r", "\n", "\r\n"))
    return [normalizers.Replace("\r\n", "\n\n")] if one == other and both != one + other else []


def decoder(spec: Any) -> Any:
    """Return the decoder of pieces to text."""
    from tokenizers import decoders

    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)

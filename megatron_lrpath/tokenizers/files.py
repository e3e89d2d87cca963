"""Write the tokenizer of a run into a Hugging Face folder, from which transformers loads it offline."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_write_json
from megatron_lrpath.reading import required_object, why
from megatron_lrpath.tokenizers import sentencepiece_model
from megatron_lrpath.tokenizers.sentencepiece_model import SENTENCEPIECE

HUGGING_FACE = "HuggingFaceTokenizer"
NO_TOKENIZER = "NullTokenizer"
# Allowed names in a tokenizer's folder; nothing else is copied, especially no code.
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
MODEL_FILE, FAST_FILE, CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
ORIGIN = "megatron_tokenizer_type"  # in tokenizer_config.json: Megatron's type, for the import


@dataclass(frozen=True)
class TokenizerFiles:
    """A run's tokenizer.

    Attributes:
        kind: Megatron's name of its type.
        vocab_size: number of tokens.
        tokens: bos_token_id, eos_token_id and pad_token_id, if they exist.
        path: the model file or folder; None if there is nothing to write (test tokenizers).
        notes: messages for the user about the exported tokenizer.
    """

    kind: str
    vocab_size: int
    tokens: dict[str, int]
    path: Path | None = None
    notes: list[str] = field(default_factory=list)


def find_tokenizer(kind: str, model: str | None, args: Any, vocab_size: int | None) -> TokenizerFiles:
    """Return the tokenizer that a checkpoint was trained with.

    Args:
        kind: Megatron's type of tokenizer.
        model: its file or folder, relative to the working directory.
        args: the checkpoint's stored arguments.
        vocab_size: the number of tokens given by the user, for tokenizers that are not written.

    Raises:
        UserError: it is missing, or its type has no known size.
    """
    if getattr(args, "special_tokens", None):
        raise UserError(
            "the run has --special-tokens in addition to its tokenizer, which cannot be exported: add them to "
            "the tokenizer."
        )
    if kind in SENTENCEPIECE or kind == HUGGING_FACE:
        path = Path(model or "")
        if not model or not path.exists():
            raise UserError(
                f"the tokenizer {model!r} is missing: give its path with --tokenizer, or use the working "
                "directory of the run."
            )
        return sentencepiece_tokenizer(kind, path) if kind in SENTENCEPIECE else hugging_face_tokenizer(path)
    size = vocab_size or getattr(args, "lrpath_vocab_size", None) or getattr(args, "vocab_size", None)
    if not size:
        raise UserError(
            f"a {kind} has no files to export: give the number of its tokens with --vocab-size N."
        )
    note = f"{kind}: no tokenizer files are written; the model takes token ids below {size}."
    end = getattr(args, "null_tokenizer_eod_id", None)
    ends = {"eos_token_id": int(size) - 1 if end is None else int(end)} if kind == NO_TOKENIZER else {}
    return TokenizerFiles(kind, int(size), ends, None, [note])


def sentencepiece_tokenizer(kind: str, path: Path) -> TokenizerFiles:
    """Return a SentencePiece model's size and special tokens."""
    _, model = sentencepiece_model.open_model(path)
    ids = {"bos_token_id": model.bos_id(), "eos_token_id": model.eos_id(), "pad_token_id": model.pad_id()}
    known = {name: number for name, number in ids.items() if number >= 0}
    return TokenizerFiles(kind, model.get_piece_size(), known, path)


def hugging_face_tokenizer(path: Path) -> TokenizerFiles:
    """Return a Hugging Face tokenizer's size and special tokens, without executing code from its folder."""
    tokenizer = load_tokenizer(path)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    known = {name: number for name, number in ids.items() if number is not None}
    return TokenizerFiles(HUGGING_FACE, len(tokenizer), known, path)


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer in a folder, offline and without executing code from it; raise UserError."""
    return open_hugging_face(path, local_files_only=True, trust_remote_code=False)


def open_hugging_face(name: Path | str, option: str = "", **options: Any) -> Any:
    """Load the tokenizer with this name or folder by transformers' AutoTokenizer.

    Raises:
        UserError: transformers cannot load it; the message begins with `option`, if that option named the tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(name), **options)
    except Exception as error:  # with a tokenizer's files transformers can raise any exception
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        place = f"{option} {name}".lstrip()
        raise UserError(f"{place}: transformers cannot load this tokenizer: {reason}") from None


def write_tokenizer(tokenizer: TokenizerFiles, folder: Path, max_positions: int) -> list[str]:
    """Write the files; return notes for the user."""
    if tokenizer.path is None:
        return tokenizer.notes
    if tokenizer.kind == HUGGING_FACE:
        copy_files(tokenizer.path, folder)
        return tokenizer.notes
    return [*tokenizer.notes, *write_sentencepiece(tokenizer, folder, max_positions)]


def copy_files(source: Path, folder: Path) -> None:
    """Copy a Hugging Face tokenizer's files unchanged."""
    found = [source] if source.is_file() else [source / name for name in FILES if (source / name).is_file()]
    for path in found:
        shutil.copyfile(path, folder / path.name)


def chat_template(folder: Path) -> str | None:
    """Return the chat template next to the SentencePiece model of an imported folder; raise UserError."""
    config = required_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if config.get("extra_special_tokens"):  # the template needs them and the model does not have them
        return None
    if (folder / TEMPLATE).is_file():
        try:
            return (folder / TEMPLATE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{folder / TEMPLATE}: cannot be read ({why(error)}).") from None
    template = config.get("chat_template")
    return template if isinstance(template, str) else None


def write_sentencepiece(tokenizer: TokenizerFiles, folder: Path, max_positions: int) -> list[str]:
    """Write the model file, and a `tokenizer.json` with the same ids; return a note if the two differ."""
    path = tokenizer.path
    assert path is not None
    data, processor = sentencepiece_model.open_model(path)
    model = sentencepiece_model.parse_model(data)
    fast = sentencepiece_model.fast_tokenizer(model)
    shutil.copyfile(path, folder / MODEL_FILE)
    fast.save(str(folder / FAST_FILE))
    pieces = {name: model.pieces[number].piece for name, number in tokenizer.tokens.items()}
    special = {name.removesuffix("_id"): piece for name, piece in pieces.items()}
    special["unk_token"] = model.trainer_spec.unk_piece
    atomic_write_json(folder / "special_tokens_map.json", special)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_positions,
        # Symbols as text are text, as in training.
        "split_special_tokens": True,
        ORIGIN: tokenizer.kind,
    }
    if template := chat_template(path.parent):  # it has control tokens as text
        config |= {"chat_template": template, "split_special_tokens": False}
    atomic_write_json(folder / CONFIG, config)
    for text in sentencepiece_model.NASTY:
        if processor.encode(text) != fast.encode(text, add_special_tokens=False).ids:
            return [
                f"tokenizer.json differs from SentencePiece on {text[:60]!r}; the model was trained with "
                "tokenizer.model."
            ]
    return []

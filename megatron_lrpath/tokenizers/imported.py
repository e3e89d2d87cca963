"""The tokenizer of a Hugging Face folder: its copy, and its section in a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_lrpath.console import warn
from megatron_lrpath.errors import UserError
from megatron_lrpath.reading import required_object
from megatron_lrpath.tokenizers.files import (
    CONFIG,
    FAST_FILE,
    HUGGING_FACE,
    MODEL_FILE,
    ORIGIN,
    copy_files,
    load_tokenizer,
)
from megatron_lrpath.tokenizers.sentencepiece_model import NASTY, SENTENCEPIECE, open_model
from megatron_lrpath.wording import listing

FOLDER = "tokenizer"  # in the folder of an imported model


def found_again(model: str | None, root: Path) -> str | None:
    """Return the path of an imported model's tokenizer, recorded as `model`, in the folder `root` where it is now.

    A relative path, or a folder that was moved, leads elsewhere. None if there is no tokenizer.
    """
    folder = root / FOLDER
    if model is None or not folder.is_dir():
        return None
    return str(folder if Path(model).name == FOLDER else folder / Path(model).name)


def import_tokenizer(source: Path, place: Path, target: Path) -> dict[str, str] | None:
    """Copy the tokenizer's files; return a plan's `tokenizer` section, or None if there are no files.

    Args:
        source: the Hugging Face folder.
        place: the folder to write, which is removed if it stays empty.
        target: the final path of that folder.

    Raises:
        UserError: a file cannot be used.
    """
    place.mkdir()
    copy_files(source, place)
    config = required_object(place / CONFIG) if (place / CONFIG).is_file() else {}
    own = config.get(ORIGIN)
    if own and (place / MODEL_FILE).is_file():
        return {"type": str(own), "model": str(target / MODEL_FILE)}
    if (place / MODEL_FILE).is_file():
        if not (place / FAST_FILE).is_file():  # transformers would build one without the model's prefix
            tell_added(config, place)
            return {"type": SENTENCEPIECE[0], "model": str(target / MODEL_FILE)}
        tell_difference(place)
    if any(place.iterdir()):
        return {"type": HUGGING_FACE, "model": str(target)}
    place.rmdir()
    return None


def tell_added(config: dict[str, Any], place: Path) -> None:
    """Warn about tokens that the folder adds to its SentencePiece model, because Megatron does not recognize
    them.

    Raises:
        UserError: the file is not a SentencePiece model.
    """
    _, model = open_model(place / MODEL_FILE)
    paths = [place / "added_tokens.json"] if (place / "added_tokens.json").is_file() else []
    ids = {str(token): number for path in paths for token, number in required_object(path).items()}
    decoder = config.get("added_tokens_decoder")
    for number, token in (decoder if isinstance(decoder, dict) else {}).items():
        if number.isdecimal() and isinstance(token, dict):
            ids[str(token.get("content"))] = int(number)
    size = model.get_piece_size()
    added = [token for token, number in ids.items() if isinstance(number, int) and number >= size]
    if added:
        warn(
            f"{MODEL_FILE} has {size:,} tokens and no tokenizer.json is next to it: in the training "
            f"{listing(added, 5)} will be text like any other."
        )


def tell_difference(place: Path) -> None:
    """Warn if transformers returns other ids than the SentencePiece model next to `tokenizer.json`."""
    try:
        _, model = open_model(place / MODEL_FILE)
    except UserError:  # of another format, in folders with a different file of this name
        return
    tokenizer = load_tokenizer(place)
    for text in NASTY:
        if "<" not in text and tokenizer(text, add_special_tokens=False)["input_ids"] != model.encode(text):
            warn(
                f"transformers gives other ids than {MODEL_FILE} for {text[:60]!r}. The plan names the former; if the "
                f"model was trained with the latter, name it instead: type {SENTENCEPIECE[0]}."
            )
            return

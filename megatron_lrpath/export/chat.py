"""A fine-tuned model's way of talking, in its exported folder: chat template, control tokens, where answers end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_write_json

STORED = "lrpath_chat"  # among the arguments of a fine-tuned checkpoint
OWN_TEMPLATES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class Chat:
    """What a fine-tuning stored: the Jinja template, new control tokens (ids), the token that ends an answer."""

    template: str
    control_tokens: dict[str, int]
    stop_token: int | None

    @property
    def rows(self) -> int:
        """Rows of the embeddings that the control tokens need; 0 where there are no new ones."""
        return max(self.control_tokens.values(), default=-1) + 1


def stored_chat(args: Any) -> Chat | None:
    """The chat of a checkpoint's arguments, None where it was not fine-tuned here."""
    stored = getattr(args, STORED, None)
    if not isinstance(stored, dict):
        return None
    return Chat(str(stored["template"]), dict(stored["control_tokens"]), stored["stop_token"])


def write_chat(chat: Chat, folder: Path) -> list[str]:
    """Complete the tokenizer files in `folder`; notes for the user.

    Control tokens spelled out in a text are control tokens from here on, as chat templates need it.

    Raises:
        UserError: the tokenizer gives the control tokens other ids than the training did.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return ["the chat template is not written, since there are no tokenizer files."]
    add_control_tokens(chat, folder / "tokenizer.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"chat_template": chat.template, "split_special_tokens": False}
    if chat.control_tokens:
        known = config.get("extra_special_tokens", config.get("additional_special_tokens", []))
        names = [*(known if isinstance(known, list) else []), *chat.control_tokens]
        config["extra_special_tokens"] = list(dict.fromkeys(names))
        config.pop("additional_special_tokens", None)
    atomic_write_json(path, config)
    for name in OWN_TEMPLATES:  # transformers would prefer them
        (folder / name).unlink(missing_ok=True)
    notes = [
        "Control tokens spelled out in a text are read as control tokens, as the chat template needs it."
    ]
    if chat.control_tokens:
        notes.append(
            f"New control tokens: {', '.join(chat.control_tokens)} (tokenizer.model does not have them)."
        )
    return notes


def add_control_tokens(chat: Chat, path: Path) -> None:
    """Add the new control tokens to `tokenizer.json`, under the ids that they had in training."""
    from tokenizers import AddedToken, Tokenizer

    if not chat.control_tokens:
        return
    tokenizer = Tokenizer.from_file(str(path))
    words = sorted(chat.control_tokens, key=lambda word: chat.control_tokens[word])
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words])
    got = {word: tokenizer.token_to_id(word) for word in words}
    if got != chat.control_tokens:
        raise UserError(
            f"the tokenizer gives the control tokens the ids {got}, the training had {chat.control_tokens}: is it "
            "another tokenizer (--tokenizer)?"
        )
    tokenizer.save(str(path))

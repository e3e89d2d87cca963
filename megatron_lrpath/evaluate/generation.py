"""Text generation and conversations with an exported model by transformers, with streaming."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError

Message = dict[str, str]


@dataclass(frozen=True)
class Sampling:
    """Sampling settings: `temperature` 0 selects the most likely token, otherwise tokens are drawn with
    `seed`; `max_tokens` is the maximum.
    """

    seed: int
    temperature: float
    max_tokens: int


def require_transformers() -> None:
    """Raise UserError if transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError(
            "text generation needs transformers, which is not installed: pip install transformers"
        )


class Writer:
    """A model in a Hugging Face folder and its tokenizer, on `device` (cpu, cuda)."""

    def __init__(self, folder: Path, device: str) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if not (folder / "tokenizer_config.json").is_file():
            raise UserError(
                f"{folder}: the folder has no tokenizer, so texts cannot be encoded (the model's tokenizer "
                "cannot be exported, "
                "see docs/export.md)."
            )
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        self.folder, self.device = folder, device
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **local)
        self.model = model.to(device).eval()

    @property
    def positions(self) -> int:
        """The maximum number of tokens in prompt and answer together."""
        return int(self.model.config.max_position_embeddings)

    def text(self, prompt: str, sampling: Sampling, say: Callable[[str], None]) -> str:
        """Return the model's continuation of `prompt`; pass the pieces to `say` as they are generated.

        Raises:
            UserError: the prompt is empty, or leaves no position for an answer.
        """
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError("the prompt is empty; give a text to continue.")
        self.require_room(ids)
        return self.written(ids, sampling, say)

    def require_room(self, ids: list[int]) -> None:
        """Raise UserError if a prompt leaves no position for an answer."""
        if len(ids) >= self.positions:
            raise UserError(
                f"the prompt has {len(ids):,} tokens, the model has {self.positions:,} positions for prompt "
                "and "
                "answer; shorten it."
            )

    def written(self, ids: list[int], sampling: Sampling, say: Callable[[str], None]) -> str:
        """Return the model's continuation of the tokens `ids`."""
        import torch

        prompt = torch.tensor([ids], device=self.device)
        drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if sampling.temperature > 0:
            drawn = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0}
        torch.manual_seed(sampling.seed)
        with torch.inference_mode():
            found = self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=min(sampling.max_tokens, self.positions - len(ids)),
                streamer=streamer(self.tokenizer, say),
                **drawn,
            )
        return str(self.tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True))


def streamer(tokenizer: Any, say: Callable[[str], None]) -> Any:
    """Return a streamer for transformers that passes complete pieces of text to `say`."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        """A streamer that passes the text to `say` instead of printing it."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            """Receive each piece from transformers."""
            say(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


@dataclass
class Conversation:
    """A conversation with a fine-tuned model; the oldest messages are dropped if they exceed the model's
    positions.

    `system` is the system message; empty for none.
    """

    writer: Writer
    system: str = ""
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.writer.tokenizer.chat_template:
            raise UserError(
                f"{self.writer.folder}: the model has no chat template, because it was not fine-tuned on "
                "chats; use `lrpath generate` instead."
            )

    def answer(self, said: str, sampling: Sampling, say: Callable[[str], None]) -> str:
        """Return the model's answer, and append it to the conversation.

        Raises:
            UserError: the message alone exceeds the model's positions.
        """
        self.messages.append({"role": "user", "content": said})
        ids = self._ids()
        while len(ids) + sampling.max_tokens > self.writer.positions and len(self.messages) > 2:
            del self.messages[:2]  # a question and its answer
            ids = self._ids()
        try:
            self.writer.require_room(ids)
        except UserError:
            self.messages.pop()
            raise
        text = self.writer.written(ids, sampling, say)
        self.messages.append({"role": "assistant", "content": text})
        return text

    def _ids(self) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        found = self.writer.tokenizer.apply_chat_template(
            [*system, *self.messages], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return list(found["input_ids"])

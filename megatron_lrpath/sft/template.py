"""Convert conversations: a line of chat data to messages, and messages to text by a chat template, with the
answers marked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_lrpath.data.preprocess.worker import Rejected
from megatron_lrpath.errors import UserError
from megatron_lrpath.plan.file.keys import TEMPLATES
from megatron_lrpath.reading import UnreadableError, parse_json, why
from megatron_lrpath.sft.bounds import TooMuchError, bounded

Message = dict[str, str]

ROLES = ("system", "user", "assistant", "tool")
FORMS = "`messages`, `prompt` and `completion`, or `instruction` and `output` (and perhaps `input`)"


def messages_of(line: bytes) -> list[Message]:
    """Return the conversation of a line: messages with `role` and `content`, at least one of them an answer.

    A prompt or an instruction becomes a user's message (an instruction's input follows after an empty
    line), a completion or an output becomes the assistant's.

    Raises:
        Rejected: the line has none of the forms, or has no answer.
    """
    try:
        record = parse_json(line)
    except UnreadableError as error:
        raise Rejected(str(error)) from None
    if not isinstance(record, dict):
        raise Rejected(f"not a JSON object, but {type(record).__name__}")
    messages = [checked(message, number) for number, message in enumerate(conversation(record), start=1)]
    if not messages or messages[-1]["role"] != "assistant":
        raise Rejected("the last message is not the assistant's, so there is no answer to train on")
    return messages


def conversation(record: dict[str, Any]) -> list[Any]:
    """Return the messages of a record in any of the forms."""
    if "messages" in record:
        if not isinstance(record["messages"], list):
            raise Rejected("`messages` is not a list")
        return list(record["messages"])
    if "prompt" in record and "completion" in record:
        return [*side(record["prompt"], "user"), *side(record["completion"], "assistant")]
    if "instruction" in record and "output" in record:
        asked = record["instruction"]
        if record.get("input"):
            if not isinstance(asked, str) or not isinstance(record["input"], str):
                raise Rejected("`instruction` and `input` must be text")
            asked = f"{asked}\n\n{record['input']}"
        return [*side(asked, "user"), *side(record["output"], "assistant")]
    raise Rejected(f"has none of the forms {FORMS}")


def side(value: Any, role: str) -> list[Any]:
    """Return the messages of a prompt or completion, which is text or a list of messages."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def checked(message: Any, number: int) -> Message:
    """Return a message with a known role and non-empty text."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Rejected(f"message {number} is not an object with a `role`")
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise Rejected(f"message {number} has the role {role[:40]!r}; known are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise Rejected(f"message {number} ({role}) has no text as `content`")
    if not content.strip() and role != "system":
        raise Rejected(f"message {number} ({role}) is empty")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise Rejected(f"message {number} ({role}) contains half a surrogate pair") from None
    return {"role": role, "content": content}


Span = tuple[int, int]
SECONDS, MEMORY = 5.0, 1 << 30  # of the rendering of one conversation; bytes in addition to the process's
CHARACTERS = 1 << 26  # of its text
LARGEST = 1 << 20  # characters of a template
TRIAL = ({"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"})
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template in the form of transformers' tokenizers, and the special tokens that it can use
    (`eos_token`, …).
    """

    source: str
    special: Mapping[str, str] = field(default_factory=dict)

    def render(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """Return the text, and the positions (characters) of the answers in it, in order.

        Templates mark answers with `{% generation %}`. Without these marks, an answer is the text that its
        message adds to the preceding text with the generation prompt.

        Raises:
            Rejected: the template refuses the conversation, or changes earlier text later.
        """
        try:
            if not GENERATION.search(self.source):
                return self._compared(messages)
            text, spans = self._render(messages, return_assistant_tokens_mask=True)
            return text, [(int(start), int(end)) for start, end in spans]
        except Rejected:
            raise
        except TooMuchError as error:
            raise Rejected(f"the chat template makes {error} of a conversation") from None
        except Exception as error:  # a template can raise any exception
            raise Rejected(f"the chat template rejects it: {error}") from None

    def _render(self, messages: Sequence[Message], **options: bool) -> tuple[str, list[Any]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        with bounded(SECONDS, MEMORY):
            texts, spans = render_jinja_template(
                [list(messages)], chat_template=self.source, **options, **self.special
            )
        text = str(texts[0])
        if len(text) > CHARACTERS:
            raise TooMuchError(f"more than {CHARACTERS:,} characters")
        return text, spans[0] if spans else []

    def _compared(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked, _ = self._render(messages[:number], add_generation_prompt=True)
            answered, _ = self._render(messages[: number + 1])
            if not answered.startswith(asked):
                raise Rejected(
                    "the chat template does not put an answer after its generation prompt; mark its answers "
                    "with {% generation %} … {% endgeneration %}"
                )
            spans.append((len(asked), len(answered)))
        text, _ = self._render(messages)
        if not text.startswith(answered):
            raise Rejected("the chat template changes earlier messages when later ones follow")
        return text, spans


def load_template(name: str, own: str | None, special: Mapping[str, str]) -> ChatTemplate:
    """Return the template that the plan names; `own` is the tokenizer's, `special` its special tokens by
    name.

    Raises:
        UserError: there is none, or it is not a template.
    """
    if name == "tokenizer":
        if not own:
            raise UserError(
                "sft.chat_template: the tokenizer has no chat template; use another template or a file"
            )
        source = own
    elif name in TEMPLATES:
        source = resources.files("megatron_lrpath.sft").joinpath(f"templates/{name}.jinja").read_text("utf-8")
    else:
        try:
            with Path(name).open(encoding="utf-8") as stream:
                source = stream.read(LARGEST + 1)
        except (OSError, ValueError) as error:
            raise UserError(
                f"sft.chat_template: {name} is none of {', '.join(TEMPLATES)} and cannot be read as a file "
                f"({why(error)})"
            ) from None
    if len(source) > LARGEST:
        raise UserError(
            f"sft.chat_template: {name} has {len(source):,} characters, more than the {LARGEST:,} allowed"
        )
    template = ChatTemplate(source, dict(special))
    try_out(template, name)
    return template


def try_out(template: ChatTemplate, name: str) -> None:
    """Render a small conversation as a check.

    Raises:
        UserError: the template fails, omits the answer, or needs a token that the tokenizer lacks.
    """
    if "eos_token" in template.source and "eos_token" not in template.special:
        raise UserError(
            f"sft.chat_template: {name} ends answers with the tokenizer's eos_token, and this tokenizer has "
            "none; "
            "use another template, such as chatml with special_tokens"
        )
    try:
        text, spans = template.render(TRIAL)
    except Rejected as error:
        raise UserError(f"sft.chat_template: {name}: {error}") from None
    if not spans or "answer" not in text[spans[0][0] : spans[0][1]]:
        raise UserError(f"sft.chat_template: {name} does not reveal the answer in a conversation")

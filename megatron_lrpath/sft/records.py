"""One line of chat or instruction data as messages; what is wrong with a line, in words."""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, str]

ROLES = ("system", "user", "assistant", "tool")
FORMS = "`messages`, `prompt` and `completion`, or `instruction` and `output` (and perhaps `input`)"


class RejectedLineError(Exception):
    """A line that cannot be used; the text is the reason."""


def messages_of(line: bytes) -> list[Message]:
    """The conversation of a line: messages with `role` and `content`, at least one of them an answer.

    A prompt or an instruction is a user's message (an instruction's input follows it after an empty line), a
    completion or an output the assistant's.

    Raises:
        RejectedLineError: the line is none of the forms, or holds nothing to learn.
    """
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        raise RejectedLineError("not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise RejectedLineError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise RejectedLineError(f"not a JSON object, but {type(record).__name__}")
    messages = [checked(message, number) for number, message in enumerate(conversation(record), start=1)]
    if not messages or messages[-1]["role"] != "assistant":
        raise RejectedLineError("the last message is not the assistant's: nothing to learn from it")
    return messages


def conversation(record: dict[str, Any]) -> list[Any]:
    """The messages of a record, whichever of the forms it has."""
    if "messages" in record:
        if not isinstance(record["messages"], list):
            raise RejectedLineError("`messages` is not a list")
        return list(record["messages"])
    if "prompt" in record and "completion" in record:
        return [*side(record["prompt"], "user"), *side(record["completion"], "assistant")]
    if "instruction" in record and "output" in record:
        asked = record["instruction"]
        if record.get("input"):
            if not isinstance(asked, str) or not isinstance(record["input"], str):
                raise RejectedLineError("`instruction` and `input` must be text")
            asked = f"{asked}\n\n{record['input']}"
        return [*side(asked, "user"), *side(record["output"], "assistant")]
    raise RejectedLineError(f"has none of the forms {FORMS}")


def side(value: Any, role: str) -> list[Any]:
    """A prompt or completion: text, or messages already."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def checked(message: Any, number: int) -> Message:
    """A message with a known role and text that is not empty."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RejectedLineError(f"message {number} is no object with a `role`")
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise RejectedLineError(f"message {number} has the role {role[:40]!r}; known are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise RejectedLineError(f"message {number} ({role}) has no text as `content`")
    if not content.strip() and role != "system":
        raise RejectedLineError(f"message {number} ({role}) is empty")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise RejectedLineError(f"message {number} ({role}) holds half a surrogate pair") from None
    return {"role": role, "content": content}

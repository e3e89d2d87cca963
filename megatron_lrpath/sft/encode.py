"""Encode conversations as token ids with a mask of the answers, by the exported model's tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lrpath.data.preprocess.worker import Rejected
from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import Plan
from megatron_lrpath.sft.template import TRIAL, ChatTemplate, Message, Span, load_template
from megatron_lrpath.tokenizers.files import HUGGING_FACE, load_tokenizer
from megatron_lrpath.tokenizers.sentencepiece_model import (
    SENTENCEPIECE,
    fast_tokenizer,
    open_model,
    parse_model,
)


@dataclass(frozen=True)
class Example:
    """One conversation: `tokens` (ids) and `answers` (uint8, 1 for tokens in the loss), of equal length."""

    tokens: npt.NDArray[np.int32]
    answers: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ChatEncoder:
    """A fast tokenizer that recognizes control tokens, and the chat template.

    `added` are the control tokens that the tokenizer lacked, with their ids, which follow the vocabulary.
    """

    tokenizer: Any  # tokenizers.Tokenizer
    template: ChatTemplate
    vocab_size: int
    added: dict[str, int]
    control: tuple[str, ...]

    def encode(self, messages: Sequence[Message]) -> Example:
        """Return the tokens of a conversation.

        Raises:
            Rejected: the template refuses it, or a message contains a control token as text, which the tokenizer would
                convert to that token.
        """
        for number, message in enumerate(messages, start=1):
            spelled = next((token for token in self.control if token in message["content"]), None)
            if spelled:
                raise Rejected(f"message {number} spells out the control token {spelled}")
        text, spans = self.template.render(messages)
        pieces = self._pieces(text, spans)
        tokens = np.concatenate([ids for ids, _ in pieces]).astype(np.int32)
        answers = np.concatenate([mask for _, mask in pieces]).astype(np.uint8)
        return Example(tokens, answers)

    def stop_token(self) -> int | None:
        """Return the control token that ends an answer; None if the template ends it with text."""
        example = self.encode(TRIAL)
        last = int(example.tokens[np.flatnonzero(example.answers)[-1]])
        return last if self.tokenizer.id_to_token(last) in self.control else None

    def _pieces(self, text: str, spans: Sequence[Span]) -> list[tuple[Any, Any]]:
        """Return ids and mask of the text, tokenized as a whole, or in parts if a token would cross the
        border of an answer.

        In use, the model generates an answer after a prompt that was tokenized alone, so a token must not
        contain the end of the prompt and the beginning of the answer.
        """
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        borders = sorted({border for span in spans for border in span})
        crossed = [
            border for border in borders if ((offsets[:, 0] < border) & (border < offsets[:, 1])).any()
        ]
        if not crossed:
            mask = np.zeros(len(offsets), dtype=np.uint8)
            for start, end in spans:
                mask[(offsets[:, 0] >= start) & (offsets[:, 1] <= end)] = 1
            return [(np.array(encoding.ids, dtype=np.int64), mask)]
        pieces = []
        for start, end in zip([0, *crossed], [*crossed, len(text)], strict=True):
            inside = [(max(a, start) - start, min(b, end) - start) for a, b in spans if a < end and b > start]
            if start < end:
                pieces += self._pieces(text[start:end], inside)
        return pieces


def build_encoder(plan: Plan) -> ChatEncoder:
    """Return the encoder of a plan's fine-tuning.

    Raises:
        UserError: the tokenizer or the template cannot be used, or the control tokens do not fit the model.
    """
    assert plan.sft is not None
    tokenizer, named, own = plan_tokenizer(plan)
    vocab_size = int(tokenizer.get_vocab_size(with_added_tokens=True))
    template = load_template(plan.sft.template, own, named)
    added = add_tokens(tokenizer, plan, vocab_size)
    tokenizer.encode_special_tokens = False
    special = tokenizer.get_added_tokens_decoder().values()
    control = tuple(sorted({token.content for token in special if token.special}))
    refuse_unknown(plan, template, control)
    encoder = ChatEncoder(tokenizer, template, vocab_size, added, control)
    example = encoder.encode(TRIAL)
    learned = example.tokens[example.answers == 1].tolist()
    if TRIAL[-1]["content"] not in tokenizer.decode(learned, skip_special_tokens=False):
        raise UserError(
            f"{plan.tokenizer.model}: this tokenizer loses characters or their positions, so that answers "
            "cannot be located; use another tokenizer for fine-tuning"
        )
    return encoder


def plan_tokenizer(plan: Plan) -> tuple[Any, dict[str, str], str | None]:
    """Return the plan's tokenizer as a fast one, its special tokens by name, and its own chat template.

    Raises:
        UserError: it is missing, or cannot be converted to a fast tokenizer.
    """
    kind, model = plan.tokenizer.type, Path(plan.tokenizer.model or "")
    if kind in SENTENCEPIECE:
        if not model.is_file():
            raise UserError(f"{model}: the tokenizer does not exist; train one with tools/train_tokenizer.py")
        parsed = parse_model(open_model(model)[0])
        spec = parsed.trainer_spec
        ids = {f"{name}_token": getattr(spec, f"{name}_id") for name in ("bos", "eos", "pad", "unk")}
        named = {name: parsed.pieces[number].piece for name, number in ids.items() if number >= 0}
        return fast_tokenizer(parsed), named, None
    if kind == HUGGING_FACE:
        loaded = load_tokenizer(model)
        if not getattr(loaded, "is_fast", False):
            raise UserError(f"{model}: has no fast tokenizer (tokenizer.json), which fine-tuning needs")
        named = {name: token for name, token in loaded.special_tokens_map.items() if isinstance(token, str)}
        return loaded.backend_tokenizer, named, getattr(loaded, "chat_template", None)
    raise UserError(
        f"tokenizer.type: fine-tuning needs a SentencePiece or Hugging Face tokenizer, not {kind}"
    )


def add_tokens(tokenizer: Any, plan: Plan, vocab_size: int) -> dict[str, int]:
    """Add the control tokens that the tokenizer lacks; return their ids, which follow the vocabulary in
    order.
    """
    from tokenizers import AddedToken

    assert plan.sft is not None
    wanted = dict.fromkeys(plan.sft.special_tokens)
    missing = [token for token in wanted if tokenizer.token_to_id(token) is None]
    known = [token for token in wanted if token not in missing]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in [*known, *missing]]
    )
    added = {token: int(tokenizer.token_to_id(token)) for token in missing}
    if list(added.values()) != list(range(vocab_size, vocab_size + len(added))):
        raise UserError(
            "sft.special_tokens: the tokenizer's ids have gaps, so that ids of new control tokens would "
            "collide; add the tokens to the tokenizer"
        )
    # Megatron pads the rows of the embeddings, in a run of the plan with `options.from_plan.apply_defaults`.
    multiple = int(plan.megatron.get("make_vocab_size_divisible_by", 128))
    if "make_vocab_size_divisible_by" in plan.megatron:
        multiple *= int(plan.megatron.get("tensor_model_parallel_size", 1))
    room = -vocab_size % multiple
    if len(added) > room:
        raise UserError(
            f"{plan.sft.place}.special_tokens: {len(added)} new control tokens, and the model's embeddings "
            "have "
            f"{room} rows beyond the tokenizer's {vocab_size:,}; use fewer, or a template without control "
            "tokens (plain)"
        )
    return added


def refuse_unknown(plan: Plan, template: ChatTemplate, control: Sequence[str]) -> None:
    """Refuse a template whose control tokens (`<|…|>`) are plain text to the tokenizer.

    Raises:
        UserError: lists the tokens, and what to write.
    """
    assert plan.sft is not None
    text, _ = template.render(TRIAL)
    unknown = sorted(set(re.findall(r"<\|[^<>|\s]+\|>", text)) - set(control))
    if unknown:
        raise UserError(
            f"{plan.sft.place}.chat_template: {', '.join(unknown)} are plain text for the tokenizer; add "
            f"special_tokens: [{', '.join(repr(token) for token in unknown)}], or name another template"
        )

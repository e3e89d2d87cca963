"""Greedy completions of a few prompts by a model in Megatron, at any parallel layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.training import get_args, get_tokenizer
from torch import Tensor

from megatron_lrpath.console import warn
from megatron_lrpath.plan import Plan
from megatron_lrpath.runs.completions import Completion

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 32, 64
MULTIPLE = 128  # the length must be a multiple: kernels and sequence parallelism require it


@dataclass(frozen=True)
class Prompt:
    """A prompt: its text, its tokens, and the domain that it comes from."""

    text: str
    tokens: list[int]
    domain: str = ""


def prompts_of(plan: Plan, validation: Any) -> list[Prompt]:
    """Return the plan's prompts, or else beginnings of validation samples of different domains."""
    args, tokenizer = get_args(), get_tokenizer()
    if args.context_parallel_size > 1:
        warn("with context parallelism the models write no completions; `lrpath generate` shows some.")
        return []
    if not plan.prompts:
        found = (sampled(validation, at, tokenizer) for at in places(validation))
        return [one for one in found if one.tokens]
    most = max(1, args.seq_length // 2)
    made = [Prompt(text, list(tokenizer.tokenize(text)) or [tokenizer.eod]) for text in plan.prompts]
    for one in made:
        if len(one.tokens) > most:
            warn(
                f"prompts: {one.text[:40]!r} … has {len(one.tokens):,} tokens, the model gets the last {most:,}."
            )
    return [Prompt(one.text, one.tokens[-most:]) for one in made]


def places(validation: Any) -> list[int]:
    """Return samples for prompts: the first of each domain, then the second of each domain, and so on."""
    by_domain: dict[str, list[int]] = {}
    for sample in range(len(validation)):
        by_domain.setdefault(validation.domain_of(sample), []).append(sample)
    turns = range(max(map(len, by_domain.values()), default=0))
    found = [held[turn] for turn in turns[:PROMPTS] for held in by_domain.values() if turn < len(held)]
    return found[:PROMPTS]


def sampled(validation: Any, sample: int, tokenizer: Any) -> Prompt:
    """Return the beginning of a sample's longest part of one document, at most half of the sequence.

    A sample may begin inside a document, and inside a word: the first part then begins with its first whole word.
    """
    pieces: list[list[int]] = [[]]
    for token in validation[sample]["tokens"].tolist():
        if token == tokenizer.eod:
            pieces.append([])
        else:
            pieces[-1].append(token)
    pieces[0] = from_whole_word(pieces[0], tokenizer)
    tokens = max(pieces, key=len)[: min(PROMPT_TOKENS, get_args().seq_length // 2)]
    return Prompt(str(tokenizer.detokenize(tokens)), tokens, validation.domain_of(sample))


def from_whole_word(tokens: list[int], tokenizer: Any) -> list[int]:
    """Return the tokens from the first one whose text begins with white space; all if there is none."""
    for at in range(1, len(tokens)):
        # A tokenizer may drop the white space at the beginning of a text, but not inside it.
        before, both = (
            tokenizer.detokenize(tokens[at - 1 : at]),
            tokenizer.detokenize(tokens[at - 1 : at + 1]),
        )
        if both.startswith(before) and both[len(before) :][:1].isspace():
            return tokens[at:]
    return tokens


def complete(model: list[Any], prompts: Sequence[Prompt]) -> list[Completion]:
    """Return the model's completion of each prompt, up to the end of a document; the same on every rank."""
    if not prompts:
        return []
    args, tokenizer = get_args(), get_tokenizer()
    longest = max(len(one.tokens) for one in prompts)
    length = min(args.seq_length, -(-(longest + NEW_TOKENS) // MULTIPLE) * MULTIPLE)
    usual, args.seq_length = args.seq_length, length
    tokens = torch.zeros(len(prompts), length, dtype=torch.long)
    ends = torch.tensor([len(one.tokens) for one in prompts])
    for row, one in enumerate(prompts):
        tokens[row, : len(one.tokens)] = torch.tensor(one.tokens)
    for chunk in model:
        chunk.eval()
    rows = torch.arange(len(prompts))
    for _ in range(min(NEW_TOKENS, length - longest)):
        tokens[rows, ends] = likeliest(model, tokens, ends - 1, tokenizer.vocab_size)
        ends += 1
    args.seq_length = usual
    found = []
    for one, written, end in zip(prompts, tokens.tolist(), ends.tolist(), strict=True):
        new = written[len(one.tokens) : end]
        new = new[: new.index(tokenizer.eod)] if tokenizer.eod in new else new
        # decoded together: a tokenizer may drop a space at a text's beginning
        before, both = (str(tokenizer.detokenize(ids)) for ids in (one.tokens, one.tokens + new))
        text = both.removeprefix(before) if both.startswith(before) else str(tokenizer.detokenize(new))
        found.append(Completion(one.text, text, one.domain))
    return found


@torch.no_grad()
def likeliest(model: list[Any], tokens: Tensor, places: Tensor, vocabulary: int) -> Tensor:
    """Return the most likely token after position `places` of each row of `tokens` [batch, seq]: [batch], on
    all ranks.
    """
    inputs = tokens.cuda()
    positions = torch.arange(tokens.size(1), device=inputs.device).expand_as(inputs)

    def forward_step(_: Any, chunk: Any) -> tuple[Tensor, Any]:
        return chunk(inputs, positions, None), choose

    def choose(logits: Tensor, non_loss_data: bool = True) -> Tensor:
        last = logits[torch.arange(len(places)), places.to(logits.device)]
        whole = gather_from_tensor_model_parallel_region(last)
        return whole[:, :vocabulary].float().argmax(-1)

    several = len(model) > 1  # interleaved stages need as many micro-batches as there are stages
    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[None] * len(model) if several else None,
        model=model,
        num_microbatches=mpu.get_pipeline_model_parallel_world_size() if several else 1,
        seq_length=tokens.size(1),
        micro_batch_size=tokens.size(0),
        forward_only=True,
        collect_non_loss_data=True,
    )
    chosen = found[0] if mpu.is_pipeline_last_stage() else torch.zeros_like(inputs[:, 0])
    torch.distributed.broadcast(
        chosen, mpu.get_pipeline_model_parallel_last_rank(), group=mpu.get_pipeline_model_parallel_group()
    )
    return chosen.cpu()

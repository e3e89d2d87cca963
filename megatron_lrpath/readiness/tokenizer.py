"""Check that a plan's tokenizer exists and made its data, and that its fine-tuning data match it."""

from __future__ import annotations

from pathlib import Path

from megatron_lrpath.data.record import tokenizer_problems
from megatron_lrpath.errors import UserError
from megatron_lrpath.models import USUAL_VOCABULARY
from megatron_lrpath.plan import Plan
from megatron_lrpath.readiness.finding import FAILED, INFO, OK, Finding, attempt
from megatron_lrpath.sft.encode import build_encoder
from megatron_lrpath.sft.prepare import input_prints
from megatron_lrpath.tokenizers.files import hugging_face_tokenizer, sentencepiece_tokenizer
from megatron_lrpath.tokenizers.sentencepiece_model import SENTENCEPIECE


def tokenizer_check(plan: Plan) -> tuple[Finding, int]:
    """Check that the tokenizer loads, and report the number of its tokens."""
    kind, model, size = plan.tokenizer.type, plan.tokenizer.model, plan.tokenizer.vocab_size
    try:
        found = tokens_of(kind, model) or size
    except UserError as error:
        missing = not Path(model or "").exists()
        return Finding("tokenizer", FAILED, str(error), is_missing=missing), size or USUAL_VOCABULARY
    if found is None:
        return Finding("tokenizer", OK, f"{kind}: looked into when a training starts"), USUAL_VOCABULARY
    return Finding("tokenizer", OK, f"{kind}: {found:,} tokens"), found


def tokens_of(kind: str, model: str | None) -> int | None:
    """Return the number of tokens of a tokenizer with files (UserError if it cannot be read), None for other
    types.
    """
    if kind not in (*SENTENCEPIECE, "HuggingFaceTokenizer"):
        return None
    path = Path(model or "")
    if kind in SENTENCEPIECE:
        if not path.is_file():
            raise UserError(f"{path}: there is no such file; train one with tools/train_tokenizer.py")
        return sentencepiece_tokenizer(kind, path).vocab_size
    # A name that is not a path is one of the hub, resolved by transformers when the training starts.
    return hugging_face_tokenizer(path).vocab_size if path.exists() else None


def made_checks(plan: Plan) -> list[Finding]:
    """Check that the plan's tokenizer is the one that made the available data."""
    name, found = "tokenizer of the data", tokenizer_problems(plan)
    checks = [Finding(name, FAILED, problem) for problem in found.problems]
    checks += [Finding(name, INFO, note) for note in found.notes]
    return checks or [Finding(name, OK, "the plan's, as far as the data are there")]


def chat_checks(plan: Plan) -> list[Finding]:
    """Check that the fine-tuning data exist and their template fits the tokenizer; no finding without a
    section.
    """
    sft = plan.sft
    if sft is None:
        return []

    def ready() -> str:
        build_encoder(plan)
        record = plan.prepared_record()
        if record is not None:
            train = record["train"]
            return f"prepared: {train['examples']:,} examples, {train['samples']:,} packed samples an epoch"
        return f"{len(input_prints(sft))} files, not prepared yet; the template {sft.template} fits the tokenizer"

    there = all(Path(name).exists() for name in (*sft.data, *filter(None, [plan.tokenizer.model])))
    return [attempt("fine-tuning", ready, missing=not there)]

"""A plan: its file, tokenizer and data, and the disk and memory that its runs take."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from megatron_lrpath.doctor.machine import (
    FAILED,
    INFO,
    OK,
    WARNING,
    Check,
    attempt,
    disk_check,
    gigabytes,
    gpu_list,
)
from megatron_lrpath.errors import UserError
from megatron_lrpath.launch.resources import model_parallel_size
from megatron_lrpath.models import parameter_count, resolve_model
from megatron_lrpath.plan import PARADIGMS, Plan, Run, load_plan

SENTENCEPIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
USUAL_VOCABULARY = 100_000  # where the tokenizer does not say


def plan_checks(path: Path) -> list[Check]:
    """Every check of a plan; a plan that cannot be loaded is the only one."""
    try:
        plan = load_plan(path)
        runs = sum(1 for paradigm in PARADIGMS for run in plan.runs(paradigm) if run.same_as is None)
    except UserError as error:
        return [Check("plan", FAILED, str(error))]
    said = Check("plan", OK, f"{plan.name}: {len(plan.versions)} versions, {runs} runs")
    tokenizer, vocabulary = tokenizer_check(plan)
    memory, disk = memory_check(plan, vocabulary), plan_disk_check(plan, vocabulary)
    return [said, tokenizer, *data_checks(plan), *chat_checks(plan), memory, disk]


def tokenizer_check(plan: Plan) -> tuple[Check, int]:
    """Whether the tokenizer loads, and the number of its tokens."""
    kind, model, size = plan.tokenizer.type, plan.tokenizer.model, plan.tokenizer.vocab_size
    try:
        found = tokens_of(kind, model) or size
    except UserError as error:
        return Check("tokenizer", FAILED, str(error)), size or USUAL_VOCABULARY
    if found is None:
        return Check("tokenizer", INFO, f"{kind}: not looked into"), USUAL_VOCABULARY
    return Check("tokenizer", OK, f"{kind}: {found:,} tokens"), found


def tokens_of(kind: str, model: str | None) -> int | None:
    """The number of tokens of a tokenizer with files, None for other types.

    Raises:
        UserError: the files are missing or not a tokenizer's.
    """
    from megatron_lrpath.tokenizers.files import hugging_face_tokenizer, sentencepiece_tokenizer

    if kind not in (*SENTENCEPIECE, "HuggingFaceTokenizer"):
        return None
    path = Path(model or "")
    if kind in SENTENCEPIECE:
        if not path.is_file():
            raise UserError(f"{path}: there is no such file; train one with tools/train_tokenizer.py")
        return sentencepiece_tokenizer(kind, path).vocab_size
    # A name that is not a path is one of the hub, resolved by transformers when the training starts.
    return hugging_face_tokenizer(path).vocab_size if path.exists() else None


def data_checks(plan: Plan) -> list[Check]:
    """Whether the slices are whole, their sources unchanged, disjoint, and long enough for their steps."""
    from megatron_lrpath.data.slice import open_slices, require_samples

    names = [version.name for version in plan.versions]
    try:
        slices = open_slices(plan.data, names)
    except UserError as error:
        return [Check("data", FAILED, str(error))]
    words = (
        f"{len(slices)} slices with {sum(one.tokens for one in slices):,} tokens, disjoint, sources unchanged"
    )
    checks = [Check("data", OK, words)]
    for one, version in zip(slices, plan.versions, strict=True):
        samples = version.steps * plan.batch.global_batch_size

        def enough(one: object = one, samples: int = samples) -> str:
            require_samples(one, samples, plan.batch.seq_length)  # type: ignore[arg-type]
            return f"{samples:,} samples of {plan.batch.seq_length:,} tokens are there"

        checks.append(attempt(f"tokens of {version.name}", enough))
    return checks + mix_checks(plan)


def mix_checks(plan: Plan) -> list[Check]:
    """Whether the slices of every branch's mix are there and long enough."""
    from megatron_lrpath.data.slice_check import check_mixes

    def enough(run: Run) -> str:
        check_mixes(plan, [run])
        return "its slices are there, long enough, and apart from the validation set"

    mixed = [run for run in plan.runs("ours") if run.mix is not None]
    return [attempt(f"mix of {run.name}", partial(enough, run)) for run in mixed]


def chat_checks(plan: Plan) -> list[Check]:
    """Whether the fine-tuning's data are there and its template fits the tokenizer; nothing without a section."""
    sft = plan.sft
    if sft is None:
        return []

    def ready() -> str:
        from megatron_lrpath.plan.sft import prepared_record
        from megatron_lrpath.sft.encode import build_encoder
        from megatron_lrpath.sft.prepare import input_prints

        build_encoder(plan)
        record = prepared_record(plan)
        if record is not None:
            train = record["train"]
            return f"prepared: {train['examples']:,} examples, {train['samples']:,} packed samples an epoch"
        return f"{len(input_prints(sft))} files, not prepared yet; the template {sft.template} fits the tokenizer"

    return [attempt("fine-tuning", ready)]


def memory_check(plan: Plan, vocabulary: int) -> Check:
    """What one GPU has to hold, roughly, against what it has.

    Weights, gradients and Adam's state as Megatron keeps them with its distributed optimizer (bf16: 6 bytes a
    parameter on every GPU and 12 shared among the data-parallel ones, counted here as one; fp32: 16), and the
    activations of a micro-batch with an attention that keeps no s×s matrix (34·s·b·h bytes a layer in bf16,
    Korthikanti
    et al., arXiv 2205.05198), and the logits in fp32.
    """
    import torch

    model = resolve_model(plan.model)
    try:
        parameters = parameter_count(model, vocabulary)
    except UserError as error:
        return Check("memory", INFO, str(error))
    small = bool(plan.megatron.get("bf16") or plan.megatron.get("fp16"))
    parts = model_parallel_size({**model, **plan.megatron})
    tokens = plan.batch.seq_length * plan.batch.micro_batch_size
    layers = int(model["num_layers"]) * int(model["hidden_size"]) * tokens * (34 if small else 60)
    logits = tokens * vocabulary * (4 + 4 + (2 if small else 0))
    if plan.megatron.get("recompute_granularity") == "full":
        layers = int(model["num_layers"]) * int(model["hidden_size"]) * tokens * (2 if small else 4)
    needed = (parameters * (18 if small else 16) + layers + logits) / parts
    found = f"{parameters / 1e6:,.1f}M parameters; a GPU alone would hold about {gigabytes(needed)}"
    gpus = gpu_list(torch)
    least = min((memory for _, memory in gpus), default=None)
    if least is None or needed < 0.9 * least:
        return Check("memory", OK if gpus else INFO, found)
    advice = (
        "Data parallelism shares the optimizer's part; else a smaller micro_batch_size or tensor parallelism."
    )
    return Check("memory", WARNING, f"{found}, it has {gigabytes(least)}", advice)


def plan_disk_check(plan: Plan, vocabulary: int) -> Check:
    """Free space for the checkpoints of all runs that are not trained yet."""
    from dataclasses import replace

    from megatron_lrpath.launch.preflight import checkpoint_bytes
    from megatron_lrpath.runs.results import is_complete

    runs = [run for paradigm in PARADIGMS for run in plan.runs(paradigm) if run.same_as is None]
    sized = replace(plan, tokenizer=replace(plan.tokenizer, vocab_size=vocabulary))
    needed = sum(checkpoint_bytes(sized, run) for run in runs if not is_complete(plan.folder(run), run))
    return disk_check(Path(plan.output), needed)

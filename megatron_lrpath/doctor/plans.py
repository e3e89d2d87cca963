"""A plan: its file, tokenizer and data, and the disk and memory that its runs take."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_lrpath.data.record import tokenizer_problems
from megatron_lrpath.data.slice import check_mixes, open_slices, require_samples
from megatron_lrpath.doctor.machine import (
    FAILED,
    INFO,
    OK,
    WARNING,
    Finding,
    attempt,
    disk_check,
    gpu_list,
)
from megatron_lrpath.errors import UserError
from megatron_lrpath.launch.preflight import checkpoint_bytes
from megatron_lrpath.launch.resources import model_parallel_size
from megatron_lrpath.models import parameter_count, resolve_model
from megatron_lrpath.paradigms import OURS
from megatron_lrpath.plan import PARADIGMS, Plan, load_plan
from megatron_lrpath.plan.optimizers import OF_MEGATRON, missing_package
from megatron_lrpath.runs.results import is_complete
from megatron_lrpath.sft.encode import build_encoder
from megatron_lrpath.sft.prepare import input_prints
from megatron_lrpath.tokenizers.files import hugging_face_tokenizer, sentencepiece_tokenizer
from megatron_lrpath.tokenizers.sentencepiece_model import SENTENCEPIECE
from megatron_lrpath.wording import byte_size

USUAL_VOCABULARY = 100_000  # where the tokenizer does not say


def plan_checks(path: Path) -> list[Finding]:
    """Every check of a plan; a plan that cannot be loaded is the only one."""
    try:
        plan = load_plan(path)
        runs = [run for paradigm in PARADIGMS for run in plan.runs(paradigm) if run.same_as is None]
    except UserError as error:
        return [Finding("plan", FAILED, str(error))]
    loaded = Finding("plan", OK, f"{plan.name}: {len(plan.versions)} versions, {len(runs)} runs")
    tokenizer, vocabulary = tokenizer_check(plan)
    sized = replace(plan, tokenizer=replace(plan.tokenizer, vocab_size=vocabulary))
    left = (run for run in runs if not is_complete(plan.folder(run), run))
    disk = disk_check(Path(plan.output), sum(checkpoint_bytes(sized, run) for run in left))
    memory = memory_check(plan, vocabulary)
    data = [*data_checks(plan), made_check(plan), *chat_checks(plan)]
    return [loaded, *optimizer_check(plan), tokenizer, *data, memory, disk]


def optimizer_check(plan: Plan) -> list[Finding]:
    """Whether the package is there from which the optimizers of the plan come; nothing where none does."""
    parts = [plan.megatron, *([plan.sft_megatron] if plan.sft else [])]
    chosen = {str(part.get("optimizer", "adam")) for part in parts} - OF_MEGATRON
    missing = [text for name in sorted(chosen) if (text := missing_package(name))]
    if not chosen:
        return []
    return [Finding("optimizer", FAILED if missing else OK, " ".join(missing) or ", ".join(sorted(chosen)))]


def tokenizer_check(plan: Plan) -> tuple[Finding, int]:
    """Whether the tokenizer loads, and the number of its tokens."""
    kind, model, size = plan.tokenizer.type, plan.tokenizer.model, plan.tokenizer.vocab_size
    try:
        found = tokens_of(kind, model) or size
    except UserError as error:
        return Finding("tokenizer", FAILED, str(error)), size or USUAL_VOCABULARY
    if found is None:
        return Finding("tokenizer", INFO, f"{kind}: not looked into"), USUAL_VOCABULARY
    return Finding("tokenizer", OK, f"{kind}: {found:,} tokens"), found


def tokens_of(kind: str, model: str | None) -> int | None:
    """The number of tokens of a tokenizer with files (UserError where it has none), None for other types."""
    if kind not in (*SENTENCEPIECE, "HuggingFaceTokenizer"):
        return None
    path = Path(model or "")
    if kind in SENTENCEPIECE:
        if not path.is_file():
            raise UserError(f"{path}: there is no such file; train one with tools/train_tokenizer.py")
        return sentencepiece_tokenizer(kind, path).vocab_size
    # A name that is not a path is one of the hub, resolved by transformers when the training starts.
    return hugging_face_tokenizer(path).vocab_size if path.exists() else None


def data_checks(plan: Plan) -> list[Finding]:
    """Whether the slices, a mix's too, are whole, their sources unchanged, disjoint, and long enough."""
    names = [version.name for version in plan.versions]
    try:
        slices = open_slices(plan.data, names)
    except UserError as error:
        return [Finding("data", FAILED, str(error))]
    tokens = sum(part.tokens for part in slices)
    found = f"{len(slices)} slices with {tokens:,} tokens, disjoint, sources unchanged"
    checks = [Finding("data", OK, found)]
    for part, version in zip(slices, plan.versions, strict=True):
        samples, length = version.steps * plan.batch.global_batch_size, plan.batch.seq_length
        there = f"{samples:,} samples of {length:,} tokens are there"
        enough = partial(require_samples, part, samples, length)
        checks.append(attempt(f"tokens of {version.name}", enough, there))
    apart = "its slices are there, long enough, and apart from the validation set"
    mixed = [run for run in plan.runs(OURS.name) if run.mix is not None]
    return checks + [attempt(f"mix of {run.name}", partial(check_mixes, plan, [run]), apart) for run in mixed]


def made_check(plan: Plan) -> Finding:
    """Whether the plan's tokenizer is the one that made its data."""
    name, found = "tokenizer of the data", tokenizer_problems(plan)
    if found.problems:
        return Finding(name, FAILED, "\n".join(found.problems))
    if found.notes:
        return Finding(name, INFO, "\n".join(found.notes))
    return Finding(name, OK, "the plan's, as far as the data are there")


def chat_checks(plan: Plan) -> list[Finding]:
    """Whether the fine-tuning's data are there and its template fits the tokenizer; nothing without a section."""
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

    return [attempt("fine-tuning", ready)]


def memory_check(plan: Plan, vocabulary: int) -> Finding:
    """What one GPU has to hold, roughly, against what it has.

    Weights, gradients and Adam's state as Megatron keeps them with its distributed optimizer (bf16: 6 bytes a
    parameter on every GPU and 12 shared among the data-parallel ones, counted here as one; fp32: 16), and the
    activations of a micro-batch with an attention that keeps no s×s matrix (34·s·b·h bytes a layer in
    bf16, Korthikanti et al., arXiv 2205.05198), and the logits in fp32.
    """
    model = resolve_model(plan.model)
    try:
        parameters = parameter_count(model, vocabulary)
    except UserError as error:
        return Finding("memory", INFO, str(error))
    small = bool(plan.megatron.get("bf16") or plan.megatron.get("fp16"))
    parts = model_parallel_size({**model, **plan.megatron})
    tokens = plan.batch.seq_length * plan.batch.micro_batch_size
    whole = plan.megatron.get("recompute_granularity") == "full"
    kept = (2 if whole else 34) if small else (4 if whole else 60)
    layers = int(model["num_layers"]) * int(model["hidden_size"]) * tokens * kept
    logits = tokens * vocabulary * (4 + 4 + (2 if small else 0))
    needed = (parameters * (18 if small else 16) + layers + logits) / parts
    found = f"{parameters / 1e6:,.1f}M parameters; a GPU alone would hold about {byte_size(needed)}"
    gpus = gpu_list()
    least = min((memory for _, memory in gpus), default=None)
    if least is None or needed < 0.9 * least:
        return Finding("memory", OK if gpus else INFO, found)
    advice = (
        "Data parallelism shares the optimizer's part; else a smaller micro_batch_size or tensor parallelism."
    )
    return Finding("memory", WARNING, f"{found}, it has {byte_size(least)}", advice)

"""Whether a plan's tokenizer and data are there and are enough for what is left to train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from megatron_lrpath.data.slice import (
    Slice,
    check_disjoint,
    check_mixes,
    mix_path,
    open_mix,
    require_samples,
    slice_path,
    source_problems,
    validation_path,
)
from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.readiness.finding import FAILED, INFO, OK, WARNING, Finding, attempt
from megatron_lrpath.sft.encode import build_encoder
from megatron_lrpath.sft.prepare import input_prints
from megatron_lrpath.tokenizers.files import hugging_face_tokenizer, sentencepiece_tokenizer
from megatron_lrpath.tokenizers.sentencepiece_model import SENTENCEPIECE
from megatron_lrpath.wording import listing

USUAL_VOCABULARY = 100_000  # where the tokenizer does not say
LARGE_INDEX = 256 * 2**20  # bytes of an .idx that is not read whole before the start
DRAW = "Draw it with tools/slice_versions.py, or say where the data are (`data` in the plan, submit's --data)."


@dataclass
class OpenedData:
    """The slices of the versions that could be opened, by name, and a finding for each check."""

    slices: dict[str, Slice] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def tokenizer_checks(plan: Plan) -> tuple[list[Finding], int]:
    """Everything about the tokenizer, and the number of its tokens."""
    kind, model, size = plan.tokenizer.type, plan.tokenizer.model, plan.tokenizer.vocab_size
    try:
        found = tokens_of(kind, model) or size
    except UserError as error:
        missing = not Path(model or "").exists()
        return [Finding("tokenizer", FAILED, str(error), is_missing=missing)], size or USUAL_VOCABULARY
    if found is None:
        return [Finding("tokenizer", INFO, f"{kind}: not looked into")], USUAL_VOCABULARY
    return [Finding("tokenizer", OK, f"{kind}: {found:,} tokens")], found


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


def data_checks(plan: Plan, todo: Sequence[Run], evaluate: bool = True) -> OpenedData:
    """Whether the slices are whole, their sources unchanged, disjoint, and long enough for the runs `todo`.

    With `evaluate` the versions are evaluated at the end, so there must be something to evaluate them on.
    """
    opened = OpenedData()
    runs = [run for run in todo if not run.is_sft]
    needed = [version.name for version in plan.versions[: max((run.version_index for run in runs), default=0)]]
    missing = []
    for version in plan.versions:  # those that nothing needs any more still tell what was trained on
        path = slice_path(plan.data.slices, version.name)
        if path.exists():
            opened.findings += open_slice(path, version.name, opened)
        elif version.name in needed:
            missing.append(str(path))
    if missing:
        opened.findings.append(Finding("data", FAILED, f"no slice {listing(missing)}", DRAW, is_missing=True))
    if not runs:
        return opened
    found, validation = validation_checks(plan, evaluate)
    used = [opened.slices[name] for name in needed if name in opened.slices]
    opened.findings += found + source_checks(used, validation) + token_checks(plan, used)
    opened.findings += [mix_check(plan, run) for run in runs if run.mix is not None]
    return opened


def open_slice(path: Path, name: str, opened: OpenedData) -> list[Finding]:
    """Open a version's slice; what keeps it from being opened."""
    try:
        opened.slices[name] = Slice.load(path)
    except UserError as error:
        return [Finding("data", FAILED, str(error))]
    return []


def validation_checks(plan: Plan, evaluate: bool) -> tuple[list[Finding], list[Slice]]:
    """What is to be said of the validation slice, and the slice where it could be opened."""
    path = validation_path(plan.data)
    if not path.exists():
        found = f"no slice {path}, which the versions are evaluated on"
        missing = Finding("validation", FAILED, found, DRAW, is_missing=True)
        return ([missing] if plan.data.valid or evaluate else []), []
    try:
        held_out = Slice.load(path)
    except UserError as error:
        return [Finding("validation", FAILED, str(error))], []
    if not any(source.tokens > 1 for source in held_out.sources):
        found = f"{path} holds nothing to predict ({held_out.tokens:,} tokens)"
        return [Finding("validation", FAILED, found, "Draw it with more text.")], [held_out]
    status, advice = OK, ""
    if held_out.tokens <= plan.batch.seq_length:
        status, advice = WARNING, "Less than a sample: perplexities will say little; draw more text."
    return [Finding("validation", status, f"{held_out.tokens:,} tokens in {path}", advice)], [held_out]


def source_checks(used: Sequence[Slice], validation: Sequence[Slice]) -> list[Finding]:
    """Whether the datasets of the slices are unchanged, and no document is in two slices."""
    everything = [*used, *validation]
    if not everything:
        return []
    checks = [
        Finding("data", FAILED, problem.text, is_missing=problem.is_missing)
        for problem in source_problems(everything, LARGE_INDEX)
    ]
    tokens = sum(part.tokens for part in used)
    found = f"{len(used)} slices with {tokens:,} tokens, disjoint, sources unchanged"
    apart = attempt("data", partial(check_disjoint, everything), found)
    return checks if checks and apart.status == OK else [*checks, apart]


def token_checks(plan: Plan, used: Sequence[Slice]) -> list[Finding]:
    """Whether each version has the tokens that its steps need."""
    steps, length = {version.name: version.steps for version in plan.versions}, plan.batch.seq_length
    checks = []
    for part in used:
        samples = steps[part.name] * plan.batch.global_batch_size
        there = f"{samples:,} samples of {length:,} tokens are there"
        enough = partial(require_samples, part, samples, length)
        checks.append(attempt(f"tokens of {part.name}", enough, there))
    return checks


def mix_check(plan: Plan, run: Run) -> Finding:
    """Whether what a branch reads beside the main path's samples is there, unchanged and long enough."""
    mix = run.mix
    assert mix is not None
    name = f"mix of {run.name}"

    def proof() -> str:
        slices = open_mix(plan.data, mix, verify=False)
        if problems := source_problems(slices, LARGE_INDEX):
            raise UserError("; ".join(problem.text for problem in problems))
        check_mixes(plan, [run])
        return "its slices are there, long enough, and apart from the validation set"

    there = all(mix_path(plan.data, part).exists() for part in mix.parts)
    return attempt(name, proof, missing=not there)


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

    there = all(Path(name).exists() for name in (*sft.data, *filter(None, [plan.tokenizer.model])))
    return [attempt("fine-tuning", ready, missing=not there)]

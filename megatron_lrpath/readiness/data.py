"""Check a plan's data before the start: complete, unchanged slices, long enough for the remaining steps;
their tokenizer; the data of its fine-tuning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from megatron_lrpath.data.record import tokenizer_problems
from megatron_lrpath.data.slice import (
    Slice,
    check_disjoint,
    check_mixes,
    mix_path,
    open_mix,
    require_samples,
    slice_path,
    source_problems,
    validation_paths,
)
from megatron_lrpath.errors import UserError
from megatron_lrpath.models import USUAL_VOCABULARY
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.readiness.finding import FAILED, INFO, OK, WARNING, Finding, attempt
from megatron_lrpath.runs.results import lies_elsewhere
from megatron_lrpath.sft.encode import build_encoder
from megatron_lrpath.sft.prepare import input_prints
from megatron_lrpath.tokenizers.files import hugging_face_tokenizer, sentencepiece_tokenizer
from megatron_lrpath.tokenizers.sentencepiece_model import SENTENCEPIECE
from megatron_lrpath.wording import listing

DATA = "data"  # the name of the findings about slices and their sources
LARGE_INDEX = 256 * 2**20  # bytes of an .idx above which it is not completely read before the start
DRAW = (
    "Draw it with tools/slice_versions.py, or say where the data are (`data` in the plan, submit's --data)."
)


@dataclass
class OpenedData:
    """The opened slices of the versions, by name, and a finding for each check.

    `known` are the fingerprints of the datasets that have been read, also for other plans.
    """

    slices: dict[str, Slice] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    known: dict[Path, str] = field(default_factory=dict)


def data_checks(
    plan: Plan,
    todo: Sequence[Run],
    evaluate: bool = True,
    renamed: Mapping[str, str] | None = None,
    known: dict[Path, str] | None = None,
) -> OpenedData:
    """Check that slices are complete and disjoint, sources unchanged, and tokens enough for the runs `todo`.

    Args:
        plan: the plan.
        todo: the remaining trainings.
        evaluate: whether the versions are evaluated at the end, which needs validation data.
        renamed: the old names of versions that were trained under another name.
        known: see `OpenedData`.
    """
    opened = OpenedData(known={} if known is None else known)
    runs = [run for run in todo if not run.is_sft]
    count = max((run.version_index for run in runs), default=0)
    needed = [version.name for version in plan.versions[:count]]
    missing = []
    for version in plan.versions:  # a version that no run needs any more has earlier data
        path = slice_path(plan.data.slices, version.name)
        if path.exists():
            opened.findings += open_slice(path, version.name, opened)
        elif version.name in needed and version.name not in (renamed or {}):
            missing.append(path)
    opened.findings += missing_checks(plan, missing)
    if not runs:
        return opened
    found, validation = validation_checks(plan, evaluate)
    used = [opened.slices[name] for name in needed if name in opened.slices]
    opened.findings += found + source_checks(used, validation, opened.known) + token_checks(plan, used)
    opened.findings += [mix_check(plan, run, opened.known) for run in runs if run.mix is not None]
    if any(finding.name == DATA and finding.status == FAILED for finding in opened.findings):
        opened.findings = [one for one in opened.findings if one.name != DATA or one.status != OK]
    return opened


def open_slice(path: Path, name: str, opened: OpenedData) -> list[Finding]:
    """Open a version's slice; return a failed finding if that is impossible."""
    try:
        opened.slices[name] = Slice.load(path)
    except UserError as error:
        return [Finding(DATA, FAILED, str(error))]
    return []


def missing_checks(plan: Plan, missing: Sequence[Path]) -> list[Finding]:
    """Return a failed finding with the missing slices, if there are any."""
    if not missing:
        return []
    names = [str(path) for path in missing]
    advice = lies_elsewhere(plan.path, plan.data.slices) or DRAW
    return [Finding(DATA, FAILED, f"no slice {listing(names)}", advice, is_missing=True)]


def validation_checks(plan: Plan, evaluate: bool) -> tuple[list[Finding], list[Slice]]:
    """Return the findings on the validation slices, and the slices that could be opened."""
    findings: list[Finding] = []
    opened: list[Slice] = []
    for path in validation_paths(plan.data):
        if not path.exists():
            found = f"no slice {path}, which the versions are evaluated on"
            advice = lies_elsewhere(plan.path, plan.data.valid or plan.data.slices) or DRAW
            missing = Finding("validation", FAILED, found, advice, is_missing=True)
            findings += [missing] if plan.data.valid or evaluate else []
            continue
        try:
            opened.append(Slice.load(path))
        except UserError as error:
            findings.append(Finding("validation", FAILED, str(error)))
            continue
        findings.append(validation_check(plan, path, opened[-1]))
    return findings, opened


def validation_check(plan: Plan, path: Path, held_out: Slice) -> Finding:
    """Check that a validation slice is long enough for a meaningful perplexity."""
    if not any(source.tokens > 1 for source in held_out.sources):
        found = f"{path} holds nothing to predict ({held_out.tokens:,} tokens)"
        return Finding("validation", FAILED, found, "Draw it with more text.")
    status, advice = OK, ""
    if held_out.tokens <= plan.batch.seq_length:
        status, advice = WARNING, "Less than a sample: perplexities will say little; draw more text."
    return Finding("validation", status, f"{held_out.tokens:,} tokens in {path}", advice)


def source_checks(
    used: Sequence[Slice], validation: Sequence[Slice], known: dict[Path, str]
) -> list[Finding]:
    """Check that the datasets of the slices are unchanged, and that no document is in two slices."""
    everything = [*used, *validation]
    if not everything:
        return []
    checks = [
        Finding(DATA, FAILED, problem.text, is_missing=problem.is_missing)
        for problem in source_problems(everything, LARGE_INDEX, known)
    ]
    tokens = sum(part.tokens for part in used)
    found = f"{len(used)} slices with {tokens:,} tokens, disjoint, sources unchanged"
    apart = attempt(DATA, partial(check_disjoint, everything), found)
    return [*checks, apart]


def token_checks(plan: Plan, used: Sequence[Slice]) -> list[Finding]:
    """Check that each version has the tokens that its steps need."""
    length = plan.batch.seq_length
    needed = {version.name: plan.samples_of(index) for index, version in enumerate(plan.versions)}
    checks = []
    for part in used:
        samples = needed[part.name]
        there = f"{samples:,} samples of {length:,} tokens are there"
        enough = partial(require_samples, part, samples, length)
        checks.append(attempt(f"tokens of {part.name}", enough, there))
    return checks


def mix_check(plan: Plan, run: Run, known: dict[Path, str]) -> Finding:
    """Check that the data of a branch's mix exist, are unchanged and long enough."""
    mix = run.mix
    assert mix is not None

    def proof() -> str:
        slices = open_mix(plan.data, mix, verify=False)
        if problems := source_problems(slices, LARGE_INDEX, known):
            raise UserError("; ".join(problem.text for problem in problems))
        check_mixes(plan, [run])
        return "its slices exist, are long enough, and are disjoint from the validation set"

    there = all(mix_path(plan.data, part).exists() for part in mix.parts)
    return attempt(f"mix of {run.name}", proof, missing=not there)


def tokenizer_check(plan: Plan) -> tuple[Finding, int]:
    """Check that the tokenizer loads, and report the number of its tokens."""
    kind, model, size = plan.tokenizer.type, plan.tokenizer.model, plan.tokenizer.vocab_size
    try:
        own = tokens_of(kind, model)
    except UserError as error:
        missing = not Path(model or "").exists()
        return Finding("tokenizer", FAILED, str(error), is_missing=missing), size or USUAL_VOCABULARY
    if own is not None and size not in (None, own):
        text = f"{model} has {own:,} tokens; vocab_size {size:,} of the plan is not used"
        return Finding("tokenizer", WARNING, text), own
    found = own or size
    if found is None:
        return Finding("tokenizer", OK, f"{kind}: looked into when a training starts"), USUAL_VOCABULARY
    return Finding("tokenizer", OK, f"{kind}: {found:,} tokens"), found


def with_vocabulary(plan: Plan) -> Plan:
    """Return the plan with its tokenizer's number of tokens (assumed if unknown), for predictions of sizes.

    It must not be trained: the number is part of a run's identity only if the plan's file has it.
    """
    return replace(plan, tokenizer=replace(plan.tokenizer, vocab_size=tokenizer_check(plan)[1]))


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
    # A name that is not a path is a name on the hub, resolved by transformers when the training starts.
    return hugging_face_tokenizer(path).vocab_size if path.exists() else None


def made_checks(plan: Plan) -> list[Finding]:
    """Check that the available data were made with the plan's tokenizer."""
    name, found = "tokenizer of the data", tokenizer_problems(plan)
    checks = [Finding(name, FAILED, problem) for problem in found.problems]
    checks += [Finding(name, INFO, note) for note in found.notes]
    return checks or [Finding(name, OK, "the plan's, for the data that exist")]


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

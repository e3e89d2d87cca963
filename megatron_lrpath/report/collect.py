"""Read the folders of a plan's runs, and list what is missing; nothing is filled in."""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lrpath.paradigms import PARADIGMS
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.runs.folder import RunFolder, inspect, read_json_object
from megatron_lrpath.runs.history import History, read_history
from megatron_lrpath.runs.lineage import changes as run_changes
from megatron_lrpath.runs.lineage import trained_tokens
from megatron_lrpath.runs.results import is_fresh, nothing_there
from megatron_lrpath.runs.state import RunState, read_state
from megatron_lrpath.runs.tasks import named_paradigms
from megatron_lrpath.sealed import json_digest
from megatron_lrpath.wording import listing, plural


@dataclass(frozen=True)
class Score:
    """One model on some text: mean loss in nats per token, its exponential, and the number of tokens."""

    loss: float
    perplexity: float
    tokens: int


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of the model of step `step` on the whole validation set and on each domain.

    `sets` are evaluations on the validation sets of later deliveries, of a whole set under "". `answers` are
    the held-out answers of a fine-tuning; `digest` is that of the file's content.
    """

    step: int
    score: Score
    digest: str
    domains: dict[str, Score]
    answers: Score | None = None
    sets: dict[str, dict[str, Score]] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecord:
    """One run of the plan and the content of its folder.

    `evaluation` is of the run's last step, or None; an evaluation of another step is listed in `problems`.
    """

    run: Run
    folder: Path
    history: History
    state: RunState
    evaluation: Evaluation | None
    lineage: dict[str, Any]
    problems: tuple[str, ...]

    @property
    def label(self) -> str:
        """`paradigm/run` of the training's folder, the same for a run that two paradigms share."""
        return self.run.carried_out_as

    @property
    def skipped(self) -> list[int]:
        """The steps whose update was skipped for a loss spike, from the lineage."""
        return [one["step"] for one in self.recorded("skipped") if isinstance(one.get("step"), int)]

    @property
    def step_tokens(self) -> int | None:
        """Tokens of the newest step as it was trained; None if the lineage does not record them."""
        return trained_tokens(self.lineage, self.state.step)

    def recorded(self, name: str) -> list[dict[str, Any]]:
        """Return the lineage's entries under `name` (`starts`, `skipped`) that are mappings."""
        found = self.lineage.get(name)
        return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


@dataclass(frozen=True)
class RunTree:
    """The runs of some paradigms of a plan, each in dependency order; `tuned` are their fine-tunings, each once."""

    plan: Plan
    records: dict[str, list[RunRecord]] = field(default_factory=dict)
    tuned: list[RunRecord] = field(default_factory=list)

    @property
    def paradigms(self) -> tuple[str, ...]:
        """The shown paradigms, in the tables' order."""
        return tuple(self.records)

    def __iter__(self) -> Iterator[RunRecord]:
        """Yield every training once: a run that two paradigms share comes only under the first."""
        once: dict[str, RunRecord] = {}
        for record in itertools.chain.from_iterable(self.records.values()):
            once.setdefault(record.label, record)
        return iter(once.values())

    def model_of(self, paradigm: str, version: str) -> RunRecord | None:
        """Return the run whose last step is that version's model; None if the paradigm has none."""
        found = (r for r in self.records[paradigm] if r.run.version == version and r.run.makes_version)
        return next(found, None)

    def evaluated(self) -> Iterator[tuple[str, str, RunRecord, Evaluation]]:
        """Yield paradigm, version, run and evaluation of every evaluated model, in the tables' order."""
        for paradigm in self.paradigms:
            for version in self.plan.versions:
                record = self.model_of(paradigm, version.name)
                if record is not None and record.evaluation is not None:
                    yield paradigm, version.name, record, record.evaluation

    @property
    def compared(self) -> list[str]:
        """The versions that the tables compare: all but the first, as in the paper; a single version is kept.

        With a single paradigm there is no comparison, so its first version is included, too.
        """
        names = [version.name for version in self.plan.versions]
        return names if len(self.paradigms) == 1 else names[1:] or names


def collect(plan: Plan, paradigms: Sequence[str] | None = None) -> RunTree:
    """Read the runs' folders under the plan's output. Raise UserError if the output does not exist.

    `paradigms` None: those of the plan's report (`runs.tasks.named_paradigms`).
    """
    output = Path(plan.output)
    if not output.is_dir():
        raise nothing_there(plan, "nothing to report, there is no such folder")
    chosen = named_paradigms(plan) if paradigms is None else paradigms
    shown = [name for name in PARADIGMS if name in chosen]
    records = {name: [_record(plan, run) for run in plan.runs(name)] for name in shown}
    tuned = {run.carried_out_as: plan.carried_out(run) for name in shown for run in plan.sft_runs(name)}
    return RunTree(plan, records, [_record(plan, run) for run in tuned.values()])


def _record(plan: Plan, run: Run) -> RunRecord:
    shared = plan.carried_out(run)
    folder = plan.folder(shared)
    problems: list[str] = []
    history = read_history(folder)
    if history.unreadable:
        name = RunFolder(folder).history.name
        problems.append(f"{name}: {history.unreadable} unreadable lines were left out")
    lineage = read_json_object(RunFolder(folder).lineage, problems) or {}
    changes = run_changes(folder, lineage, plan, run)
    problems.extend(f"trained under another plan: {change}" for change in changes)
    problems += [problem for problem in inspect(folder)[0] if problem not in problems]
    return RunRecord(
        run=run,
        folder=folder,
        history=history,
        state=read_state(folder, run),
        evaluation=_evaluation(folder, run, problems),
        lineage=lineage,
        problems=tuple(problems),
    )


def _evaluation(folder: Path, run: Run, problems: list[str]) -> Evaluation | None:
    """Return the evaluation of the run's last step, or None; add a problem if it is not up to date."""
    path = RunFolder(folder).evaluation
    value = read_json_object(path, problems)
    if value is None:
        return None
    try:
        domains = _domains(value)
        sets = {
            str(name): {"": _score(one), **_domains(one)} for name, one in (value.get("sets") or {}).items()
        }
        answers = _score(value["answers"]) if value.get("answers") else None
        evaluation = Evaluation(int(value["step"]), _score(value), json_digest(value), domains, answers, sets)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problems.append(f"{path.name} is not an evaluation ({type(error).__name__}: {error})")
        return None
    if evaluation.step != run.last_step:
        step = evaluation.step
        problems.append(f"{path.name} is of step {step}, the run ends at {run.last_step}: evaluate it again")
        return None
    if not is_fresh(folder, run.last_step, value):
        problems.append(
            f"{path.name} is not known to be of the checkpoint that the run ended with: evaluate it again"
        )
    return evaluation


def _domains(value: dict[str, Any]) -> dict[str, Score]:
    return {str(name): _score(score) for name, score in (value.get("domains") or {}).items()}


def _score(value: dict[str, Any]) -> Score:
    return Score(float(value["loss"]), float(value["perplexity"]), int(value["tokens"]))


@dataclass(frozen=True)
class Gap:
    """A missing part as text, and the command that produces it (empty if there is none)."""

    text: str
    command: str = ""


def gaps(tree: RunTree) -> list[Gap]:
    """Return everything that is missing or damaged; [] if the report is complete."""
    found = []
    unfinished = [record for record in tree if not record.state.complete]
    trained = [record for record in tree if record.state.complete and record.run.makes_version]
    unevaluated = [record for record in trained if record.evaluation is None]
    if unfinished:
        states = listing([f"{record.label} ({record.state.progress})" for record in unfinished])
        text = f"{plural(len(unfinished), 'run')} not finished: {states}."
        found.append(Gap(text, next_command(tree.plan.path)))
    if unevaluated:
        names = listing([record.label for record in unevaluated])
        text = f"{plural(len(unevaluated), 'trained model')} without a perplexity: {names}."
        found.append(Gap(text, next_command(tree.plan.path, "eval")))
    for name in tree.plan.data.more_sets:
        lacking = [one.label for one in trained if one.evaluation and name not in one.evaluation.sets]
        if lacking:
            text = f"{plural(len(lacking), 'trained model')} not evaluated on {name}: {listing(lacking)}."
            found.append(Gap(text, next_command(tree.plan.path, "eval")))
    sizes = sorted({record.evaluation.score.tokens for record in tree if record.evaluation})
    if len(sizes) > 1:
        text = (
            "The perplexities cannot be compared: they were measured on different numbers of validation "
            f"tokens ({listing([f'{size:,}' for size in sizes])}). Evaluate every model again on one set."
        )
        found.append(Gap(text))
    found.extend(Gap(f"{record.label}: {problem}.") for record in tree for problem in record.problems)
    return found


def next_command(plan: Path, command: str = "run") -> str:
    """Return the command that trains or evaluates the rest; within a Slurm job, `lrpath submit` for both."""
    command = "submit" if os.environ.get("SLURM_JOB_ID") else command
    return f"lrpath {command} {shlex.quote(str(plan))}"

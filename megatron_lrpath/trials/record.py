"""The record of a trial in `OUTPUT/trials/NAME/trial.json`, and the losses that its branches have measured so far."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.paradigms import BRANCH, OURS
from megatron_lrpath.plan import Plan
from megatron_lrpath.reading import build
from megatron_lrpath.runs.folder import OutputFolder, RunFolder, read_json_object
from megatron_lrpath.runs.results import is_fresh, loss_of
from megatron_lrpath.sealed import write_sealed

VERSION = "trial"
"""The name of the version that a trial's branches train, in their plans."""
PROBE, AUDITION = "probe", "audition"
WHOLE = "all"
"""The whole first validation set, among the names of its domains and of further sets."""


@dataclass(frozen=True)
class Candidate:
    """The settings of a group of branches: `rate` (before the decay), `slice`, `replay` (share, as text)."""

    name: str
    rate: float
    slice: str
    replay: str | None = None


@dataclass(frozen=True)
class Trial:
    """A trial: every candidate is trained `repeats` times from the main path's checkpoint of step `begin`.

    A branch has `steps` steps; its last `decay` steps decay. The other candidates are compared with the first.
    Repeat r of every candidate reads the r-th part of its slice, so that repeats share no document, and
    candidates of one slice read the same batches.
    """

    kind: str
    name: str
    begin: int
    steps: int
    decay: int
    repeats: int
    candidates: tuple[Candidate, ...]

    @property
    def points(self) -> list[tuple[Candidate, int]]:
        """Every branch: the candidate and the repeat, from 1 on; repeat by repeat, so that pairs are complete early."""
        return [(one, number) for number in range(1, self.repeats + 1) for one in self.candidates]

    @property
    def branches(self) -> int:
        """Number of branches that are trained."""
        return self.repeats * len(self.candidates)

    @property
    def total_steps(self) -> int:
        """The steps of all branches."""
        return self.branches * self.steps

    def folder(self, plan: Plan) -> Path:
        """Return the trial's folder."""
        return OutputFolder(Path(plan.output)).trials / self.name

    def run_folder(self, plan: Plan, candidate: Candidate, repeat: int) -> Path:
        """Return the folder of one branch."""
        return self.folder(plan) / point_name(candidate, repeat) / OURS.name / BRANCH.run_name(VERSION)

    def write(self, plan: Plan) -> None:
        """Write the record."""
        write_sealed(record_path(self.folder(plan)), asdict(self))


def point_name(candidate: Candidate, repeat: int) -> str:
    """Return the name of one branch's plan and folder."""
    return f"{candidate.name}-r{repeat}"


def record_path(folder: Path) -> Path:
    """Return the record of the trial in `folder`."""
    return folder / "trial.json"


def read_trial(folder: Path) -> Trial | None:
    """Return the trial in `folder`; None if there is none.

    Raises:
        UserError: the record exists and cannot be used.
    """
    problems: list[str] = []
    found = read_json_object(record_path(folder), problems)
    try:
        if found is not None:
            candidates = tuple(build(Candidate, one) for one in found["candidates"])
            return build(Trial, found | {"candidates": candidates})
    except (KeyError, TypeError, ValueError) as error:
        problems.append(f"{record_path(folder).name} is no record of a trial ({error})")
    if problems:
        raise UserError(f"{folder}: {problems[0]}. Remove the folder to make the trial again.")
    return None


def trials_of(plan: Plan) -> list[Trial]:
    """Return the trials in a plan's output, by their first step and name; unreadable ones are omitted."""
    found = []
    for path in sorted(OutputFolder(Path(plan.output)).trials.glob("*/trial.json")):
        try:
            trial = read_trial(path.parent)
        except UserError:
            continue
        if trial is not None and trial.name == path.parent.name:
            found.append(trial)
    return sorted(found, key=lambda trial: (trial.begin, trial.name))


def losses_of(plan: Plan, trial: Trial) -> dict[str, dict[str, list[float | None]]]:
    """Return the losses (nats per token) by text and candidate, one for each repeat, None if not measured.

    Texts are `WHOLE`, the domains of the first validation set if it has several, and the further sets.
    """
    texts: dict[str, dict[tuple[str, int], float]] = {}
    for candidate, repeat in trial.points:
        for text, loss in _measured(
            trial.run_folder(plan, candidate, repeat), trial.begin + trial.steps
        ).items():
            texts.setdefault(text, {})[candidate.name, repeat] = loss
    return {
        text: {
            one.name: [found.get((one.name, repeat)) for repeat in range(1, trial.repeats + 1)]
            for one in trial.candidates
        }
        for text, found in texts.items()
    }


def _measured(folder: Path, step: int) -> dict[str, float]:
    evaluation = read_json_object(RunFolder(folder).evaluation)
    if evaluation is None or not is_fresh(folder, step, evaluation):
        return {}
    domains, sets = (_entries(evaluation.get(name)) for name in ("domains", "sets"))
    parts = {WHOLE: evaluation} | (domains if len(domains) > 1 else {}) | sets
    return {name: loss for name, part in parts.items() if (loss := loss_of(part)) is not None}


def _entries(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}

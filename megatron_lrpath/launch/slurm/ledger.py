"""The files under OUTPUT/slurm: submitted jobs, the copies of the plan that they read, the ends of their
starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml

from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_write_bytes, atomic_write_json
from megatron_lrpath.plan import Plan, load_plan
from megatron_lrpath.plan.spec import Data
from megatron_lrpath.reading import build, parse_json, read_object, why
from megatron_lrpath.runs.folder import OutputFolder

SIGNALS = "signals"
MARK = "lrpath: "  # prefix of the comment of a job that was held or stopped for a reason


@dataclass(frozen=True)
class SubmittedJob:
    """A submitted job.

    `depends` are the numbers of the jobs that it waits for. `parent` and `parent_step` name the training
    whose checkpoint it starts from, if that training continues after that step. `target` is the last step
    of a training, 0 for other jobs.
    """

    key: str
    number: int
    script: str
    depends: tuple[int, ...] = ()
    parent: str | None = None
    parent_step: int = 0
    target: int = 0
    submitted: str = ""


@dataclass(frozen=True)
class Ledger:
    """The folder `OUTPUT/slurm` with all files about the jobs of one plan."""

    folder: Path

    @classmethod
    def of(cls, output: str) -> Ledger:
        """Return the ledger of the plan with this output."""
        return cls(OutputFolder(Path(output)).slurm)

    @property
    def file(self) -> Path:
        """The file of the entries."""
        return self.folder / "jobs.json"

    def entries(self) -> list[SubmittedJob]:
        """Return all entries, oldest first; [] without a file. Raise UserError if the file is damaged."""
        try:
            rows = read_object(self.file)["jobs"]
            return [build(SubmittedJob, row) for row in rows]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.file}: cannot be read ({why(error)}). Cancel this plan's jobs by hand (squeue --me), remove "
                "the file and submit again: what is trained stays."
            ) from None

    def add(self, entry: SubmittedJob) -> None:
        """Append an entry."""
        rows = [asdict(one) for one in [*self.entries(), entry]]
        atomic_write_json(self.file, {"jobs": rows})

    def newest(self) -> dict[str, SubmittedJob]:
        """Return the last entry of every key."""
        return {entry.key: entry for entry in self.entries()}

    def attempts_file(self, number: int) -> Path:
        """Return the file in which a job records the end of each of its starts."""
        return self.folder / "attempts" / f"{number}.jsonl"

    def signals_file(self, number: int, start: int) -> Path:
        """Return the file in which the batch script of a job's start records the signals that it receives."""
        return self.folder / SIGNALS / f"{number}-{start}"

    def cancel_mark(self, number: int) -> Path:
        """Return the path of the file that prevents the requeue of a job."""
        return self.folder / "cancelled" / str(number)

    def requeue_mark(self, number: int) -> Path:
        """Return the path of the file with which a start records its requeue, because squeue shows the job as ended."""
        return self.folder / "requeued" / str(number)


def dependents(entries: Sequence[SubmittedJob], number: int) -> Iterator[SubmittedJob]:
    """Yield the entries that wait for job `number`, directly or indirectly, nearest first."""
    seen = {number}
    for entry in entries:  # an entry is submitted after those that it waits for
        if seen.intersection(entry.depends):
            seen.add(entry.number)
            yield entry


@dataclass(frozen=True)
class SubmittedPlan:
    """A submitted plan: `text` of its copy, and the parsed `plan` (its `path` is the user's file)."""

    plan: Plan
    text: bytes

    @classmethod
    def of(cls, path: Path, data: str | None = None, output: str | None = None) -> SubmittedPlan:
        """Return the plan in `path`, with other folders for data and output if they are given.

        `data` is a folder with `tokenizer.model` (if the plan has a file for it) and `slices/`.
        """
        return cls.moved(load_plan(path), path.read_bytes(), data, output)

    @classmethod
    def moved(
        cls, plan: Plan, text: bytes, data: str | None = None, output: str | None = None
    ) -> SubmittedPlan:
        """Return the same for a plan and its text."""
        if data is None and output is None:
            return cls(plan, text)
        changes: dict[tuple[str, ...], str | list[str]] = {}
        if output is not None:
            plan, changes["output",] = replace(plan, output=output), output
        if data is not None:
            slices = Path(data) / "slices"
            sets = [str(slices / Path(path).name) for path in (plan.data.valid, *plan.data.more_valid)]
            moved = Data(str(slices), sets[0], tuple(sets[1:]))
            plan = replace(plan, data=moved)
            changes |= {
                ("data", "slices"): moved.slices,
                ("data", "valid"): sets if moved.more_valid else moved.valid,
            }
            model = Path(data) / Path(plan.tokenizer.model or "").name
            if plan.tokenizer.model and model.exists():
                plan = replace(plan, tokenizer=replace(plan.tokenizer, model=str(model)))
                changes["tokenizer", "model"] = str(model)
        return cls(plan, with_values(text, changes))

    @property
    def path(self) -> Path:
        """Return the path of the copy: a file for every text, so that all ranks of a start read the same."""
        return pinned(self.latest, self.text)

    @property
    def latest(self) -> Path:
        """The copy of the last submission under a permanent name."""
        return OutputFolder(Path(self.plan.output)).slurm / "plan.yaml"

    def write(self) -> None:
        """Write both files."""
        for path in (self.path, self.latest):
            atomic_write_bytes(path, self.text)


def pinned(latest: Path, text: bytes) -> Path:
    """Return the permanent file of this text, next to the latest plan."""
    return latest.parent / "plans" / f"{hashlib.sha256(text).hexdigest()[:12]}.yaml"


def current(latest: Path) -> Path:
    """Return the copy of the plan that was submitted last.

    A job reads it when it starts, not when it was submitted: otherwise a main path that has a later
    version would belong to another plan than a branch without it.
    """
    return pinned(latest, latest.read_bytes())


def with_values(text: bytes, changes: Mapping[tuple[str, ...], str | list[str]]) -> bytes:
    """Return a YAML text with these values at these keys, and all other scalars unchanged."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)  # the plan has been loaded
    for keys, value in changes.items():
        _set(root, keys, value)
    serialized = yaml.serialize(root, Dumper=yaml.SafeDumper, allow_unicode=True, encoding="utf-8")
    assert isinstance(serialized, bytes)
    return serialized


def _set(node: yaml.MappingNode, keys: tuple[str, ...], value: str | list[str]) -> None:
    first, *rest = keys
    pairs = {key.value: number for number, (key, _) in enumerate(node.value)}
    if first not in pairs:
        pairs[first] = len(node.value)
        held = yaml.MappingNode("tag:yaml.org,2002:map", []) if rest else _node(value)
        node.value.append((_scalar(first), held))
    key, held = node.value[pairs[first]]
    if rest:
        _set(held, tuple(rest), value)
    else:
        node.value[pairs[first]] = (key, _node(value))


def _node(value: str | list[str]) -> yaml.Node:
    if isinstance(value, str):
        return _scalar(value)
    return yaml.SequenceNode("tag:yaml.org,2002:seq", [_scalar(text) for text in value], flow_style=True)


def _scalar(text: str) -> yaml.ScalarNode:
    return yaml.ScalarNode("tag:yaml.org,2002:str", text, style='"')


SAME_CHECKPOINT = 3  # starts from one checkpoint without a newer one, after which the job stops

COMPLETE, SAVED, FAILED = "complete", "saved", "failed"
REQUEUE, STOP = "requeue", "stop"


@dataclass(frozen=True)
class Attempt:
    """A start of a job.

    `start` is the step that it started from, `step` the last one it logged, `checkpoint` the newest
    complete one at its end. `ending`: complete, saved (asked to stop; saved, or had nothing to save yet)
    or failed; `cause` is a sentence. `hopeless` is a failure that another start cannot fix, such as
    invalid data. `at_limit`: whether a request to stop came from its time limit. `stopped` is the reason
    why no other start follows, "" if one can follow.
    """

    start: int
    step: int
    checkpoint: int
    ending: str
    cause: str | None = None
    hopeless: bool = False
    time: str = ""
    at_limit: bool = True
    stopped: str = ""

    def said(self, last_step: int) -> str:
        """Return how the start ended, as text for users; `last_step` is the run's."""
        if self.ending == COMPLETE:
            return f"complete at step {last_step}"
        if self.ending == FAILED:
            return f"failed in step {self.step + 1} of {last_step}"
        if self.checkpoint > self.start and self.step > self.checkpoint:
            return f"stopped at step {self.step} of {last_step}; its newest checkpoint is of step {self.checkpoint}"
        if self.checkpoint > self.start:
            return f"saved at step {self.checkpoint} of {last_step}"
        if self.step > self.start:
            return f"stopped at step {self.step} of {last_step} without a new checkpoint"
        return "stopped before the first step, nothing to save"

    @property
    def counts(self) -> bool:
        """Return whether it counts against another start; stops by an operator or a preemption do not."""
        return self.ending == FAILED or self.at_limit


@dataclass(frozen=True)
class Conclusion:
    """The next action: complete, requeue, or stop; `reason`: why it stops."""

    action: str
    reason: str = ""


def conclude(attempt: Attempt, earlier: Sequence[Attempt]) -> Conclusion:
    """Return the action that follows from the last start and those before it.

    A failure is retried once, because the machine may have caused it. A second failure at the same step
    stops the job. Three successive starts from the same checkpoint that failed or reached the time limit
    before the next checkpoint also stop it: they would repeat forever. A start that a user has stopped does not count.
    """
    if attempt.ending == COMPLETE:
        return Conclusion(COMPLETE)
    cause = attempt.cause or "no cause found"
    if attempt.hopeless:
        return Conclusion(STOP, cause)
    failures = [one for one in earlier if one.ending == FAILED]
    if attempt.ending == FAILED and any(one.step == attempt.step for one in failures):
        return Conclusion(STOP, f"failed twice at step {attempt.step + 1}: {cause}")
    stuck = 0
    for one in reversed([*earlier, attempt]):
        if one.start != attempt.start or one.checkpoint > one.start:
            break
        stuck += one.counts
    if stuck >= SAME_CHECKPOINT:
        why = f"; the last time: {cause}" if attempt.ending == FAILED else ": the time limit is too short"
        return Conclusion(
            STOP, f"started {stuck} times from step {attempt.start} without a new checkpoint{why}"
        )
    return Conclusion(REQUEUE)


def read_attempts(path: Path) -> list[Attempt]:
    """Return the attempts recorded in a file, oldest first; an incomplete line is skipped."""
    found: list[Attempt] = []
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                found.append(build(Attempt, parse_json(line)))
    return found


def note_attempt(path: Path, attempt: Attempt) -> None:
    """Append an attempt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(attempt)) + "\n")

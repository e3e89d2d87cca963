"""`OUTPUT/plan.yaml`: the plan that `--set` derives from another, in an output for these overrides only."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import PlanError, UserError
from megatron_lrpath.files import atomic_write_bytes
from megatron_lrpath.locks import FolderLock, LockHeldError
from megatron_lrpath.paradigms import PARADIGMS
from megatron_lrpath.plan import Plan
from megatron_lrpath.plan.file.load import plan_from
from megatron_lrpath.plan.file.overrides import OPTION, changed_plan, read_words
from megatron_lrpath.plan.file.source import MAX_BYTES, parse_source
from megatron_lrpath.plan.spec import Data, Tokenizer
from megatron_lrpath.runs.folder import OutputFolder

_FIRST = "# made by lrpath from "
_HEADER = re.compile(
    rf"{_FIRST}(?P<words>[^\n]*); SHA-256 of the rest: (?P<sum>[0-9a-f]{{64}})\n(?P<rest>.*)", re.DOTALL
)


@dataclass(frozen=True)
class OverriddenPlan:
    """A plan with overrides: `asked`, whose errors name the plan file, and the overrides `words`.

    `plan` is the same plan read from `OUTPUT/plan.yaml`, `body` the text of that file.
    """

    asked: Plan
    words: tuple[str, ...]
    overrides: dict[str, Any]
    plan: Plan
    body: str

    @classmethod
    def of(cls, path: Path, words: Sequence[str], output: str | None = None) -> OverriddenPlan:
        """Apply these `--set` words to the plan in `path`; `output` replaces the plan's own.

        Raise PlanError for values that are not valid in a plan file.
        """
        made = changed_plan(path, words, output)
        target = OutputFolder(Path(made.plan.output)).plan
        plan = plan_from(parse_source(target, made.text))
        return cls(made.plan, tuple(words), made.overrides, plan, made.text)

    def moved(self, data: Data, tokenizer: Tokenizer, body: str) -> OverriddenPlan:
        """Return the same plan with other data and tokenizer paths, given by the text `body`."""
        asked, plan = (replace(one, data=data, tokenizer=tokenizer) for one in (self.asked, self.plan))
        return replace(self, asked=asked, plan=plan, body=body)

    @property
    def path(self) -> Path:
        """OUTPUT/plan.yaml."""
        return OutputFolder(Path(self.plan.output)).plan

    @property
    def content(self) -> bytes:
        """The file's text: its first line states its source and the overrides."""
        options = [word for override in self.words for word in (OPTION, override)]
        words = [" ".join(os.path.abspath(self.asked.path).splitlines()), *options]
        first = f"{_FIRST}{shlex.join(words)}; SHA-256 of the rest: {_sum(self.body)}\n"
        return first.encode(errors="replace") + self.body.encode()

    def require_output(self) -> None:
        """Raise UserError, with what to do, if the output belongs to another plan."""
        own = f"give these overrides an output of their own: {OPTION} output=FOLDER"
        output = Path(self.plan.output)
        there = read_made(self.path)
        if there is None and self.path.exists():
            raise UserError(f"{self.path}: exists already, and no plan that {OPTION} has written; {own}")
        if there is None:
            if held := _held(output):
                raise UserError(
                    f"{output}: holds {held} of a plan without these overrides ({self.said}); {own}"
                )
            return
        here = shlex.quote(str(self.path))
        if _trained_as(there.overrides) != _trained_as(self.overrides):
            empty = "" if _held(output) else f" Nothing is trained there: {self.path} may be removed instead."
            raise UserError(
                f"{output}: is the output of other overrides ({' '.join(there.words)}), not of these ({self.said}); "
                f"{own}, or continue with those: lrpath run {here}.{empty}"
            )
        if there.edited and there.body != self.body:
            raise UserError(
                f"{self.path}: was edited since it was made from {self.asked.path}, and is not overwritten. Continue "
                f"without {OPTION}: lrpath run {here}; or {own}"
            )

    @property
    def said(self) -> str:
        """The overrides as given."""
        return " ".join(self.words)

    def write(self) -> Path:
        """Write OUTPUT/plan.yaml, unless it exists already, and return its path.

        Raise UserError as `require_output`, and if a training in the output uses an older text.
        """
        self.require_output()
        content = self.content
        if len(content) > MAX_BYTES:
            raise PlanError(f"{self.asked.path}: with these overrides larger than {MAX_BYTES // 1024} KiB")
        there = read_made(self.path)
        if there is not None and there.body == self.body:  # a training may be using it now
            return self.path
        lock = None
        try:
            with suppress(OSError):  # a disk without locks; a failed write reports its own error
                lock = FolderLock.acquire(Path(self.plan.output))
            self.require_output()  # another call may have written it first
            atomic_write_bytes(self.path, content)
        except LockHeldError as owner:
            raise UserError(
                f"{self.plan.output}: {owner} is running a plan there, and {self.path} would change; wait "
                "for it or end it, then call again"
            ) from None
        finally:
            if lock:
                lock.close()
        return self.path


@dataclass(frozen=True)
class Made:
    """The content of an `OUTPUT/plan.yaml`: its overrides as text and as values, its text, and whether it was
    edited.
    """

    words: tuple[str, ...]
    overrides: dict[str, Any]
    body: str
    edited: bool


def read_made(path: Path) -> Made | None:
    """Read the file; None if there is none, or if `OverriddenPlan.write` has not written it."""
    try:
        with path.open("rb") as stream:
            text = stream.read(MAX_BYTES + 1).decode()
        header = _HEADER.fullmatch(text)
        _, *options = shlex.split(header["words"] if header else "")
        words = tuple(word for word in options if word != OPTION)
        overrides = read_words(words)
    except (OSError, ValueError, PlanError):
        return None
    if header is None:
        return None
    return Made(words, overrides, header["rest"], _sum(header["rest"]) != header["sum"])


def _sum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _trained_as(overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the overrides that change the training; paths are excluded."""
    return {key: value for key, value in overrides.items() if key != "output"}


def _held(output: Path) -> str:
    """Describe the files of an earlier run of a plan in an output; empty if there are none."""
    if any(any((output / name).glob("[!.]*")) for name in PARADIGMS):
        return "runs"
    return "submitted jobs" if any(OutputFolder(output).slurm.glob("[!.]*")) else ""

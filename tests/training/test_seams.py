"""Every replaced name of Megatron is in one table, fits the installed version, and is described in the docs.

`python -m tests.training.test_seams` writes the table of docs/megatron-seams.md again.
"""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_lrpath.errors import UserError
from megatron_lrpath.training import seams
from megatron_lrpath.training.session import Session
from tests.support import ROOT

PACKAGE = ROOT / "megatron_lrpath"
DOCUMENT = ROOT / "docs/megatron-seams.md"
NAMES = [f"{seam.target.rpartition('.')[2]}-{seam.device}" for seam in seams.SEAMS]


@pytest.mark.parametrize("seam", seams.SEAMS, ids=NAMES)
def test_the_original_has_the_parameters_that_the_row_was_written_for(seam: seams.Seam) -> None:
    assert seams.check(seam) is None


@pytest.mark.parametrize("seam", seams.SEAMS, ids=NAMES)
def test_the_replacement_takes_every_call_that_the_original_took(seam: seams.Seam) -> None:
    names = list(inspect.signature(seam.original()).parameters)
    ours = inspect.signature(seams.resolve(seam.replacement))
    given = ["session", "original"] if "session" in ours.parameters else ["original"]
    positional = [*given, "self"] if "self" in names else given
    ours.bind(*given, *names)
    ours.bind(*positional, **{name: None for name in names if name != "self"})


def test_rows_have_a_reason_and_are_unique() -> None:
    for device in ("cpu", "cuda"):
        assert len({seam.target for seam in seams.rows(device)}) == len(seams.rows(device))
    for seam in seams.SEAMS:
        assert len(seam.why) > 20
        assert seam.device in ("any", "cpu", "cuda")
        assert seam.since.startswith("0.")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("megatron.training.training:no_such_function", "is gone"),
        ("megatron.no_such_module:function", "is gone"),
        ("megatron.training.training:training_log", "expected ('another',) first"),
    ],
)
def test_another_megatron_is_refused_before_anything_is_replaced(
    monkeypatch: pytest.MonkeyPatch, target: str, said: str
) -> None:
    before = [seam.original() for seam in seams.SEAMS]
    changed = replace(seams.SEAMS[0], target=target, parameters=("another",))
    monkeypatch.setattr(seams, "SEAMS", (*seams.SEAMS, changed))
    with pytest.raises(UserError) as refusal:
        seams.apply(Session("cpu"))
    assert said in str(refusal.value)
    assert target in str(refusal.value)
    assert seams.MEGATRON in str(refusal.value)
    assert [seam.original() for seam in seams.SEAMS[:-1]] == before


def extended(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `original` as in a later Megatron, with an additional optional parameter."""

    def later(*args: Any, **named: Any) -> Any:
        return original(*args, **named)

    signature = inspect.signature(original)
    kinds = inspect.Parameter
    more = kinds("brand_new", kinds.KEYWORD_ONLY, default=None)
    others = [one for one in signature.parameters.values() if one.kind != kinds.VAR_KEYWORD]
    later.__signature__ = signature.replace(parameters=[*others, more])  # type: ignore[attr-defined]
    return later


@pytest.mark.parametrize("seam", seams.SEAMS, ids=NAMES)
def test_a_parameter_more_upstream_changes_nothing(seam: seams.Seam, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams.Seam, "original", lambda self: extended(seams.resolve(self.target)))
    assert seams.check(seam) is None


def test_a_row_that_only_saves_time_steps_aside_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = next(seam for seam in seams.SEAMS if seam.speed)
    monkeypatch.setattr(seams, "SEAMS", (replace(row, parameters=("another",)),))
    before = row.original()
    seams.apply(Session("cpu"))
    assert row.original() is before
    assert f"{row.target} takes" in capsys.readouterr().err


APPLIED = """
import json, sys
from megatron_lrpath.training import machine
device = sys.argv[1]
machine.activate(device)
from megatron_lrpath.training import seams
from megatron_lrpath.training.session import Session
session = Session(device)
before = [seam.original() for seam in seams.SEAMS]
seams.apply(session)
once = [seam.original() for seam in seams.SEAMS]
seams.apply(session)
twice = [seam.original() for seam in seams.SEAMS]
import megatron_lrpath.training.pretrain, megatron_lrpath.training.setup
print(json.dumps({
    "replaced": [a is not b for a, b in zip(before, once)],
    "again": [a is not b for a, b in zip(once, twice)],
    "backend": sorted(name for name in sys.modules if name.startswith("megatron_lrpath.training.cpu.")),
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_apply_replaces_what_the_device_needs_once_and_cuda_never_imports_the_cpu_backend(
    device: str,
) -> None:
    command = [sys.executable, "-W", "ignore", "-c", APPLIED, device]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout.splitlines()[-1])
    targets = {seam.target for seam in seams.rows(device)}
    assert found["replaced"] == [seam.target in targets for seam in seams.SEAMS]
    assert not any(found["again"])
    modules = [f"megatron_lrpath.training.cpu.{name}" for name in ("backend", "kernels")]
    wanted = modules if device == "cpu" else []
    assert found["backend"] == wanted


def assignments(source: str, library: str) -> list[int]:
    """Return the lines that assign to (or delete) an attribute of an import from `library`."""
    tree = ast.parse(source)
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == library:
                    imported.add(alias.asname or library)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == library:
            imported |= {alias.asname or alias.name for alias in node.names}
    found = []
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and root(node.func) in ("setattr", "delattr") and node.args:
            targets = [ast.Attribute(node.args[0], "name")]
        found += [node.lineno for target in targets if is_attribute_of(target, imported)]
    return sorted(found)


def root(expression: ast.expr) -> str | None:
    """Return the name with which an attribute access begins."""
    while isinstance(expression, ast.Attribute):
        expression = expression.value
    return expression.id if isinstance(expression, ast.Name) else None


def is_attribute_of(target: ast.expr, names: set[str]) -> bool:
    """Return whether `target` (or a part of it) is an attribute of one of `names`."""
    if isinstance(target, ast.Tuple | ast.List):
        return any(is_attribute_of(part, names) for part in target.elts)
    return isinstance(target, ast.Attribute) and root(target) in names


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("from megatron.training import training\ntraining.train = 1", [2]),
        ("import megatron.core as core\ndef f():\n    core.a.b: int = 1", [3]),
        ("from megatron.core import mpu as m\nsetattr(m, 'x', 1)\nx, m.y = 1, 2", [2, 3]),
        ("from megatron.core.optimizer import A\nA.step, b = 1, 2\ndel A.step", [2, 3]),
        ("from megatron.training import get_args\nargs = get_args()\nargs.load = None\nself.x = 1", []),
    ],
)
def test_the_search_for_assignments_finds_them(source: str, lines: list[int]) -> None:
    assert assignments(source, "megatron") == lines


def python_files() -> list[Path]:
    """Return every Python file of the package."""
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 50
    return files


def test_nothing_but_the_table_assigns_to_a_name_of_megatron() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in python_files()
        for line in assignments(path.read_text(encoding="utf-8"), "megatron")
    }
    assert not found


def test_nothing_but_the_cpu_backend_assigns_to_a_name_of_torch() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for path in python_files()
        if assignments(path.read_text(encoding="utf-8"), "torch")
    }
    assert found == {"training/cpu/backend.py"}


def table() -> str:
    """Return the table of the document, a row per seam."""
    lines = ["| Megatron's name | replacement | why | where | since |", "|---|---|---|---|---|"]
    for seam in seams.SEAMS:
        target, ours = (path.replace(":", ".") for path in (seam.target, seam.replacement))
        where = {"any": "everywhere", "cpu": "CPU only", "cuda": "GPU only"}[seam.device]
        where += ", only saves time" if seam.speed else ""
        lines.append(f"| `{target}` | `{ours}` | {seam.why} | {where} | {seam.since} |")
    return "\n".join(lines) + "\n"


def test_the_document_has_the_table_as_it_is() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert table() in text, "run `python -m tests.training.test_seams`"
    assert seams.MEGATRON in text


def write_document() -> None:
    """Replace the document's table."""
    text = DOCUMENT.read_text(encoding="utf-8")
    start = text.index("| Megatron's name")
    end = text.index("\n\n", start) + 1 if "\n\n" in text[start:] else len(text)
    DOCUMENT.write_text(text[:start] + table() + text[end:], encoding="utf-8")


if __name__ == "__main__":
    write_document()

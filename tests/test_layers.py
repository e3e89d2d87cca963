"""The package's structure: the layers that imports go down, and the names that only one module spells.

`LAYERS` is the one table of the order; docs/architecture.md lists the packages in it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = "megatron_lrpath"

# Bottom first. A module may import its own layer's modules and those of the layers before it.
LAYERS = (
    (
        "errors",
        "exits",
        "files",
        "reading",
        "sealed",
        "locks",
        "console",
        "full_disk",
        "shipped",
        "devices",
        "wording",
        "paradigms",
    ),
    ("schedule",),
    ("models",),
    ("plan",),
    ("runs",),
    ("tokenizers",),
    ("data",),
    ("sft",),
    ("checkpoints",),
    ("training",),
    ("export",),
    ("merge",),
    ("evaluate",),
    ("trials",),
    ("report",),
    ("advise",),
    ("launch",),
    ("readiness",),
    ("experiment",),
    ("upkeep",),
    ("doctor",),
    ("commands",),
    ("cli", "script", "pretrain_gpt"),
)
LIGHT = ("schedule", "plan", "runs")  # these packages never import HEAVY
HEAVY = ("torch", "megatron", "transformer_engine")
QUICK = (
    *LIGHT,
    "readiness",
    "report",
    "experiment",
    "upkeep",
)  # must start without HEAVY, whose import takes seconds

# `commands/` imports inside functions as a rule; megatron_lrpath/commands/__init__.py gives the reason.
LOCAL_IMPORTS_AT_MOST = 30

RUN_FOLDER_FILES = (
    "history.jsonl",
    "result.json",
    "eval.json",
    "evals.json",
    "lineage.json",
    "downstream.json",
    "completions.json",
)


@dataclass(frozen=True)
class Import:
    """An import statement of one name: its target, its line, and whether it is inside a function."""

    target: str
    line: int
    is_local: bool


@dataclass(frozen=True)
class Module:
    """A module of the package, parsed."""

    name: str
    path: Path
    lines: list[str]
    tree: ast.Module

    @property
    def layer(self) -> str:
        """First part of the module's name below the package; empty for the package itself."""
        return layer_name(self.name)

    def statements(self) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
        """Yield every import statement, also under TYPE_CHECKING, and whether it is inside a function."""
        pending: list[tuple[ast.AST, bool]] = [(self.tree, False)]
        while pending:
            node, is_local = pending.pop()
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield node, is_local
            is_local = is_local or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            pending += [(child, is_local) for child in ast.iter_child_nodes(node)]

    def imports(self) -> Iterator[Import]:
        """Yield every name that is imported."""
        for node, is_local in self.statements():
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{self.path}: a relative import"
            for target in targets(node):
                yield Import(target, node.lineno, is_local)

    def strings(self) -> Iterator[str]:
        """Yield every string constant, with parts of f-strings, without docstrings."""
        prose = {
            id(node.body[0].value)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                yield node.value


def targets(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Return the imported names of a statement: modules of ours by their full names, others as written."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    source = node.module or ""
    return [name if (name := f"{source}.{alias.name}") in module_paths() else source for alias in node.names]


def layer_name(module: str) -> str:
    """Return the layer of a module: `megatron_lrpath.plan.runs` -> `plan`."""
    return module.split(".")[1] if "." in module else ""


def is_own(name: str) -> bool:
    """Return whether a module's name is in this package."""
    return name.split(".")[0] == PACKAGE


@cache
def module_paths() -> dict[str, Path]:
    """Return every module's file by the module's name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def modules() -> dict[str, Module]:
    """Return every module of the package, parsed, by its name."""
    found = {}
    for name, path in module_paths().items():
        text = path.read_text(encoding="utf-8")
        found[name] = Module(name, path, text.splitlines(), ast.parse(text))
    return found


def graph() -> dict[str, set[str]]:
    """Return the modules that each module imports, at its top or inside a function."""
    return {
        name: {entry.target for entry in module.imports() if is_own(entry.target)}
        for name, module in modules().items()
    }


def reachable(edges: dict[str, set[str]], start: str) -> set[str]:
    """Return the modules that `start` imports, directly and through others."""
    reached: set[str] = set()
    pending = [start]
    while pending:
        new = edges[pending.pop()] - reached
        reached |= new
        pending += new
    return reached


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other, directly and through others."""
    reach = {name: reachable(edges, name) for name in edges}
    groups = {tuple(sorted(other for other in reach[name] if name in reach[other])) for name in edges}
    return [list(group) for group in sorted(groups) if group]


def test_every_module_belongs_to_a_layer() -> None:
    layers = {name for layer in LAYERS for name in layer}
    assert {module.layer for module in modules().values()} - {""} == layers


def test_imports_go_down() -> None:
    place = {name: number for number, layer in enumerate(LAYERS) for name in layer} | {"": -1}
    upward = [
        f"{module.path.relative_to(ROOT)}:{entry.line} imports {entry.target}"
        for module in modules().values()
        for entry in module.imports()
        if is_own(entry.target) and place[layer_name(entry.target)] > place[module.layer]
    ]
    assert upward == []


def test_no_modules_import_each_other() -> None:
    assert circles(graph()) == []


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": {"d"}}) == [["b", "c"], ["d"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_light_packages_reach_nothing_heavy() -> None:
    edges = {  # importing a module runs the packages that it is in
        name: imported | {name.rsplit(".", count)[0] for count in range(1, name.count(".") + 1)}
        for name, imported in graph().items()
    }
    light = {name for name in modules() if layer_name(name) in LIGHT}
    reached = light.union(*(reachable(edges, name) for name in light))
    heavy = [
        f"{modules()[name].path.relative_to(ROOT)}:{entry.line} imports {entry.target}"
        for name in sorted(reached)
        for entry in modules()[name].imports()
        if entry.target.split(".")[0] in HEAVY
    ]
    assert heavy == []


def test_quick_packages_load_nothing_heavy() -> None:
    quick = [name for name in modules() if layer_name(name) in QUICK]
    code = f"""
import importlib, sys
for name in {quick!r}:
    importlib.import_module(name)
print(*[name for name in {HEAVY!r} if name in sys.modules])
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=240
    )
    assert answer.stdout.strip() == ""


def local_imports() -> list[tuple[Module, int]]:
    """Return the imports of our own modules inside functions outside `commands/`: module and line."""
    return [
        (module, node.lineno)
        for module in modules().values()
        if module.layer != "commands"
        for node, is_local in module.statements()
        if is_local and any(map(is_own, targets(node)))
    ]


def has_reason(module: Module, line: int) -> bool:
    """Return whether a comment is on the line, or on the line before its block of imports."""
    ends = {node.end_lineno: node.lineno for node, _ in module.statements()}
    starts = {first: last for last, first in ends.items() if last}
    if "#" in "".join(module.lines[line - 1 : starts[line]]):
        return True
    while line - 1 in ends:  # a block of imports has one comment above it
        line = ends[line - 1]
    return line > 1 and module.lines[line - 2].lstrip().startswith("#")


def test_imports_inside_functions_are_few() -> None:
    count = len(local_imports())  # a name, so that a failure does not print the modules
    assert count <= LOCAL_IMPORTS_AT_MOST


def test_imports_inside_functions_give_their_reason() -> None:
    bare = [
        f"{module.path.relative_to(ROOT)}:{line}"
        for module, line in local_imports()
        if not has_reason(module, line)
    ]
    assert bare == []


@cache
def spelt() -> dict[str, list[str]]:
    """Return the modules whose strings contain a file name of the run folder, by the name."""
    names = re.compile(rf"(?<![\w.-])(?:{'|'.join(map(re.escape, RUN_FOLDER_FILES))})(?!\w)")
    found: dict[str, set[str]] = {file: set() for file in RUN_FOLDER_FILES}
    for name, module in modules().items():
        for text in module.strings():
            for file in names.findall(text):
                found[file].add(name)
    return {file: sorted(names) for file, names in found.items()}


@pytest.mark.parametrize("file", RUN_FOLDER_FILES)
def test_a_file_of_the_run_folder_is_spelt_in_one_module(file: str) -> None:
    assert len(spelt()[file]) == 1, spelt()[file]


def test_the_architecture_lists_the_packages_in_this_order() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    section = page.partition("## The packages")[2].partition("\n## ")[0]
    first = " ".join(line.split("|")[1] for line in section.splitlines() if line.startswith("| `"))
    packages = [name for layer in LAYERS for name in layer if (ROOT / PACKAGE / name).is_dir()]
    assert re.findall(r"`(\w+)/`", first) == packages

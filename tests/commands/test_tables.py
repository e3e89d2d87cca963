"""Tables on a terminal of 80 columns: no wider line, nothing cut off, one style, paradigms in one order."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lrpath.cli import main
from megatron_lrpath.commands import eval as evaluation
from megatron_lrpath.commands.generate import side_by_side
from megatron_lrpath.plan import Plan
from tests.support import ROOT
from tests.support.columns import check_80_columns, require_80_columns
from tests.support.report_tree import write_plan, write_tree
from tests.support.years_tree import make_tree

PAPER = str(ROOT / "examples/paper/3.1b.yaml")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = write_plan(tmp_path_factory.mktemp("tables"), steps=600)
    write_tree(plan)
    return plan.path


@pytest.fixture(scope="module")
def years(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return make_tree(tmp_path_factory.mktemp("years") / "tree")


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    return write_plan(tmp_path, steps=12_000, warmup=1000).path


@pytest.mark.parametrize(
    ("argv", "which"),
    [
        (["plan", "--no-curves"], "fresh"),
        (["status"], "fresh"),
        (["status"], "trained"),
        (["report"], "trained"),
        (["lr", "--run", "main"], "fresh"),
        (["budget"], "fresh"),
        (["eval", "--force"], "trained"),
    ],
)
def test_every_table_fits_80_columns(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    which: str,
) -> None:
    path = request.getfixturevalue(which)
    require_80_columns(monkeypatch)
    monkeypatch.setattr(evaluation, "run_logged", lambda *_, **__: (0, None))
    monkeypatch.setattr("megatron_lrpath.data.record.require_tokenizer", lambda *_: None)
    assert main([argv[0], str(path), *argv[1:]]) == 0
    check_80_columns(capsys.readouterr().out, path.parent)


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["submit", PAPER, "--paradigm", "all", "--dry-run"], 2),  # missing data, reported last
        (["budget", PAPER], 0),
        (["experiment", str(ROOT / "examples/paper/table-2.yaml")], 0),
    ],
    ids=lambda argv: argv[0] if isinstance(argv, list) else "",
)
def test_output_for_plans_as_large_as_the_papers_fits_80_columns(
    argv: list[str], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    require_80_columns(monkeypatch)
    monkeypatch.chdir(ROOT)
    assert main(argv) == status
    said, _, scripts = capsys.readouterr().out.partition("\n# sbatch")
    assert bool(scripts) == (argv[0] == "submit")
    check_80_columns(said, ROOT, drawn="│")  # the tree of the jobs


@pytest.mark.parametrize("argv", [["prune"], ["rewind", "--to-step", "40", "--drop", "v3", "--dry-run"]])
def test_output_of_upkeep_commands_fits_80_columns(
    argv: list[str], years: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    require_80_columns(monkeypatch)
    assert main([argv[0], str(years.path), *argv[1:]]) == 0
    check_80_columns(capsys.readouterr().out, years.path.parent)


@pytest.mark.parametrize("models", [2, 4])
def test_completions_fit_80_columns(
    models: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    require_80_columns(monkeypatch)
    text = "def read(path):\n    return " + "many words " * 20 + "and_a_name_that_is_" + "long_" * 10
    side_by_side({f"ours/branch-v{number}": text for number in range(models)})
    said = check_80_columns(capsys.readouterr().out, tmp_path)
    assert "".join(said.split()).count("many") == 20 * models


def test_paradigms_come_in_one_order(trained: Path, fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, path, title in (
        ("plan", fresh, "Cost"),
        ("status", trained, "run "),
        ("report", trained, "Schedule"),
        ("budget", fresh, "GPU hours on A100"),
    ):
        assert main([command, str(path)]) == 0
        shown = capsys.readouterr().out
        rows = shown[shown.index(title) + len(title) :].lower().split("relative to ptfs")[-1]
        places = [rows.index(name) for name in ("ours", "ptfs", "cpt")]
        assert places == sorted(places), command

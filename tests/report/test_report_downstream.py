"""Scores on benchmarks in the report: a row for every version and paradigm, as in the paper's Table 4."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from megatron_lrpath.plan import Plan
from megatron_lrpath.report.collect import collect
from megatron_lrpath.report.evaluations import downstream_csv, downstream_table
from megatron_lrpath.report.page import make_report, write_report
from tests.support.report_tree import write_plan, write_slices, write_tree

SCORES = {
    "ptfs": (0.38, 0.0463),
    "cpt": (0.37, 0.0409),
    "ours": (0.386, 0.0508),
}  # Table 4's V2, C3 and GSM8K


def write_scores(plan: Plan, paradigm: str, run: str, scores: tuple[float, ...], **changes: Any) -> None:
    """Write the file that `lrpath eval --tasks` leaves in a run's folder."""
    settings = {"limit": None, "num_fewshot": None, "chat": False} | changes.pop("settings", {})
    results = {
        task: {
            "score": score,
            "stderr": 0.01,
            "metric": "acc",
            "samples": 9,
            "settings": settings,
            "subtasks": {},
        }
        for task, score in zip(("lrpath_c3", "gsm8k"), scores, strict=False)
    }
    stored = {"step": plan.run(paradigm, run).last_step, "checkpoint": "x", "results": results} | changes
    (plan.folder(plan.run(paradigm, run)) / "downstream.json").write_text(json.dumps(stored))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Return a trained and evaluated plan of three versions; the second is measured on two benchmarks."""
    plan = write_plan(tmp_path, versions=3)
    write_tree(plan)
    write_slices(plan)
    for paradigm, kind in (("ptfs", "scratch"), ("cpt", "continual"), ("ours", "branch")):
        write_scores(plan, paradigm, f"{kind}-v2", SCORES[paradigm])
    return plan


def rows(plan: Plan) -> list[list[str]]:
    """Return the table's texts."""
    table = downstream_table(collect(plan))
    assert table
    return [list(table.header), *([cell.text for cell in row] for row in table.rows)]


def test_the_table_has_the_form_of_table_4(plan: Plan) -> None:
    assert rows(plan) == [
        ["Version", "Paradigm", "C3", "GSM8K", "AVG"],
        ["v2", "Ours", "38.60", "5.08", "21.84"],
        ["", "PTFS", "38.00", "4.63", "21.32"],
        ["", "CPT (ResetMax)", "37.00", "4.09", "20.55"],
    ]
    table = downstream_table(collect(plan))
    assert table
    assert [[cell.best for cell in row[2:]] for row in table.rows] == [[True] * 3, [False] * 3, [False] * 3]


def test_missing_scores_are_left_empty(plan: Plan) -> None:
    write_scores(plan, "ours", "branch-v3", (0.5,), settings={"limit": 20})
    write_scores(plan, "cpt", "continual-v2", (0.9, 0.9), step=1)  # a record of another step
    shown = rows(plan)
    assert [row[1] for row in shown[1:]] == ["Ours", "PTFS", "Ours"]
    assert shown[3] == ["v3", "Ours", "50.00", "–", "–"]
    table = downstream_table(collect(plan))
    assert table
    assert any("first 20 samples" in note for note in table.notes)


def test_nothing_measured_is_nothing_shown(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, versions=2)
    write_tree(plan)
    assert downstream_table(collect(plan)) is None
    report = make_report(plan, datetime(2026, 11, 23, tzinfo=UTC))
    page = write_report(report, tmp_path / "report")
    assert "Downstream" not in page.read_text()
    assert not (tmp_path / "report/data/downstream.csv").exists()


def test_page_markdown_and_csv_have_it(plan: Plan) -> None:
    page = write_report(make_report(plan, datetime(2026, 11, 23, tzinfo=UTC)), Path(plan.output) / "report")
    for path in (page, page.with_name("report.md")):
        text = path.read_text()
        assert "Downstream benchmarks" in text
        assert "21.84" in text
        assert "data/downstream.csv" in text
    found = list(csv.DictReader(io.StringIO((page.parent / "data/downstream.csv").read_text())))
    assert len(found) == 6
    ours = next(row for row in found if row["paradigm"] == "ours" and row["task"] == "gsm8k")
    assert (float(ours["score"]), ours["benchmark"], ours["limit"]) == (0.0508, "GSM8K", "")
    assert downstream_csv(collect(plan)).count("\n") == 7


def test_fine_tuned_versions_have_a_table_of_their_own(plan: Plan) -> None:
    tree = collect(plan)
    branch = tree.model_of("ours", "v2")
    assert branch
    tuned = replace(tree, tuned=[branch])  # a fine-tuning's record has the same form
    table = downstream_table(tuned)
    assert table
    assert [row[0].text for row in table.rows] == ["v2", "", "", "v2, fine-tuned"]
    assert not any(cell.best for cell in table.rows[-1])
    assert downstream_csv(tuned).count(",yes,") == 2


def test_damaged_results_are_no_results(plan: Plan) -> None:
    for text in ("{", "[]", '{"step": 120, "results": {"gsm8k": {"score": "high"}, "x": 1}}'):
        (plan.folder(plan.run("ours", "branch-v2")) / "downstream.json").write_text(text)
        assert [row[1] for row in rows(plan)[1:]] == ["PTFS", "CPT (ResetMax)"]

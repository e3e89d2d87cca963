"""Foreign content in an output folder is executed nowhere: not in the page, not in a spreadsheet."""

from __future__ import annotations

import csv
import io
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from megatron_lrpath.plan import Plan
from megatron_lrpath.report.page import make_report, write_report
from megatron_lrpath.report.style import ADVICE
from megatron_lrpath.report.tables import csv_text
from megatron_lrpath.sealed import write_sealed
from tests.support.report_tree import write_plan

HOSTILE = (
    '<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><script>alert(2)</script>'
    '<foreignObject><iframe src="https://elsewhere.example/"/></foreignObject></svg>'
)


@pytest.fixture
def page(tmp_path: Path) -> str:
    """Return the page of a plan with foreign advice."""
    plan: Plan = write_plan(tmp_path)
    folder = Path(plan.output) / ADVICE
    folder.mkdir(parents=True)
    (folder / f"{ADVICE}.svg").write_text(HOSTILE)
    (folder / f"{ADVICE}.png").write_bytes(b"\x89PNG")
    (folder / f"{ADVICE}.csv").write_text("a,b\n")
    about = {
        "written": "<b>now</b>",
        "title": "t",
        "caption": '"><script>alert(3)</script>',
        "sentences": ["<i>s</i>"],
    }
    write_sealed(folder / f"{ADVICE}.json", about)
    written = write_report(make_report(plan, datetime(2026, 11, 28, tzinfo=UTC)), tmp_path / "report")
    return written.read_text()


def test_a_figure_from_a_file_is_an_image_and_never_markup(page: str) -> None:
    assert "data:image/svg+xml;base64," in page
    for word in ("<script", "onload=", "<foreignObject", "<iframe", "<b>now", "<i>s"):
        assert word not in page


def test_the_page_lets_nothing_run_and_nothing_load(page: str) -> None:
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    assert policy
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert "script-src" not in rules
    assert page.index("Content-Security-Policy") < page.index("<style>")


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1+cmd|' /C calc'!A0", "@SUM(A1)", "\t=1", "\r=1"])
def test_text_is_no_formula_to_a_spreadsheet(cell: str) -> None:
    rows = list(csv.reader(io.StringIO(csv_text(("name", cell), [(cell, -1.5), ("plain", 2)]), newline="")))
    text = cell.replace("\r", " ")
    assert rows[0][1] == f"'{text}"
    assert rows[1] == [f"'{text}", "-1.5"]
    assert rows[2] == ["plain", "2"]

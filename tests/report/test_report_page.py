"""The report's page is complete, self-contained, safe, and shows clearly what is missing or wrong."""

from __future__ import annotations

import argparse
import csv
import json
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_lrpath.commands import report as command
from megatron_lrpath.plan import Plan, load_plan
from megatron_lrpath.report.collect import collect, gaps
from megatron_lrpath.report.page import Report, make_report, markdown_text, write_report
from tests.support.report_tree import score, write_plan, write_slices, write_tree

NOW = datetime(2026, 11, 23, 12, 30, tzinfo=UTC)
FIGURES = ("learning-rates", "perplexity-cost", "loss-curves")


def written(plan: Plan, report: Report | None = None) -> tuple[str, str]:
    """Write the report (a new one if none is given); return the page and the Markdown."""
    folder = Path(plan.output) / "report"
    page = write_report(report or make_report(plan, NOW), folder)
    return page.read_text(), (folder / "report.md").read_text()


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    made = write_plan(tmp_path_factory.mktemp("plan"))
    write_tree(made)
    write_slices(made)
    return made


@pytest.fixture(scope="module")
def report(plan):
    return make_report(plan, NOW)


@pytest.fixture(scope="module")
def pages(plan, report):
    return written(plan, report)


class Tags(HTMLParser):
    """Collects tags with their attributes, and reports whether all are closed."""

    VOID = ("meta", "link", "br", "img", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def tags(page: str) -> Tags:
    parser = Tags()
    parser.feed(page)
    assert parser.open == []
    return parser


def test_the_page_needs_nothing_from_elsewhere(pages):
    for tag, attributes in tags(pages[0]).found:
        assert tag not in ("script", "link", "img", "iframe")
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name) or ""
            assert not re.match(r"(?!data:text/csv)[a-z]+:|//", target), target
    assert "@import" not in pages[0]
    assert not re.search(r"url\((?!#)", pages[0])


def test_every_link_leads_somewhere(plan, pages):
    folder = Path(plan.output) / "report"
    anchors = [attributes for tag, attributes in tags(pages[0]).found if tag == "a"]
    links = [attributes["href"] for attributes in anchors if "download" not in attributes]
    links += re.findall(r"\]\(([^)]*)\)", pages[1])
    assert len(links) >= 10
    for link in links:
        assert (folder / link).is_file(), link


def test_ids_are_unique_over_all_figures(pages):
    ids = [attributes["id"] for _, attributes in tags(pages[0]).found if "id" in attributes]
    assert len(ids) == len(set(ids)) > 100


def test_figures_are_in_the_page_next_to_it_and_as_data(plan, pages):
    folder = Path(plan.output) / "report"
    assert pages[0].count("<svg ") == len(FIGURES)
    for name in FIGURES:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"]({name}.png)" in pages[1]
        assert len((folder / "data" / f"{name}.csv").read_text().splitlines()) > 3


def test_figures_name_their_axes_with_units(pages):
    for label in (
        "learning rate (10⁻³)",
        "training step (each of 8,192 tokens)",
        "loss (nats per token)",
        "relative cost (training steps over those of PTFS)",
        "mean perplexity, v2 to v4",
    ):
        assert label in pages[0]


def test_the_data_of_figure_1_hold_every_step_as_planned_and_as_trained(plan, pages):
    with (Path(plan.output) / "report" / "data" / "learning-rates.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["run"] == "ours/branch-v2"]
    run = plan.run("ours", "branch-v2")
    assert [int(row["step"]) for row in rows] == list(range(run.first_step + 1, run.last_step + 1))
    for row in rows:
        assert float(row["recorded_lr"]) == float(row["planned_lr"]) == run.path.lr_at(int(row["step"]) - 1)


def test_page_and_markdown_agree(report, pages):
    cells = [
        cell.text
        for table in (report.results, report.runs, report.data)
        for row in table.rows
        for cell in row
    ]
    for text in [*cells, report.result, report.rate_check.headline, *report.facts.values()]:
        assert text in pages[0].replace("&#39;", "'").replace("&amp;", "&")
        assert markdown_text(text) in pages[1]


def test_markdown_tables_are_well_formed(pages):
    for block in re.findall(r"(?:^\|.*\n)+", pages[1], flags=re.MULTILINE):
        lines = block.splitlines()
        assert re.fullmatch(r"\|( -+:? \|)+", lines[1])
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert pages[1].count("| --- |") + pages[1].count("| ---: |") >= 5


def test_the_best_is_bold_in_both(pages):
    best = re.findall(r"<td class=\"number\"><strong>([\d.]+)</strong>", pages[0])
    assert len(best) >= 4
    for value in best:
        assert f"**{value}**" in pages[1]


def test_a_whole_report_has_a_good_check_and_no_gaps(pages):
    assert 'class="notice good"' in pages[0]
    assert "partial" not in pages[1]
    assert 'class="notice partial"' not in pages[0]


def test_wrong_rates_are_red_and_named(tmp_path):
    plan = write_plan(tmp_path, versions=2)
    write_tree(plan)
    path = plan.folder(plan.run("ours", "branch-v2")) / "history.jsonl"
    rows = [json.loads(line) | {"lr": 5e-4} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page, markdown = written(plan)
    assert 'class="notice bad"' in page
    assert "ours/branch-v2: at step" in page
    assert "Check failed" in markdown


def test_nothing_trained_is_a_partial_report_without_numbers(tmp_path):
    plan = write_plan(tmp_path)
    (tmp_path / "runs").mkdir()
    page, markdown = written(plan)
    assert "This report is partial" in page
    assert "12 runs not finished" in page
    assert f"Next: <code>lrpath run {plan.path}</code>" in page
    assert page.count("<svg ") == 1  # the planned rates
    assert not re.search(r"<td class=\"number\">(<strong>)?\d+\.\d+<", page)
    assert "perplexity-cost" not in markdown


def test_a_report_without_evaluations_draws_rates_and_losses(tmp_path):
    plan = write_plan(tmp_path, versions=2)
    write_tree(plan, evaluate=False)
    page, _ = written(plan)
    assert page.count("<svg ") == 2
    assert "5 trained models without a perplexity" in page


def test_a_set_that_was_added_is_named_where_it_is_missing(tmp_path):
    plan = write_plan(tmp_path, versions=2)
    write_tree(plan)
    text = plan.path.read_text().replace(f"valid: {plan.data.valid}", f"valid: [{plan.data.valid}, valid-v2]")
    plan.path.write_text(text)
    said = [gap.text for gap in gaps(collect(load_plan(plan.path)))]
    assert len(said) == 1
    assert said[0].startswith("5 trained models not evaluated on valid-v2: ")


def test_the_main_paths_evaluated_checkpoints_are_in_the_loss_curves(tmp_path):
    plan = write_plan(tmp_path, versions=2)
    write_tree(plan)
    found = {"30": {"loss": 3.25}, "31": {"loss": "low"}, "x": {"loss": 3.0}, "32": 3.0}
    (plan.folder(plan.run("ours", "main")) / "evals.json").write_text(json.dumps(found))
    written(plan)
    with (Path(plan.output) / "report" / "data" / "loss-curves.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["run"] == "ours/main"]
    assert {row["step"]: row["valid_loss"] for row in rows if row["valid_loss"]} == {"30": "3.25"}


def test_what_users_name_is_escaped(tmp_path):
    plan = write_plan(tmp_path, versions=2)
    write_tree(plan)
    evil = "<script>alert(1)</script> & | *x* `y`\nz"
    run = plan.run("ours", "branch-v2")
    value = {"step": run.last_step, **score(3.0, 204_800), "domains": {evil: score(3.0, 10)}}
    (plan.folder(run) / "eval.json").write_text(json.dumps(value))
    path = plan.folder(run) / "lineage.json"
    path.write_text(path.read_text().replace("2.15.0", "</style><b>"))
    page, markdown = written(plan)
    assert "<script>" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; | *x*" in page
    assert r"\<script\>alert(1)\</script\> \& \| \*x\* \`y\` z" in markdown
    tags(page)


@pytest.mark.parametrize(("versions", "drawings"), [(1, 2), (9, 3)])
def test_any_number_of_versions_is_reported(tmp_path, versions, drawings):
    plan = write_plan(tmp_path, versions=versions, steps=30, warmup=5)
    write_tree(plan)
    report = make_report(plan, NOW)
    assert len(report.drawings) == drawings
    assert f"v{versions}" in report.rates.svg


def test_a_loss_that_is_not_finite_keeps_the_figure(tmp_path):
    plan = write_plan(tmp_path, versions=1)
    write_tree(plan)
    path = plan.folder(plan.run("ours", "main")) / "history.jsonl"
    lines = path.read_text().splitlines()
    rows = [
        json.loads(line) | {"loss": float("nan") if i % 3 else float("inf")} for i, line in enumerate(lines)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page, _ = written(plan)
    assert page.count("<svg ") == 2


def test_the_same_runs_give_the_same_report(plan, pages):
    assert written(plan) == pages


def test_the_command_writes_prints_and_succeeds(plan, capsys, tmp_path):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.execute(parser.parse_args([str(plan.path), "--output", str(tmp_path / "out")])) == 0
    printed = capsys.readouterr().out
    assert "CPT (ResetMax)" in printed
    assert "0.58×" in printed
    assert "The learning rates are the planned ones" in printed
    assert str(tmp_path / "out" / "index.html") in printed.replace("\n", "")
    assert (tmp_path / "out" / "index.html").is_file()


def test_the_default_place_is_in_the_plans_output(plan, report, monkeypatch):
    monkeypatch.setattr("megatron_lrpath.report.page.make_report", lambda *_: report)
    page = Path(plan.output) / "report" / "index.html"
    page.unlink(missing_ok=True)
    assert command.execute(argparse.Namespace(plan=plan.path, output=None, paradigm=None)) == 0
    assert page.is_file()

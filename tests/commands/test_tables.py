"""Tables in a terminal of 80 columns: nothing wider, nothing cut off, one style, paradigms in one order."""

from __future__ import annotations

import re

import pytest

from megatron_lrpath.cli import main
from tests.support.report_tree import write_plan, write_tree

ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
NARROWER = re.compile(r"[┏┃│─━]|\w…")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    plan = write_plan(tmp_path_factory.mktemp("tables"), steps=600)
    write_tree(plan)
    return plan.path


@pytest.fixture
def fresh(tmp_path):
    return write_plan(tmp_path, steps=12_000, warmup=1000).path


@pytest.mark.parametrize(
    ("words", "which"),
    [
        (["plan", "--no-curves"], "fresh"),
        (["status"], "fresh"),
        (["status"], "trained"),
        (["report"], "trained"),
        (["lr", "--run", "main"], "fresh"),
        (["doctor"], "fresh"),
        (["budget"], "fresh"),
    ],
)
def test_every_table_fits_80_columns(request, monkeypatch, capsys, words, which):
    path = request.getfixturevalue(which)
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "80", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    assert main([words[0], str(path), *words[1:]]) in (0, 1)
    shown = ESCAPES.sub("", capsys.readouterr().out).splitlines()
    assert not [line for line in shown if len(line.rstrip()) > 80 and str(path.parent) not in line]
    assert not [line for line in shown if NARROWER.search(line)]


def test_paradigms_come_in_one_order(trained, fresh, capsys):
    for command, path, title in (
        ("plan", fresh, "Cost"),
        ("status", trained, "run "),
        ("report", trained, "Schedule"),
    ):
        assert main([command, str(path)]) == 0
        shown = capsys.readouterr().out
        rows = shown[shown.index(title) + len(title) :].lower().split("relative to ptfs")[-1]
        places = [rows.index(name) for name in ("ours", "ptfs", "cpt")]
        assert places == sorted(places), command


def test_a_whole_report_ends_with_what_comes_next(trained, capsys):
    assert main(["report", str(trained)]) == 0
    assert capsys.readouterr().out.endswith(f"next: lrpath export {trained}, or new data: lrpath update\n")

"""The reproduction's statistics, its validation on whole documents, and its tables in the documents."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of examples/reproduction."""
    monkeypatch.syspath_prepend(str(ROOT / "examples/reproduction"))
    return importlib.import_module


def test_differences_are_judged_as_scipy_judges_them(script: Any) -> None:
    above, below = (2.61, 2.64, 2.60, 2.67), (2.58, 2.63, 2.59, 2.60)
    difference = script("certainty").Difference
    paired, apart = (difference(above, below, paired) for paired in (True, False))
    for mine, theirs in (
        (paired, stats.ttest_rel(above, below)),
        (apart, stats.ttest_ind(above, below, equal_var=False)),
    ):
        assert mine.p == pytest.approx(theirs.pvalue)
        interval = theirs.confidence_interval()
        assert (mine.mean - mine.half, mine.mean + mine.half) == pytest.approx((interval.low, interval.high))


def test_seeds_that_would_settle_a_difference_are_those_of_the_power_tables(script: Any) -> None:
    difference = script("certainty").Difference
    paired = difference((2.0, 0.0, 1.0), (0.0, 0.0, 0.0), paired=True)  # mean 1, deviation 1
    assert paired.seeds_to_settle() == 10
    apart = difference((2.0, 0.0, 1.0), (1.0, -1.0, 0.0), paired=False)  # mean 1, deviation 1 on either side
    assert apart.seeds_to_settle() == 17
    assert difference((1.0, -1.0), (0.0, 0.0), paired=True).seeds_to_settle() is None


def test_holm_stops_at_the_first_finding_that_fails(script: Any) -> None:
    assert script("certainty").holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]


def test_a_finding_that_only_its_own_interval_supports_is_marked(script: Any) -> None:
    findings, difference = script("findings"), script("certainty").Difference
    clear = difference((1.0, 1.001, 0.999), (0.0, 0.0, 0.0), paired=True)
    alone = difference((0.01, 0.013, 0.007), (0.0, 0.0, 0.0), paired=True)
    cells = findings.finding_rows(
        [findings.Finding("a", "clear", clear), *(findings.Finding(name, "alone", alone) for name in "bcd")]
    )
    assert [row[-1] for row in cells] == ["holds", *["holds, by its own interval only"] * 3]


def test_all_pages_of_a_document_are_on_one_side(script: Any) -> None:
    whole = script("whole")
    documents = [(f"novel-{number % 50}", [f"{number % 50}/{number}"]) for number in range(200)]
    sides = whole.split(documents)
    names = {out: {page.partition("/")[0] for page in pages} for out, pages in sides.items()}
    assert all(names.values())
    assert not names[True] & names[False]
    assert sum(map(len, sides.values())) == 200


def test_the_main_setting_comes_first_once_it_is_measured(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, costs, measured = map(script, ("main_setting", "costs", "measured"))
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    models = {
        "r20-ptfs": [("cosine", "ptfs", 10.0), ("knee", "ptfs", 9.9)],
        "r20-ours": [
            ("cosine_alpha0.6", "ours", 10.2),
            ("minus-sqrt_by-version", "ours", 9.95),
            ("minus-sqrt_by-version_to-0.01", "ours", 9.9),
        ],
        "r20-cpt": [("reset-max", "cpt", 10.8)],
        **{f"r20-at-ours-rates-v{v}": [("cosine_alpha0.6", "ptfs", 10.2)] for v in (2, 3, 4)},
    }
    for name, rows in models.items():
        lines = ["processor,seed,variation,paradigm,relative_cost,version,perplexity"]
        for seed, factor in ((1, 1.0), (2, 1.001), (3, 0.999)):
            lines += [
                f"cpu,{seed},{variation},{paradigm},0.5,{version},{value * factor}"
                for variation, paradigm, value in rows
                for version in (name[-2:],) * ("rates" in name) or ("v2", "v3", "v4")
            ]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    found = {one.says: one.difference for one in setting.main_findings(setting.load())}
    assert {one.seeds for one in found.values()} == {3}
    percent = {says: script("certainty").in_percent(one.mean) for says, one in found.items()}
    assert percent["Ours is not behind PTFS"] == pytest.approx(100 * (10 / 10.2 - 1))
    schedule = percent["The cosine is a better schedule for PTFS than ours' rates"]
    assert schedule == pytest.approx(100 * (10.2 / 10 - 1))
    goal = percent["α by version (cost 0.495; 1−√ to a tenth) is within 1% of a better PTFS"]
    assert goal == pytest.approx(100 * (1.01 * 9.9 / 9.95 - 1))
    deeper = percent["α by version (cost 0.495; 1−√ to a hundredth) is within 1% of a better PTFS"]
    assert deeper == pytest.approx(100 * (1.01 * 9.9 / 9.9 - 1))
    assert [name for name, *_ in costs.lines()][-1] == "PTFS, knee"
    assert setting.parts_said().startswith("In the main setting, mean of v2 to v4 (3 seeds)")


def test_old_text_is_that_of_earlier_versions_and_new_text_is_the_versions_own(script: Any) -> None:
    drift = script("drift")
    for weights in drift.TEXTS.values():
        assert math.isclose(sum(weights.values()), 1)
        for version in drift.LATER:  # every version counts equally
            mine = [weight for place, weight in weights.items() if place.startswith(version)]
            assert math.isclose(sum(mine), 1 / 3)
    assert set(drift.TEXTS["old text"]) == {"v2/v1", "v3/v1", "v3/v2", "v4/v1", "v4/v2", "v4/v3"}
    assert set(drift.TEXTS["new text"]) == {"v2/v2", "v3/v3", "v4/v4"}
    measured = drift.load()
    for model in drift.MODELS.values():
        assert measured.difference(drift.on("old text", model), drift.on("old text", model), True).seeds == 3


def test_the_documents_have_the_tables_of_the_results(script: Any) -> None:
    tables = script("tables")
    for name in tables.DOCUMENTS:
        text = (tables.DOCS / name).read_text(encoding="utf-8")
        blocks = list(tables.BLOCK.finditer(text))
        assert blocks
        for block in blocks:
            if block[2] not in ("effort", "progress"):  # these load every experiment
                maker = tables.MAKERS.get(block[2], lambda block=block: tables.perplexities(block[2]))
                assert block[0] == f"{block[1]}{maker()}{block[3]}", f"{name}: {block[2]}; run tables.py"


def test_a_difference_is_shown_in_percent_of_the_perplexity(script: Any) -> None:
    certainty = script("certainty")
    one = certainty.Difference((math.log(1.02),), (0.0,), paired=True)
    assert certainty.difference_said(one) == "+2.00%"

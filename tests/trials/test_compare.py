"""The comparison of a trial's candidates: intervals from the pairing, the best rate, and missing results."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import Plan
from megatron_lrpath.report.page import make_report, write_report
from megatron_lrpath.report.trials import trial_part, trial_parts
from megatron_lrpath.trials.compare import best_rate, compare, half_width
from megatron_lrpath.trials.record import AUDITION, PROBE, WHOLE, Candidate, Trial, read_trial, trials_of
from tests.support.plan_text import plan_with

RATES = tuple(Candidate(f"rate{ratio:g}", 1e-3 * ratio, "v2") for ratio in (1, 0.7, 1.4))
PROBING = Trial(PROBE, "probe-100-abc", 100, 20, 10, 3, RATES)
DATA = (Candidate("v3", 1e-3, "v3"), Candidate("v3-replay0.2", 1e-3, "v3", "0.2"))
AUDITIONING = Trial(AUDITION, "audition-90-abc", 90, 20, 20, 3, DATA)


def evaluate(plan: Plan, trial: Trial, candidate: Candidate, repeat: int, loss: float, old: float) -> None:
    """Write an evaluation as a branch does: the whole set, two domains, and the set of the new text."""
    folder = trial.run_folder(plan, candidate, repeat)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"new": {"loss": loss}, "old": {"loss": old}}
    found = {
        "step": trial.begin + trial.steps,
        "loss": loss,
        "domains": parts,
        "sets": {"valid-v3": {"loss": loss}},
    }
    (folder / "eval.json").write_text(json.dumps(found))


def fill(plan: Plan, trial: Trial, table: list[list[float]]) -> None:
    """Write losses [candidates][repeats]; the domain `old` is 2.5 for the first candidate, else 2.6."""
    trial.write(plan)
    for candidate, row in zip(trial.candidates, table, strict=True):
        for repeat, loss in enumerate(row, start=1):
            evaluate(plan, trial, candidate, repeat, loss, 2.5 if candidate is trial.candidates[0] else 2.6)


def test_with_two_candidates_the_interval_is_that_of_the_paired_t_test() -> None:
    losses = np.array([[2.50, 2.61, 2.43, 2.57], [2.48, 2.60, 2.40, 2.56]])
    test = stats.ttest_rel(losses[1], losses[0]).confidence_interval(0.95)
    half = half_width(losses)
    assert half is not None
    gap = float((losses[1] - losses[0]).mean())
    assert [gap - half, gap + half] == pytest.approx([test.low, test.high], rel=1e-9)


def test_what_all_candidates_share_in_a_repeat_does_not_widen_the_interval() -> None:
    generator = np.random.default_rng(0)
    noise = generator.normal(0, 0.001, size=(4, 5))
    shared = generator.normal(0, 0.5, size=(1, 5))
    calm, wild = half_width(noise), half_width(noise + shared)
    assert calm is not None
    assert wild == pytest.approx(calm, rel=1e-9)
    assert half_width(noise[:, :1]) is None
    assert half_width(noise[:1]) is None


def test_intervals_hold_the_true_difference_95_times_in_100() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(2000):
        losses = generator.normal(0, 1, size=(3, 1)) * 0 + np.array([[2.0], [2.1], [1.9]])
        losses = losses + generator.normal(0, 0.3, size=(1, 3)) + generator.normal(0, 0.02, size=(3, 3))
        half = half_width(losses)
        assert half is not None
        hits += abs(float((losses[1] - losses[0]).mean()) - 0.1) <= half
    assert 0.935 < hits / 2000 < 0.965


def test_the_best_rate_is_the_lowest_point_of_the_parabola_with_its_interval() -> None:
    rates = [1e-3, 7e-4, 1.4e-3]
    lowest = np.log([9e-4, 1.0e-3, 1.1e-3])
    losses = np.array([[2 + 0.3 * (math.log(rate) - place) ** 2 for place in lowest] for rate in rates])
    found = best_rate(rates, losses)
    assert found is not None
    assert found.rate == pytest.approx(math.exp(lowest.mean()), rel=1e-9)
    exact = stats.ttest_1samp(lowest, 0).confidence_interval(0.95)
    assert [found.low, found.high] == pytest.approx([math.exp(exact.low), math.exp(exact.high)], rel=1e-9)
    single = best_rate(rates, losses[:, :1])
    assert single is not None
    assert (single.low, single.high) == (None, None)
    assert best_rate(rates, -losses) is None  # no lowest point
    assert best_rate(rates, np.array([[2.0], [1.9], [2.2]])) is None  # it lies below the tried rates
    assert best_rate(rates[:2], losses[:2]) is None


def test_a_probe_prints_what_to_write(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, output=str(tmp_path / "runs"))
    fill(plan, PROBING, [[2.50, 2.40, 2.60], [2.4801, 2.38, 2.5799], [2.55, 2.45, 2.65]])
    comparison = compare(plan, PROBING)
    assert comparison.best == "rate0.7"
    text = " ".join(trial_part(plan, comparison).sentences)
    assert "rate0.7 is best on `all`: −1.98%" in text
    assert "noise" not in text
    assert "write `max_lr: 0.0007` into its entry" in text
    assert "at the end of the range" in text
    fill(plan, PROBING, [[2.50, 2.40, 2.60], [2.60, 2.39, 2.5], [2.55, 2.5, 2.65]])
    text = " ".join(trial_part(plan, compare(plan, PROBING)).sentences)
    assert "that may be noise" in text
    assert "Keep the rate as it is" in text


def test_an_audition_shows_every_text_and_waits_for_complete_repeats(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, output=str(tmp_path / "runs"))
    fill(plan, AUDITIONING, [[2.50, 2.40, 2.60], [2.48, 2.3805, 2.58]])
    comparison = compare(plan, AUDITIONING)
    assert list(comparison.texts) == [WHOLE, "new", "old", "valid-v3"]
    whole = comparison.texts[WHOLE]
    assert whole["v3"].perplexity == pytest.approx(math.exp(2.5))
    gap = whole["v3-replay0.2"].difference
    assert gap is not None
    assert gap.is_clear
    assert gap.middle == pytest.approx(math.expm1(-0.0595 / 3), rel=1e-9)
    part = trial_part(plan, comparison)
    shown = [[cell.text for cell in row] for row in part.table.rows]
    assert shown[0] == ["v3", "all", "12.18", "", ""]
    assert shown[6][:4] == ["", "old", "13.46", "+10.52%"]
    assert part.table.rows[5][3].best
    assert "v3-replay0.2 is worse than v3 on old by +10.52%" in " ".join(part.sentences)
    assert part.drawing is not None
    assert part.drawing.data.splitlines()[0] == "text,candidate,difference,low,high"
    assert len(part.drawing.data.splitlines()) == 5
    (AUDITIONING.run_folder(plan, DATA[1], 2) / "eval.json").unlink()
    partial = compare(plan, AUDITIONING)
    assert partial.missing == 1
    assert partial.texts[WHOLE]["v3"].repeats == 2
    assert partial.texts[WHOLE]["v3"].perplexity == pytest.approx(math.exp(2.55))
    for candidate, repeat in AUDITIONING.points:  # level on the old text
        evaluate(
            plan, AUDITIONING, candidate, repeat, 2.48 if candidate is DATA[1] else 2.5 + repeat / 1000, 2.5
        )
    said = " ".join(trial_part(plan, compare(plan, AUDITIONING)).sentences)
    assert "take the slice v3, with `replay: 0.2`" in said
    for repeat in (1, 2, 3):
        (AUDITIONING.run_folder(plan, DATA[1], repeat) / "eval.json").unlink()
    assert trial_parts(plan) == []  # nothing to compare


def test_the_report_shows_a_trial_with_its_figure_and_data(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, output=str(tmp_path / "runs"))
    fill(plan, PROBING, [[2.50, 2.40, 2.60], [2.4801, 2.38, 2.5799], [2.55, 2.45, 2.65]])
    page = write_report(make_report(plan, datetime(2026, 11, 29, tzinfo=UTC)), tmp_path / "report")
    text, markdown = page.read_text(), (tmp_path / "report/report.md").read_text()
    for found in (text, markdown):
        assert "Probe from step 100" in found
        assert "−1.98%" in found
    assert '<figure id="probe-100-abc">' in text
    assert "![Differences of the probe from step 100](probe-100-abc.png)" in markdown
    assert (tmp_path / "report/probe-100-abc.png").read_bytes().startswith(b"\x89PNG")
    rows = (tmp_path / "report/data/probe-100-abc.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:3]] == [["all", "rate0.7"], ["all", "rate1.4"]]


def test_a_record_that_was_changed_is_refused_and_left_out(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, output=str(tmp_path / "runs"))
    PROBING.write(plan)
    folder = PROBING.folder(plan)
    assert read_trial(folder) == PROBING
    assert read_trial(tmp_path) is None
    record = folder / "trial.json"
    record.write_text(record.read_text().replace('"begin": 100', '"begin": 101'))
    with pytest.raises(UserError, match="Remove the folder"):
        read_trial(folder)
    assert trials_of(plan) == []
    record.write_text('{"candidates": [], "kind": 3}')
    with pytest.raises(UserError, match="no record of a trial"):
        read_trial(folder)

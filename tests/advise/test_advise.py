"""The advice: predictions that hold for held-out curves, targets that are met, and refusals with a reason."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_lrpath.advise.advice import Advice, advise, all_curves, choose
from megatron_lrpath.advise.curves import JITTER
from megatron_lrpath.advise.fit import PARAMETERS
from megatron_lrpath.advise.model import DRIFT, GAIN_SPREAD, build_model
from megatron_lrpath.advise.predict import gap_intervals, own_decay, relative_cost
from megatron_lrpath.advise.read import read_curves, scale_of
from megatron_lrpath.advise.show import fitted, hint
from megatron_lrpath.cli import main
from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import Plan
from megatron_lrpath.report.style import read_advice
from megatron_lrpath.runs.checkpoints import MANIFEST, complete_steps
from tests.support.advise_fixtures import LEVELS, TRUTH, small_plan, true_losses, write_history, write_losses

GAIN = PARAMETERS.index("ln B")


@pytest.fixture(scope="module")
def advice(trained: Plan) -> Advice:
    return advise(trained, floors=(0.0,))


def true_mean(folder: Path, alpha: float) -> float:
    """Return the mean final loss of versions 2 to 4 at this alpha, by the law itself."""
    plan = small_plan(folder, alpha=alpha, name=f"at{alpha}")
    branches = [run for run in plan.runs("ours") if run.kind == "branch"][1:]
    return float(np.mean([true_losses(plan, run)[-1] for run in branches]))


def test_every_alpha_is_predicted_within_half_a_percent(advice: Advice, tmp_path: Path) -> None:
    for one in advice.own:
        if one.alpha in (0.1, 0.3, 0.6, 0.9):
            assert one.loss == pytest.approx(true_mean(tmp_path, one.alpha), rel=0.005)


def test_the_intervals_hold_the_true_losses(trained: Plan, advice: Advice) -> None:
    own = next(one for one in advice.own if one.alpha == trained.alpha)
    for run, prediction in zip(trained.runs("ours")[1:], own.versions, strict=True):
        assert prediction is not None
        assert prediction.low <= true_losses(trained, run)[-1] <= prediction.high
        assert prediction.high - prediction.low < 0.05 * prediction.loss


def test_later_versions_are_predicted_from_the_first(trained: Plan) -> None:
    held = advise(trained, fit_on="v1")
    assert [curve.name for curve in held.model.data.sources] == ["main", "branch-v1"]
    assert [check.run for check in held.checks] == ["branch-v2", "branch-v3", "branch-v4"]
    errors = [abs(check.error) for check in held.checks]
    assert max(errors) < 0.035  # the versions' texts differ in level by up to 1.6%, which cannot be predicted


def test_intervals_widen_with_versions_of_unknown_level(trained: Plan, advice: Advice) -> None:
    held = advise(trained, fit_on="v1")
    own = next(one for one in held.own if one.alpha == trained.alpha)
    widths = [one.high - one.low for one in own.versions if one]
    assert widths == sorted(widths)
    assert widths[3] > 2 * widths[0]
    assert [held.model.unknown(index) for index in range(4)] == pytest.approx(
        [0, DRIFT, DRIFT * np.log2(3), 2 * DRIFT]
    )
    assert advice.model.unknown(3) == 0  # the version's losses exist
    for run, prediction in zip(trained.runs("ours")[1:], own.versions, strict=True):
        assert prediction is not None
        assert prediction.low <= true_losses(trained, run)[-1] <= prediction.high
    assert all(check.inside == (check.low <= check.measured <= check.high) for check in held.checks)


def evaluate(plan: Plan, drift: float = 0.0) -> dict[str, float]:
    """Write evaluations of all branches on one text; return their losses.

    The text is 0.08 nats harder than the first version's, and `drift` nats more with each doubling of the
    version.
    """
    truth = {}
    for run in plan.runs("ours")[1:]:
        index = run.version_index - 1
        level = np.resize(LEVELS, len(plan.versions))[index]
        loss = float(true_losses(plan, run)[-1] - level + 0.08 + drift * np.log2(index + 1))
        evaluation = {"step": run.last_step, "loss": loss, "perplexity": float(np.exp(loss))}
        (plan.folder(run) / "eval.json").write_text(json.dumps(evaluation))
        truth[run.name] = loss
    return truth


def test_validation_losses_are_predicted_once_a_branch_was_evaluated(tmp_path: Path) -> None:
    """The validation text has its own level, independent of the levels of the versions' texts."""
    plan = small_plan(tmp_path)
    write_losses(plan)
    truth = evaluate(plan)
    held = advise(plan, fit_on="v1")
    assert held.to_dict()["losses_of"] == "validation"
    assert {one.run: one.measured for one in held.checks} == {
        name: value for name, value in truth.items() if name != "branch-v1"
    }
    assert max(abs(one.error) for one in held.checks) < 0.015
    own = next(one for one in held.own if one.alpha == plan.alpha)
    for prediction, value in zip(own.versions, truth.values(), strict=True):
        assert prediction is not None
        assert prediction.low <= value <= prediction.high


STEPS = tuple(range(80, 1361, 80))
STRONG = np.where(np.arange(len(TRUTH)) == GAIN, np.log(0.5), TRUTH)
"""Parameters of a law whose decays gain more than the steps at a lower rate lose."""


def evaluate_main_path(
    plan: Plan, steps: Sequence[int] = STEPS, share: float = 1.0, lower: float = 0.0
) -> None:
    """Write evaluations of the main path and of all branches, which gain `share` of their training gain.

    The validation text is 0.08 nats harder, and falls by `lower` nats more per doubling of the steps.
    """

    def text(step: int) -> float:
        return 0.08 - lower * float(np.log2(step / 400))

    main_run, ends = plan.run("ours", "main"), plan.timeline.ends
    full = true_losses(plan, replace(main_run, last_step=ends[-1]), STRONG)
    full -= np.array(LEVELS)[np.searchsorted(ends, np.arange(1, ends[-1] + 1))]
    jitter = np.exp(np.random.default_rng(5).normal(0, JITTER, ends[-1]))
    found = {step: {"loss": float(full[step - 1] * jitter[step - 1]) + text(step)} for step in steps}
    (plan.folder(main_run) / "evals.json").write_text(json.dumps(found))
    for run in plan.runs("ours")[1:]:
        end = true_losses(plan, run, STRONG)[-1] - LEVELS[run.version_index - 1]
        gain = full[run.last_step - 1] - end
        loss = float(end + (1 - share) * gain + text(run.last_step))
        (plan.folder(run) / "eval.json").write_text(json.dumps({"step": run.last_step, "loss": loss}))


def errors(advice: Advice) -> list[float]:
    """Return the errors of the branches that were held out."""
    assert len(advice.checks) == 3
    assert all(check.inside for check in advice.checks)
    return [abs(check.error) for check in advice.checks]


def test_the_evaluated_main_path_determines_the_level_and_the_share_of_the_gain(tmp_path: Path) -> None:
    """Validation gains less by a decay, and falls further along the path, than training."""
    plan = small_plan(tmp_path)
    write_losses(plan, STRONG)
    evaluate_main_path(plan, share=0.85, lower=0.02)
    found = advise(plan, fit_on="v1").model
    assert found.evaluated
    assert found.share[0] == pytest.approx(0.85, abs=0.07)
    with_path = errors(advise(plan, fit_on="v1"))
    (plan.folder(plan.run("ours", "main")) / "evals.json").unlink()
    without = errors(advise(plan, fit_on="v1"))
    assert max(with_path) < 0.01
    assert sum(with_path) < 0.5 * sum(without)


def test_few_evaluated_checkpoints_change_nothing(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    write_losses(plan, STRONG)
    evaluate_main_path(plan, steps=())
    without = advise(plan).to_dict()
    assert without["main_path_evaluated"] is False
    for steps in ((160, 240, 400), (1000, 1120, 1200, 1360)):
        evaluate_main_path(plan, steps=steps)
        assert advise(plan).to_dict() == without
    evaluate_main_path(plan, steps=(200, 240, 320, 400))
    assert advise(plan).to_dict()["main_path_evaluated"] is True
    assert "the level of validation to 4 checkpoints of the main path" in fitted(advise(plan))


def test_a_main_path_evaluated_only_early_hardly_determines_the_share(tmp_path: Path) -> None:
    """Far beyond its last evaluated checkpoint the law of the main path is uncertain; gaps do not change."""
    plan = small_plan(tmp_path)
    write_losses(plan, STRONG)
    evaluate_main_path(plan, steps=())
    without = advise(plan)
    evaluate_main_path(plan, steps=(100, 150, 200, 300, 400))
    early = advise(plan)
    assert early.model.path
    for one, other in zip(early.own, without.own, strict=True):
        assert one.gap == pytest.approx(other.gap, abs=0.007)


def test_a_main_path_evaluated_on_another_text_is_left_aside(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    write_losses(plan, STRONG)
    evaluate_main_path(plan)
    main_path = plan.folder(plan.run("ours", "main")) / "evals.json"
    branch = plan.folder(plan.run("ours", "branch-v2")) / "eval.json"
    for path, text in ((main_path, "one"), (branch, "one"), (branch, "another")):
        found = json.loads(path.read_text())
        for row in found.values() if path == main_path else [found]:
            row["validation"] = text
        path.write_text(json.dumps(found))
        assert bool(read_curves(plan)[0].checkpoints) == (text == "one")


def test_a_main_path_without_an_evaluated_branch_predicts_training_losses(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    write_losses(plan, STRONG)
    evaluate_main_path(plan)
    for run in plan.runs("ours")[1:]:
        (plan.folder(run) / "eval.json").unlink()
    said = advise(plan).to_dict()
    assert (said["losses_of"], said["main_path_evaluated"]) == ("training", False)


def test_advice_names_what_would_make_the_level_more_precise(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    write_losses(plan, STRONG)
    assert "`lrpath eval PLAN` first" in hint(advise(plan))
    evaluate_main_path(plan, steps=())
    assert "More evaluated checkpoints of the main path (save_interval, save_retain_interval)" in hint(
        advise(plan)
    )
    root = plan.folder(plan.run("ours", "main")) / "checkpoints"
    for step in (200, 240, 320, 400):
        (root / f"iter_{step:07}").mkdir(parents=True)
        (root / f"iter_{step:07}" / MANIFEST).write_text("{}")
    assert complete_steps(root) == [200, 240, 320, 400]
    assert "`lrpath eval PLAN --main-path`" in hint(advise(plan))
    evaluate_main_path(plan, steps=(200, 240, 320))
    assert "`lrpath eval PLAN --main-path`" in hint(advise(plan))
    evaluate_main_path(plan, steps=(200, 240, 320, 400))
    assert hint(advise(plan)) == ""


def test_advice_on_a_plan_with_fewer_versions_than_another_is_refused(tmp_path: Path) -> None:
    plan, longer = small_plan(tmp_path, count=2), small_plan(tmp_path, name="longer")
    write_losses(plan)
    write_losses(longer)
    with pytest.raises(UserError, match="has more versions than"):
        all_curves(plan, [longer])


def test_checkpoints_after_the_version_are_not_seen_by_a_fit_on_it(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    write_losses(plan, STRONG)
    evaluate_main_path(plan)
    before = advise(plan, fit_on="v1").to_dict()
    evaluate_main_path(plan, steps=[step for step in STEPS if step <= 400])
    assert advise(plan, fit_on="v1").to_dict() == before


def test_evaluations_of_no_use_along_the_main_path_are_left_aside(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    write_losses(plan, STRONG)
    path = plan.folder(plan.run("ours", "main")) / "evals.json"
    losses = ("3.0", '{"loss": "low"}', '{"loss": true}', '{"loss": NaN}', f'{{"loss": {"9" * 400}}}', "{}")
    rows = [f'"{200 + number}": {loss}' for number, loss in enumerate(losses)]
    rows += [f'"{step}": {{"loss": 3.0}}' for step in ("x", "20", "9999", "9" * 5000)]
    for content in ("", "[]", "[" * 100_000, "{" + ", ".join(rows) + "}"):
        path.write_text(content)
        assert read_curves(plan)[0].checkpoints is None, content[:200]


def test_validation_that_drifts_away_widens_the_intervals_of_versions_to_come(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    write_losses(plan)
    truth = evaluate(plan, drift=0.1)
    held = advise(plan, fit_on="v2")
    assert held.model.drift == pytest.approx(0.1 / truth["branch-v1"], rel=0.3)
    own = next(one for one in held.own if one.alpha == plan.alpha)
    for prediction, value in zip(own.versions, truth.values(), strict=True):
        assert prediction is not None
        assert prediction.low <= value <= prediction.high


def test_gaps_in_validation_are_less_sure_than_gaps_in_training(trained: Plan) -> None:
    model = build_model(read_curves(trained), scale_of(trained), 2)
    gaps = np.array([[0.02, 0.019, 0.021], [0.0, 0.0, 0.0]])
    low, high = gap_intervals(model, gaps)
    assert high - low == pytest.approx([0.002, 0], abs=2e-4)
    evaluated = replace(model.data.sources[1], validation=3.0)
    model = replace(model, data=replace(model.data, sources=(model.data.sources[0], evaluated)))
    low, high = gap_intervals(model, gaps)
    assert (high - low)[0] > 3.92 * GAIN_SPREAD * 0.02
    assert (high - low)[1] == 0, "the best alpha's gap to itself"


def test_an_evaluation_that_is_of_no_use_is_left_aside(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    write_losses(plan)
    for content in (
        "",
        "[]",
        '{"step": 400, "loss": "low"}',
        '{"step": 400, "loss": NaN}',
        '{"step": 3, "loss": 3}',
    ):
        (plan.folder(plan.run("ours", "branch-v1")) / "eval.json").write_text(content)
        assert not any(curve.validation for curve in read_curves(plan)), content


def test_levels_are_found_only_where_there_are_some(trained: Plan, tmp_path: Path) -> None:
    alike = small_plan(tmp_path, name="alike")
    for run in alike.runs("ours"):
        losses = true_losses(alike, run)
        versions = np.searchsorted(alike.timeline.ends, np.arange(run.first_step + 1, run.last_step + 1))
        noise = np.random.default_rng(1).normal(0, 0.01, len(losses))
        write_history(alike, run, (losses - np.array((0.0, 0.02, -0.03, 0.04))[versions]) * np.exp(noise))
    assert len(build_model(read_curves(alike), scale_of(alike), 2).fit.level) == 1
    assert build_model(read_curves(trained), scale_of(trained), 2).fit.level[1:] == pytest.approx(
        (0.02, -0.03, 0.04), abs=0.015
    )


def test_the_cost_is_that_of_the_paper(trained: Plan) -> None:
    assert [round(relative_cost(trained, alpha), 2) for alpha in (0.2, 0.4, 0.6, 0.8)] == [
        0.46,
        0.52,
        0.58,
        0.64,
    ]
    assert relative_cost(trained, 0.6) == trained.cost("ours").relative


def test_within_chooses_the_least_cost(advice: Advice) -> None:
    chosen, target = choose(advice.choices, 0.004, None)
    assert "within 0.40%" in target
    assert chosen is not None
    assert chosen.gap <= 0.004
    assert all(one.gap > 0.004 for one in advice.own if one.cost < chosen.cost)


def test_a_budget_is_kept_and_used(trained: Plan, advice: Advice) -> None:
    chosen, _ = choose(advice.choices, None, 0.5)
    assert chosen is not None
    assert 0.47 < chosen.cost <= 0.5
    assert chosen.decay == own_decay(trained)


def test_no_choice_where_both_targets_cannot_be_met(advice: Advice) -> None:
    assert choose(advice.choices, 0.0, 0.45) == (
        None,
        "the least cost for a perplexity within 0.00% of the best, at a cost of at most 0.45",
    )


def test_what_is_impossible_is_never_chosen(advice: Advice) -> None:
    whole = next(one for one in advice.own if one.alpha == 1)
    assert whole.versions[0] is None
    assert not whole.possible
    assert whole not in advice.choices


def test_no_training_no_advice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Train it beyond its warm-up"):
        advise(small_plan(tmp_path))


def test_a_main_path_alone_does_not_determine_decays(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    run = plan.run("ours", "main")
    write_history(plan, run, true_losses(plan, run))
    with pytest.raises(UserError, match="no branch has decayed"):
        advise(plan)


def test_a_branch_that_has_hardly_begun_does_not_count(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    for name, rows in (("main", None), ("branch-v1", 60)):
        run = plan.run("ours", name)
        write_history(plan, run, true_losses(plan, run)[:rows])
    with pytest.raises(UserError, match="no branch has decayed"):
        advise(plan)


def test_losses_that_follow_no_law_are_refused(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    for run in plan.runs("ours"):
        steps = np.arange(run.first_step, run.last_step)
        write_history(plan, run, 3 + 0.5 * np.sin(steps / 60))
    with pytest.raises(UserError, match="too much to choose alpha by"):
        advise(plan)


def test_a_decay_that_lowers_nothing_is_refused(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    write_losses(plan, np.where(np.arange(len(TRUTH)) == GAIN, -12, TRUTH), noise=0.0, shared=0.0)
    with pytest.raises(UserError, match="decays have not lowered the loss"):
        advise(plan)


def test_a_diverged_run_is_refused(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    write_losses(plan)
    run = plan.run("ours", "main")
    losses = true_losses(plan, run)
    losses[900:] = np.nan
    write_history(plan, run, losses)
    with pytest.raises(UserError, match="no finite loss"):
        advise(plan)


def test_runs_of_another_plan_are_refused(tmp_path: Path) -> None:
    write_losses(small_plan(tmp_path))
    other = small_plan(tmp_path, alpha=0.5)
    with pytest.raises(UserError, match="other learning rates"):
        advise(other)


def test_branches_of_a_second_plan_off_the_same_main_path_are_fitted_too(tmp_path: Path) -> None:
    plan, second = small_plan(tmp_path), small_plan(tmp_path, alpha=0.3, name="second")
    write_losses(plan)
    write_losses(second)
    names = [curve.name for curve in all_curves(plan, [second])]
    assert names == [
        "main",
        *(f"branch-v{i}" for i in (1, 2, 3, 4)),
        *(f"second/branch-v{i}" for i in (1, 2, 3, 4)),
    ]
    longer = small_plan(tmp_path, steps=500, name="longer")
    write_losses(longer)
    with pytest.raises(UserError, match="its main path is not that of"):
        all_curves(plan, [longer])


def test_the_command_prints_json_and_draws(
    trained: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "advice.svg"
    argv = ["advise", str(trained.path), "--json", "--budget", "0.5", "--figure", str(figure)]
    assert main(argv) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["chosen"]["relative_cost"] <= 0.5
    assert {one["decay"] for one in said["candidates"]} == {
        "cosine", "linear", "minus-sqrt", "exponential",
    }  # fmt: skip
    assert figure.read_text().startswith("<?xml")


def test_the_advice_is_in_the_report(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    write_losses(plan)
    assert main(["advise", str(plan.path), "--fit-on", "v1"]) == 0
    assert read_advice(plan) is None, "a test of the law is no advice"
    assert main(["advise", str(plan.path)]) == 0
    assert main(["report", str(plan.path)]) == 0
    folder = Path(plan.output) / "report"
    for text in ((folder / "index.html").read_text(), (folder / "report.md").read_text()):
        assert "Which alpha" in text
        assert re.search("Advice .*: alpha=0", text)
    assert len((folder / "data/advice.csv").read_text().splitlines()) > 50
    assert (folder / "advice.png").read_bytes().startswith(b"\x89PNG")
    (Path(plan.output) / "advice/advice.json").write_text('{"sentences": 3}')
    assert main(["report", str(plan.path)]) == 0
    assert "Which alpha" not in (folder / "index.html").read_text()


def test_the_command_reports_that_no_alpha_meets_the_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = small_plan(tmp_path, count=2)
    write_losses(plan)
    assert main(["advise", str(plan.path), "--budget", "0.2"]) == 1
    assert "No alpha gives" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [("--within", "0.5"), ("--budget", "cheap"), ("--min-lr-share", "2")])
def test_targets_that_cannot_be_read_are_refused(trained: Plan, argv: tuple[str, str]) -> None:
    with pytest.raises(SystemExit):
        main(["advise", str(trained.path), *argv])

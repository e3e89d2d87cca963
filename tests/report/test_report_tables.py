"""The report's tables agree with the evaluations: the paper's form, the best in bold, nothing invented."""

from __future__ import annotations

import json
import shutil

import pytest

from megatron_lrpath.cli import main
from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import load_plan
from megatron_lrpath.report import tables
from megatron_lrpath.report.collect import collect, gaps
from megatron_lrpath.report.facts import data_table, facts
from megatron_lrpath.report.figures import draw_cost, draw_losses
from megatron_lrpath.report.rates import check_rates, summarize
from megatron_lrpath.report.tables import (
    domain_table,
    main_table,
    perplexity_csv,
    result_in_words,
    run_table,
)
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.runs.tasks import build_tasks
from tests.support.report_tree import score, write_plan, write_slices, write_tree

KINDS = {"ptfs": "scratch", "cpt": "continual", "ours": "branch"}


@pytest.fixture
def plan(tmp_path):
    made = write_plan(tmp_path, versions=3)
    write_tree(made)
    return made


def evaluation(plan, paradigm, name, perplexity, **others):
    """Overwrite a run's evaluation; None removes it."""
    run = plan.run(paradigm, name)
    path = plan.folder(run) / "eval.json"
    if perplexity is None:
        path.unlink()
        return
    value = {"step": run.last_step, "loss": 1.0, "perplexity": perplexity, "tokens": 204_800, "domains": {}}
    path.write_text(json.dumps(value | others))


def set_table(plan, ptfs, cpt, ours):
    """Write perplexities of v2 and v3."""
    for paradigm, values in (("ptfs", ptfs), ("cpt", cpt), ("ours", ours)):
        for version, value in zip(("v2", "v3"), values, strict=True):
            evaluation(plan, paradigm, f"{KINDS[paradigm]}-{version}", value)


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


def best(table):
    return {(row[1].text, table.header[i]) for row in table.rows for i, cell in enumerate(row) if cell.best}


def test_the_main_table_has_the_papers_form(plan):
    set_table(plan, (20.84, 19.28), (21.11, 19.7), (20.13, 18.81))
    table = main_table(collect(plan))
    assert table.header == ("Schedule", "Paradigm", "Cost", "v2", "v3", "Mean")
    assert texts(table) == [
        ["cosine", "Ours", "0.70×", "20.13", "18.81", "19.47"],
        ["", "PTFS", "1.00×", "20.84", "19.28", "20.06"],
        ["", "CPT (ResetMax)", "0.50×", "21.11", "19.70", "20.41"],
    ]
    assert best(table) == {("Ours", "v2"), ("Ours", "v3"), ("Ours", "Mean")}


def test_equal_digits_share_the_bold_and_a_lone_value_has_none(plan):
    set_table(plan, (20.841, None), (21.11, None), (20.839, 19.0))
    table = main_table(collect(plan))
    assert best(table) == {(name, column) for name in ("PTFS", "Ours") for column in ("v2", "Mean of v2")}


def test_a_missing_perplexity_is_a_dash_and_means_are_over_common_versions(plan):
    set_table(plan, (20.84, 19.28), (None, 19.7), (20.13, 18.81))
    tree = collect(plan)
    assert texts(main_table(tree))[2] == ["", "CPT (ResetMax)", "0.50×", "–", "19.70", "19.70"]
    assert main_table(tree).header[-1] == "Mean of v3"
    assert result_in_words(tree).startswith("Mean perplexity of v3: PTFS 19.28")
    assert any("cpt/continual-v2" in gap.text and gap.command.startswith("lrpath eval") for gap in gaps(tree))


def test_a_report_of_ours_alone_is_whole(tmp_path):
    """A plan without the key `paradigms` has ours and what is in the output: no other paradigm is missing."""
    plan = write_plan(tmp_path, versions=3)
    plan.path.write_text(plan.path.read_text().replace("paradigms: [ours, ptfs, cpt]\n", ""))
    plan = load_plan(plan.path)
    write_tree(plan)
    assert set(collect(plan).paradigms) == {"ours", "ptfs", "cpt"}
    for other in ("ptfs", "cpt"):
        shutil.rmtree(tmp_path / "runs" / other)
    tree = collect(plan)
    assert (tree.paradigms, gaps(tree)) == (("ours",), [])
    table = main_table(tree)
    assert table.header[3:] == ("v1", "v2", "v3", "Mean")
    assert len(table.rows) == 1
    assert "–" not in texts(table)[0]
    assert draw_cost(tree) is None
    assert "PTFS" not in draw_losses(tree).caption


def test_sets_of_later_deliveries_have_a_table_and_a_text_without_any_is_named(plan):
    lines = plan.path.read_text().replace(f"valid: {plan.data.valid}", f"valid: [{plan.data.valid}, later]")
    plan.path.write_text(lines)
    plan = load_plan(plan.path)
    score = {"loss": 1.5, "perplexity": 4.48, "tokens": 1000}
    measured = {"later": {**score, "domains": {"a": score, "b": score}}}
    evaluation(plan, "ours", "branch-v3", 18.81, sets=measured)
    tree = collect(plan)
    table = tables.set_table(tree)
    assert [row[0].text for row in table.rows if row[0].text] == [
        "later (1K tokens)",
        "later, a (1K tokens)",
        "later, b (1K tokens)",
    ]
    assert next(row[-1].text for row in table.rows if row[1].text == "Ours") == "4.480"
    assert any("ours/branch-v2" in gap.text and "ours/branch-v3" not in gap.text for gap in gaps(tree))
    assert "ours,v3,ours/branch-v3,a,4.48,1.5,1000,later" in perplexity_csv(tree)


def test_after_an_append_the_mean_is_over_the_versions_before(plan):
    before = main_table(collect(plan))
    plan.path.write_text(plan.path.read_text().replace("output:", "  - {name: v4, steps: 60}\noutput:"))
    table = main_table(collect(load_plan(plan.path)))
    assert table.header[3:] == ("v2", "v3", "v4", "Mean of v2 and v3")
    assert [row[-1] for row in texts(table)] == [row[-1] for row in texts(before)]


def test_perplexities_below_ten_have_three_decimals(plan):
    set_table(plan, (4.204, 4.1), (4.213, 4.2), (3.87, 3.8))
    assert texts(main_table(collect(plan)))[0][3:5] == ["3.870", "3.800"]


def test_the_first_version_is_shown_below_the_table(plan):
    evaluation(plan, "ptfs", "scratch-v1", 35.5)
    evaluation(plan, "ours", "branch-v1", 34.25)
    notes = main_table(collect(plan)).notes
    assert "PTFS and CPT 35.50 (one and the same run), Ours 34.25" in notes[1]


def test_an_unknown_first_version_is_not_mentioned(plan):
    evaluation(plan, "ptfs", "scratch-v1", None)
    evaluation(plan, "ours", "branch-v1", None)
    assert len(main_table(collect(plan)).notes) == 1


def test_a_lone_version_is_in_the_table(tmp_path):
    plan = write_plan(tmp_path, versions=1)
    write_tree(plan)
    table = main_table(collect(plan))
    assert table.header == ("Schedule", "Paradigm", "Cost", "v1")
    assert len(table.notes) == 1
    assert texts(table)[1][3] == texts(table)[2][3]


def test_an_evaluation_of_another_step_is_not_taken(plan):
    evaluation(plan, "ours", "branch-v3", 1.5, step=160)
    tree = collect(plan)
    assert texts(main_table(tree))[0][4] == "–"
    assert any("eval.json is of step 160, the run ends at 180" in gap.text for gap in gaps(tree))


@pytest.mark.parametrize("content", ["{", "[]", '{"step": 180}', '{"step": 180, "loss": "x"}'])
def test_a_damaged_evaluation_is_named_and_not_taken(plan, content):
    (plan.folder(plan.run("ours", "branch-v3")) / "eval.json").write_text(content)
    tree = collect(plan)
    assert texts(main_table(tree))[0][4] == "–"
    assert any(gap.text.startswith("ours/branch-v3: eval.json") for gap in gaps(tree))


def test_evaluations_on_different_sets_are_called_incomparable(plan):
    evaluation(plan, "ours", "branch-v3", 20.0, tokens=100_000)
    (gap,) = gaps(collect(plan))
    assert "cannot be compared" in gap.text
    assert "100,000 and 204,800" in gap.text


def test_domains_have_a_table_of_their_own(plan):
    set_table(plan, (20.84, 19.28), (21.11, 19.7), (20.13, 18.81))
    for name, low in (("branch-v2", 3.0), ("branch-v3", 2.5)):
        evaluation(plan, "ours", name, 20.0, domains={"code": score(low, 1000)})
    table = domain_table(collect(plan))
    rows = texts(table)
    assert table.header == ("Domain", "Paradigm", "v2", "v3")
    assert rows[0][0].startswith("2016")
    assert rows[0][2:] == ["–", "–"]
    assert ["code (1K tokens)", "Ours", "20.09", "12.18"] in rows
    assert rows[-2:] == [["", "PTFS", "–", "–"], ["", "CPT (ResetMax)", "–", "–"]]


def test_without_domains_there_is_no_domain_table(plan):
    for paradigm, kind in KINDS.items():
        for version in ("v1", "v2", "v3"):
            evaluation(plan, paradigm, f"{kind}-{version}", 20.0)
    assert domain_table(collect(plan)) is None


def test_a_run_that_paradigms_share_is_listed_once(plan):
    names = [row[0] for row in texts(run_table(collect(plan)))]
    assert names[4:7] == ["ptfs/scratch-v1", "ptfs/scratch-v2", "ptfs/scratch-v3"]
    assert names[7:] == ["cpt/continual-v2", "cpt/continual-v3"]
    assert len(names) == len(set(names)) == 9


def test_skipped_updates_are_named(plan):
    path = plan.folder(plan.run("ours", "main")) / "lineage.json"
    skipped = [{"step": step, "samples": [0, 31], "loss": 9.0, "median": 3.0} for step in (7, 9)]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"skipped": skipped}))
    notes = run_table(collect(plan)).notes
    assert notes[1:] == ("ours/main: 2 updates skipped for a loss spike, step 7 and 9.",)


def test_the_shared_run_is_found_without_its_link(plan):
    plan.folder(plan.run("cpt", "continual-v1")).unlink()
    assert gaps(collect(plan)) == []


def test_unfinished_runs_are_named_with_how_far_they_are(plan):
    folder = plan.folder(plan.run("ours", "branch-v3"))
    (folder / "result.json").unlink()
    lines = (folder / "history.jsonl").read_text().splitlines()
    (folder / "history.jsonl").write_text("\n".join(lines[:5]) + "\n" + lines[5][:20])
    shutil.rmtree(plan.folder(plan.run("ptfs", "scratch-v3")))
    found = gaps(collect(plan))
    states = "ours/branch-v3 (at step 149 of 180) and ptfs/scratch-v3 (not started)"
    assert found[0].text == f"2 runs not finished: {states}."
    assert found[0].command == f"lrpath run {plan.path}"


def test_an_appended_version_keeps_the_earlier_results(plan, tmp_path):
    before = texts(main_table(collect(plan)))
    plan.path.write_text(plan.path.read_text().replace("output:", "  - {name: v4, steps: 60}\noutput:"))
    longer = load_plan(plan.path)
    tree = collect(longer)
    assert [row[3:5] for row in texts(main_table(tree))] == [row[3:5] for row in before]
    assert "ours/main (at step 144 of 204)" in gaps(tree)[0].text
    assert not any("another plan" in gap.text for gap in gaps(tree))


def test_runs_of_another_plan_are_distinguished_from_this_plans(plan):
    plan.path.write_text(plan.path.read_text().replace("seed: 1234", "seed: 4321"))
    found = [gap.text for gap in gaps(collect(load_plan(plan.path)))]
    assert "ours/main: trained under another plan: seed: was 1234, is 4321." in found


def test_no_output_folder_is_the_users_error(tmp_path):
    plan = write_plan(tmp_path)
    with pytest.raises(UserError, match=r"nothing to report.*lrpath run"):
        collect(plan)


def test_data_are_shown_as_recorded_in_the_slices(plan):
    write_slices(plan)
    table = data_table(collect(plan))
    assert table.header[3:] == ("Tokens in the slice", "of which code", "of which docs")
    assert texts(table)[1] == ["v2", "60", "492K", "621K", "307K", "314K"]
    assert texts(table)[-1][0] == "validation"
    assert table.notes == ()


def test_missing_slices_are_reported(plan):
    table = data_table(collect(plan))
    assert texts(table)[0] == ["v1", "60", "492K", "–"]
    assert "v1, v2, v3 and validation" in table.notes[0]


def test_the_summary_shows_parameters_and_recorded_packages(plan):
    plan.path.write_text(
        plan.path.read_text().replace("tokenizer.model}", "tokenizer.model, vocab_size: 4096}")
    )
    shown = facts(collect(load_plan(plan.path)))
    assert shown["Parameters"] == "1.85M with a vocabulary of 4,096 tokens"
    assert "megatron-core 0.19.2" in shown["Packages"]
    assert shown["Schedule"] == "cosine, from 0.001 to 0.0001, warm-up 10 steps"


def test_the_summary_shows_arguments_as_one_writes_them(plan):
    for run in plan.runs("ours") + plan.runs("ptfs") + plan.runs("cpt"):
        RunFolder(plan.folder(run)).lineage.unlink(missing_ok=True)  # trained with the values of the plan
    plan.path.write_text(
        plan.path.read_text().replace(
            "model: tiny",
            "model: {recipe: tiny, qk-layernorm: true, add_qkv_bias: false, num_layers: 3}",
        )
    )
    shown = facts(collect(load_plan(plan.path)))
    assert shown["Model"] == "tiny; qk_layernorm, no add_qkv_bias, num_layers 3"


def test_the_summary_shows_the_runs_as_they_were_trained(plan):
    usual = run_table(collect(plan)).rows[0][5].text
    text = plan.path.read_text()
    plan.path.write_text(text.replace("seq_length: 256", "seq_length: 512").replace("seed: 1234", "seed: 2"))
    assert plan.path.read_text() != text
    changed = collect(load_plan(plan.path))
    shown = facts(changed)
    assert (shown["Batch"], shown["Seed"]) == ("32 sequences of 256 tokens", "1234")
    assert run_table(changed).rows[0][5].text == usual
    assert any("batch.seq_length: was 256, is 512" in gap.text for gap in gaps(changed))


def test_the_summary_names_every_version_of_a_package(plan):
    path = plan.folder(plan.run("ours", "main")) / "lineage.json"
    path.write_text(path.read_text().replace("2.15.0", "2.16.0"))
    shown = facts(collect(plan))
    assert "torch 2.16.0 and 2.15.0" in shown["Packages"]


def test_perplexities_are_given_in_full_as_csv(plan):
    evaluation(plan, "ours", "branch-v2", 20.123456789, domains={"a,b": score(3.0, 10)})
    lines = perplexity_csv(collect(plan)).splitlines()
    assert lines[0] == "paradigm,version,run,domain,perplexity,loss,tokens"
    assert "ours,v2,ours/branch-v2,,20.123456789,1.0,204800" in lines
    assert any(line.startswith('ours,v2,ours/branch-v2,"a,b",20.0855') for line in lines)


def test_an_evaluation_of_another_training_is_called_in_question(plan):
    folder = plan.folder(plan.run("ours", "branch-v3"))
    for name, checkpoint in (("result.json", "a1"), ("eval.json", "b2")):
        value = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(value | {"checkpoint": checkpoint}))
    (gap,) = gaps(collect(plan))
    assert gap.text.startswith("ours/branch-v3: eval.json is not known to be of the checkpoint")


def test_a_main_path_beyond_its_plan_is_complete_and_shown_as_longer(plan, capsys):
    shorter = plan.path.read_text().replace("  - {name: v3, steps: 60}\n", "")
    plan.path.write_text(shorter)
    plan = load_plan(plan.path)
    tree = collect(plan)
    assert gaps(tree) == []
    assert summarize(check_rates(tree)).level == "good"
    main_run = tree.records["ours"][0]
    assert (main_run.state.progress, main_run.state.state, main_run.state.beyond) == ("complete", "done", 144)
    assert (
        "ours/main has gone on to step 144, for versions that the plan no longer has."
        in run_table(tree).notes
    )
    assert main(["status", str(plan.path), "--json", "--paradigm", "ours"]) == 0
    row = json.loads(capsys.readouterr().out)["runs"][0]
    assert (row["key"], row["state"], row["step"], row["last_step"]) == ("ours/main", "done", 84, 84)
    assert all(task.complete for task in build_tasks(plan, ("ours",)))

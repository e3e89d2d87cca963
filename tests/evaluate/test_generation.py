"""Trained models generate: text that continues a prompt, versions side by side, conversations."""

from __future__ import annotations

import json
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from megatron_lrpath.plan import Plan, load_plan
from megatron_lrpath.report.page import make_report, write_report
from megatron_lrpath.runs.completions import completions_of, needs_completions
from megatron_lrpath.runs.folder import RunFolder
from tests.support.sft_fixtures import changed, sft_plan
from tests.support.training_fixtures import launch, lrpath, run_words, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a plan whose version and fine-tuned version are trained."""
    folder = tmp_path_factory.mktemp("generation")
    plan = sft_plan(folder)
    launch("tests.support.sft_fixtures:prepare", [str(plan)]).ok()
    for run in ("main", "branch-v1", "sft-v1"):
        train(run_words(plan, "ours", run)).ok()
    return plan


def generate(plan: Path, *argv: object) -> str:
    """Return the output of `lrpath generate`."""
    return lrpath("generate", plan, *argv, "--device", "cpu", "--max-tokens", 6).ok().output


def answer(output: str) -> str:
    """Return the line that continues the prompt `the plan`, among the messages of the command."""
    found = re.findall(r"^the plan.*$", output, re.MULTILINE)
    assert len(found) == 1, output
    return str(found[0])


def run_folder(plan: Path, run: str) -> RunFolder:
    """Return the folder of a run of ours."""
    return RunFolder(plan.parent / "runs/ours" / run)


def test_a_version_continues_a_text(trained: Path) -> None:
    first = generate(trained, "--run", "branch-v1", "the plan")
    assert "exporting step 4" in first
    again = generate(trained, "--run", "branch-v1", "the plan")
    assert "exporting" not in again  # the export exists
    assert answer(first) == answer(again)  # the same seed
    assert len(answer(again)) > len("the plan")
    drawn = [generate(trained, "--run", "branch-v1", "--seed", seed, "the plan") for seed in (1, 2)]
    assert answer(drawn[0]) != answer(drawn[1])
    greedy = [
        generate(trained, "--run", "branch-v1", "--temperature", 0, "--seed", seed, "the plan")
        for seed in (1, 2)
    ]
    assert answer(greedy[0]) == answer(greedy[1])


def test_the_newest_version_is_taken_where_none_is_named(trained: Path) -> None:
    assert "ours/branch-v1, the newest" in generate(trained, "the plan")


def test_versions_are_shown_side_by_side(trained: Path) -> None:
    output = generate(trained, "--run", "main", "--run", "branch-v1", "the plan", "of it")
    titles = [line.split() for line in output.splitlines() if "ours/main" in line and "branch" in line]
    assert len(titles) == 2  # one for each prompt
    assert "ours/branch-v1" in titles[0]


def test_a_stale_export_is_made_again_and_a_foreign_one_is_not_replaced(trained: Path) -> None:
    generate(trained, "--run", "branch-v1", "the plan")
    exported = run_folder(trained, "branch-v1").exported
    record = exported / "lrpath_export.json"
    stored = json.loads(record.read_text())
    record.write_text(json.dumps(stored | {"checkpoint": "of another training"}))
    assert "again, because the checkpoint has changed" in generate(trained, "--run", "branch-v1", "the plan")
    assert json.loads(record.read_text()) == stored
    record.unlink()
    outcome = lrpath("generate", trained, "--run", "branch-v1", "the plan", "--device", "cpu")
    assert outcome.status == [2]
    assert "does not say which checkpoint it is of" in outcome.output
    assert "--run branch-v1 --force" in outcome.output
    shutil.rmtree(exported)


@pytest.mark.parametrize("run", ["branch-v1", "sft-v1"])
def test_the_model_card_shows_how_to_use_it(trained: Path, tmp_path: Path, run: str) -> None:
    folder = tmp_path / "exported"
    output = lrpath("export", trained, "--run", run, "--output", folder).ok().output
    assert f"hf upload USER/tiny-test-{run} {folder}" in output
    assert (folder / "README.md").read_text().count(f"# tiny-test {run}\n") == 1
    launch("tests.support.export_worker:follow_card", [str(folder)]).ok()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "  "], "the prompt is empty"),
        (["generate", "--run", "branch-v1", "plan " * 200], "positions for prompt and answer"),
        (["generate", "--run", "brnch-v1", "x"], "did you mean 'branch-v1'"),
        (["generate", "--run", "main", "--compare", "x"], "--compare takes all trained versions"),
        (["generate", "--paradigm", "ptfs", "x"], "no version is trained yet. First: lrpath run"),
        (["chat", "--paradigm", "ptfs"], "no version is fine-tuned yet. First: lrpath sft"),
        (["chat", "--run", "branch-v1"], "has no chat template"),
    ],
)
def test_text_that_cannot_be_generated_is_refused(trained: Path, argv: list[str], message: str) -> None:
    outcome = lrpath(argv[0], trained, *argv[1:], "--device", "cpu")
    assert outcome.status == [2], outcome.output
    assert message in outcome.output


def test_a_model_without_a_tokenizer_has_no_text(tmp_path: Path) -> None:
    from tests.support.training_fixtures import make_plan

    plan = make_plan(tmp_path, (4,))
    for run in ("main", "branch-v1"):
        train(run_words(plan, "ours", run)).ok()
    outcome = lrpath("generate", plan, "x", "--device", "cpu")
    assert outcome.status == [2], outcome.output
    assert "the folder has no tokenizer" in outcome.output


def test_a_conversation_continues_and_restarts(trained: Path) -> None:
    argv = ["chat", trained, "--device", "cpu", "--max-tokens", 5, "--temperature", 0]
    outcome = lrpath(*argv, stdin="Add 1 and 2.\n\nSure?\n/new\nAdd 1 and 2.\n" + "word " * 300 + "\n").ok()
    lines = outcome.output.splitlines()
    assert "sft-v1: /new starts a new conversation, Ctrl-D ends" in outcome.output
    begin = next(number for number, line in enumerate(lines) if "/new starts a new conversation" in line)
    answers = lines[begin + 1 :]
    # a message too long; the conversation continued to its end
    assert "positions for prompt and answer" in outcome.output
    assert answers[0] == answers[2]  # the same question of a new conversation


def completions(plan: Path) -> dict[str, Any]:
    """Return the completions that the evaluation of the version wrote."""
    found: dict[str, Any] = json.loads(run_folder(plan, "branch-v1").completions.read_text())
    return found


def evaluate(plan: Path, nproc: int = 1, *extra: str) -> None:
    """Run the worker that `lrpath eval` starts."""
    argv = ["--plan", str(plan), "--device", "cpu", "--runs", "ours/branch-v1", *extra]
    launch("megatron_lrpath.evaluate.worker:main", argv, nproc).ok()


def test_an_evaluation_leaves_completions_that_the_report_shows(trained: Path) -> None:
    evaluate(trained)
    first = completions(trained)
    assert [one["domain"] for one in first["completions"]] == ["prose", "code"] * 2
    assert all(one["prompt"] for one in first["completions"])
    plan = changed(trained, "prompted", prompts=["the plan", "of it"])
    loaded = load_plan(plan)
    assert needs_completions(loaded, loaded.run("ours", "branch-v1"))
    evaluate(plan)
    assert not needs_completions(loaded, loaded.run("ours", "branch-v1"))
    asked = completions(plan)["completions"]
    assert [one["prompt"] for one in asked] == ["the plan", "of it"]
    greedy = generate(trained, "--run", "branch-v1", "--temperature", 0, "the plan")
    written = completions_of(loaded.folder(loaded.run("ours", "branch-v1")), 4)[0].text
    assert written
    assert written[:5] in greedy  # transformers writes the same with the exported model
    page, text = report_of(loaded)
    assert "What the models write" in page
    assert "the plan" in text


class Pieces:
    """A tokenizer whose tokens are text pieces, and which drops white space at the beginning of a text."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def detokenize(self, tokens: list[int]) -> str:
        """Return the text of tokens, which are positions in `pieces`."""
        return "".join(self.pieces[token] for token in tokens).lstrip()


def write_prompts(words: list[str]) -> None:
    """Write to the file `words[0]` the prompts from inside documents of the pieces in `words[1]`."""
    from megatron_lrpath.training import machine

    machine.activate("cpu")
    from megatron_lrpath.evaluate.completions import from_whole_word

    tokenizers = [Pieces(pieces) for pieces in json.loads(words[1])]
    prompts = [
        tokenizer.detokenize(from_whole_word(list(range(len(tokenizer.pieces))), tokenizer))
        for tokenizer in tokenizers
    ]
    Path(words[0]).write_text(json.dumps(prompts))


def test_a_prompt_from_inside_a_document_begins_with_a_whole_word(tmp_path: Path) -> None:
    pieces = [["ing", ",", " the", " plan"], ["ing", "\n", "the"], [" a", " plan"], ["un", "broken"]]
    written = tmp_path / "prompts.json"
    launch("tests.evaluate.test_generation:write_prompts", [str(written), json.dumps(pieces)]).ok()
    assert json.loads(written.read_text()) == ["the plan", "the", "plan", "unbroken"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["--tensor-model-parallel-size", "--pipeline-model-parallel-size"])
def test_two_ranks_write_the_same(trained: Path, layout: str) -> None:
    evaluate(trained, 1, "--again")
    alone = completions(trained)["completions"]
    evaluate(trained, 2, "--again", layout, "2")
    assert completions(trained)["completions"] == alone


def report_of(plan: Plan) -> tuple[str, str]:
    """Return the report's page and its Markdown."""
    folder = Path(plan.output) / "report"
    page = write_report(make_report(plan, datetime(2026, 11, 23, tzinfo=UTC)), folder)
    return page.read_text(), (folder / "report.md").read_text()

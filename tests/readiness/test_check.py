"""`plan`, `run`, `submit` and `doctor` report all errors of a plan at once, before a process starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lrpath.cli import main
from megatron_lrpath.launch import local
from megatron_lrpath.plan import load_plan
from megatron_lrpath.readiness import arguments
from tests.support import GOLDEN
from tests.support.training_fixtures import make_plan

CLUSTER = ["--nodes", "1", "--gpus-per-node", "0", "--dry-run"]


def edit(plan: Path, old: str, new: str) -> None:
    text = plan.read_text()
    assert old in text
    plan.write_text(text.replace(old, new, 1))


def remove(name: str) -> Callable[[Path], None]:
    return lambda plan: (plan.parent / "data" / name).unlink()


def change(old: str, new: str) -> Callable[[Path], None]:
    return lambda plan: edit(plan, old, new)


def other_data(plan: Path) -> None:
    file = plan.parent / "data/v2_text_document.bin"
    content = bytearray(file.read_bytes())
    content[8] ^= 1
    file.write_bytes(content)


def blocked_output(plan: Path) -> None:
    (plan.parent / "runs").write_text("a file")


# the change to a correct plan; the message; whether `plan` fails too: missing files contradict nothing
CASES = {
    "too few tokens": (
        change("name: v2\n  steps: 6", "name: v2\n  steps: 60"),
        "tokens of v2: version v2: its steps need 240 samples",
        True,
    ),
    "no validation": (
        remove("slices/valid.slice"),
        "valid.slice, which the versions are evaluated on",
        False,
    ),
    "no slice": (remove("slices/v2.slice"), "v2.slice. Draw it with tools/slice_versions.py", False),
    "no dataset": (remove("v2_text_document.idx"), "v2.slice: names the indexed dataset", False),
    "another dataset": (other_data, "v2_text_document is not the one this slice was drawn from", True),
    "another tokenizer": (change("vocab_size: 120", "vocab_size: 100"), "tokenizer of the data: ", True),
    "an argument without effect": (
        change("group_query_attention: true", "group_query_attention: false"),
        "--num-query-groups has no effect without --group-query-attention; leave it out, or give what it needs",
        True,
    ),
    "no tokenizer": (
        change("type: NullTokenizer", "type: SentencePieceTokenizer\n  model: gone.model"),
        "gone.model: there is no such file",
        False,
    ),
    "output is a file": (blocked_output, "is a file, not a folder", None),
}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of plans that would have run."""
    seen: list[str] = []
    monkeypatch.setattr(local, "carry_out", lambda plan, options: seen.append(plan.name) or 0)
    return seen


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_plan(tmp_path_factory.mktemp("sound"), versions=(6, 6))


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_reported_before_any_process_starts(
    name: str, tmp_path: Path, started: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    act, said, contradicts = CASES[name]
    plan = make_plan(tmp_path, versions=(6, 6))
    act(plan)
    capfd.readouterr()  # output of torch, which made the data
    for argv in (["run", str(plan)], ["submit", str(plan), *CLUSTER]):
        assert main(argv) == 2
        error = capfd.readouterr().err
        assert said in error
        starts = ("lrpath: error: ", "  ", "note: ")
        assert [line for line in error.splitlines() if not line.startswith(starts)] == []
    assert main(["doctor", str(plan), "--json"]) == 1
    found = json.loads(capfd.readouterr().out)["plan"]
    assert any(said.split(". ")[0] in f"{one['name']}: {one['found']}" for one in found)
    if contradicts is not None:
        assert main(["plan", str(plan), "--no-curves"]) == (2 if contradicts else 0)
        told = capfd.readouterr()
        assert "branch-v2" in told.out  # the plan is shown nevertheless
        assert (said in told.err) == contradicts
    assert started == []


def test_a_plan_that_was_begun_with_an_argument_without_effect_goes_on(
    tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(tmp_path, versions=(6, 6))
    edit(plan, "group_query_attention: true", "group_query_attention: false")
    assert main(["run", str(plan)]) == 2
    monkeypatch.setattr(arguments, "is_plan_bound", lambda plan: True)
    capfd.readouterr()
    assert main(["run", str(plan)]) == 0
    assert "WARNING: arguments: --num-query-groups has no effect" in capfd.readouterr().err
    assert started == ["tiny-test"]


def test_a_size_that_the_tokenizer_does_not_have_is_told(
    tmp_path: Path, started: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = {"type": "SentencePieceTokenizer", "model": str(GOLDEN / "sp.model"), "vocab_size": 90}
    plan = make_plan(tmp_path, versions=(6, 6), tokenizer=tokenizer)
    for record in (tmp_path / "data").glob("*.tokens.json"):
        record.unlink()
    assert main(["run", str(plan)]) == 0
    assert "sp.model has 600 tokens; vocab_size 90 of the plan is not used" in capfd.readouterr().err
    edit(plan, "vocab_size: 90", "vocab_size: 600")
    assert main(["run", str(plan)]) == 0
    assert "vocab_size" not in capfd.readouterr().err


def test_all_errors_of_a_plan_come_in_one_message(
    tmp_path: Path, started: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(tmp_path, versions=(6, 6))
    edit(plan, "name: v1\n  steps: 6", "name: v1\n  steps: 60")
    remove("slices/valid.slice")(plan)
    assert main(["run", str(plan), "--nproc", "3", "--", "--log-intervall", "5", "--seed", "9"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == f"lrpath: error: {plan}: 5 problems must be fixed first"
    assert [line.strip().split(":")[0] for line in lines[1:]] == [
        "arguments",
        "arguments",
        "validation",
        "tokens of v1",
        "processes",
    ]
    assert "did you mean '--log-interval'" in lines[1]
    assert "--seed 9 contradicts" in lines[2]
    assert started == []


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ["--tensor-model-parallel-size", "3"],
            "--tensor-model-parallel-size: 3 ranks do not divide num_attention_heads 4",
        ),
        (
            ["--pipeline-model-parallel-size=4"],
            "--pipeline-model-parallel-size: 4 stages do not divide num_layers 2",
        ),
        (["--pretrained-checkpoint", "nowhere"], "nowhere: not a folder of Megatron checkpoints"),
    ],
)
def test_arguments_behind_the_dashes_are_checked_with_the_plans(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    plan = make_plan(tmp_path)
    assert main(["run", str(plan), "--device", "cpu", "--", *extra]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_uneven_stages_are_megatrons_to_judge(tmp_path: Path) -> None:
    plan = load_plan(make_plan(tmp_path))
    extra = ["--pipeline-model-parallel-size", "2", "--num-layers", "3"]
    assert arguments.argument_checks(plan, [], extra)
    assert not arguments.argument_checks(plan, [], [*extra, "--decoder-first-pipeline-num-layers", "2"])


def test_a_correct_plan_runs_without_messages(
    sound: Path, started: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(sound)]) == 0
    assert started == ["tiny-test"]
    assert capfd.readouterr().err == ""
    assert main(["submit", str(sound), *CLUSTER]) == 0
    assert main(["plan", str(sound), "--no-curves"]) == 0


def test_only_requested_runs_are_checked(
    tmp_path: Path, started: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(tmp_path, versions=(6, 6))
    remove("slices/v2.slice")(plan)
    assert main(["run", str(plan), "--paradigm", "ptfs", "--run", "scratch-v1"]) == 0
    assert main(["run", str(plan), "--paradigm", "ptfs", "--run", "scratch-v2"]) == 2
    assert started == ["tiny-test"]


def test_a_plan_alone_needs_no_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = make_plan(tmp_path, versions=(6, 6))
    moved = tmp_path / "elsewhere/plan.yaml"
    moved.parent.mkdir()
    moved.write_text(made.read_text().replace(str(tmp_path), str(tmp_path / "nothing")))
    assert main(["plan", str(moved), "--no-curves"]) == 0
    assert capfd.readouterr().err == ""


def test_an_experiment_is_checked_at_every_point(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(tmp_path, versions=(6, 6))
    file = tmp_path / "experiment.yaml"
    file.write_text(
        f"name: alphas\nplan: {plan}\noutput: {tmp_path / 'alphas'}\nparadigms: [ours]\nvary:\n  alpha: [0.3, 0.5]\n"
    )
    assert main(["submit", str(file), *CLUSTER]) == 0
    capfd.readouterr()
    edit(plan, "name: v2\n  steps: 6", "name: v2\n  steps: 60")
    assert main(["submit", str(file), *CLUSTER]) == 2
    assert main(["run", str(file)]) == 2
    error = capfd.readouterr().err
    assert error.count("tokens of v2") == 2  # once per call: it is the same for both points


def test_paths_of_another_folder_are_pointed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(tmp_path, versions=(6, 6))
    plan.write_text(plan.read_text().replace(f"{tmp_path}/", ""))
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    assert main(["run", "../plan.yaml"]) == 2
    assert f"{tmp_path / 'data/slices'} exists: relative paths in a plan" in capfd.readouterr().err

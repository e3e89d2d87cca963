"""A run folder outlives the code that wrote it, and a copy; `docs/run-folder.md` describes its content."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import chdir
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from megatron_lrpath.cli import main as lrpath
from megatron_lrpath.plan import Plan, load_plan
from megatron_lrpath.report.collect import collect, gaps
from megatron_lrpath.runs.failure import Failure
from megatron_lrpath.runs.folder import Entry, RunFolder
from megatron_lrpath.runs.history import read_history
from megatron_lrpath.runs.lineage import read_lineage
from megatron_lrpath.runs.results import fresh_evaluation, is_complete, needs_evaluation, write_result
from megatron_lrpath.sealed import SEAL, read_sealed, write_sealed
from tests.support import ROOT
from tests.support.training_fixtures import launch, run_words, train

PAGE = ROOT / "docs/run-folder.md"
EARLIER = ROOT / "tests/golden/run_folder/earlier.tar.xz"
MAIN_STEPS = (3, 6, 8, 9)

pytestmark = pytest.mark.slow


def unpacked(folder: Path) -> Path:
    """Unpack the tree that commit 3727f45 wrote, with paths relative to the folder; return the folder."""
    with tarfile.open(EARLIER) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the earlier tree with its stopped branch trained to the end, evaluated and reported today."""
    folder = unpacked(tmp_path_factory.mktemp("earlier"))
    with chdir(folder):
        train(run_words(Path("plan.yaml"), "ours", "branch-v2")).ok()
        targets = ["ours/branch-v2", *(f"ours/main@{step}" for step in MAIN_STEPS)]
        argv = ["--plan", "plan.yaml", "--device", "cpu", "--runs", *targets]
        launch("megatron_lrpath.evaluate.worker:main", argv).ok()
        assert lrpath(["report", "plan.yaml"]) == 0
    return folder


@pytest.fixture
def copy(continued: Path, tmp_path: Path) -> Iterator[Path]:
    """Yield a copy in which every file is younger than its successors, as the working directory."""
    folder = tmp_path / "copy"
    shutil.copytree(continued, folder)
    files = sorted(folder.rglob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for number, path in enumerate(files):
        os.utime(path, times=(10_000 + number,) * 2)
    with chdir(folder):
        yield folder


def run_folder(plan: Plan, name: str) -> RunFolder:
    return RunFolder(plan.folder(plan.run("ours", name)))


def jobs(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Return the action of `lrpath submit` for each job."""
    capsys.readouterr()
    place = ["--nodes", "1", "--gpus-per-node", "0", "--tasks-per-node", "1"]
    assert lrpath(["submit", "plan.yaml", "--paradigm", "ours", "--dry-run", "--json", *place]) == 0
    return {job["key"]: job["action"] for job in json.loads(capsys.readouterr().out)["jobs"]}


def test_an_earlier_tree_has_its_states_and_needs_no_evaluation_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(unpacked(tmp_path))
    assert lrpath(["status", "plan.yaml", "--paradigm", "ours", "--json"]) == 0
    rows = {row["run"]: row for row in json.loads(capsys.readouterr().out)["runs"]}
    states = {name: (row["state"], row["step"], row["checkpoints"]) for name, row in rows.items()}
    assert states == {
        "main": ("done", 9, list(MAIN_STEPS)),
        "branch-v1": ("done", 6, [6]),
        "branch-v2": ("interrupted", 11, [10, 11]),
    }
    assert lrpath(["eval", "plan.yaml", "--paradigm", "ours"]) == 0
    assert "1 of 2 versions are trained, all of them evaluated" in capsys.readouterr().out
    plan = load_plan(Path("plan.yaml"))
    records = {record.run.name: record for record in collect(plan).records["ours"]}
    assert records["branch-v1"].problems == ()
    evaluation = records["branch-v1"].evaluation
    assert evaluation is not None
    assert f"{evaluation.score.perplexity:.4f}" == "127.5475"
    assert records["branch-v2"].state.progress == "at step 11 of 12"


def test_an_earlier_run_is_trained_to_its_end(continued: Path) -> None:
    with chdir(continued):
        plan = load_plan(Path("plan.yaml"))
        run, folder = plan.run("ours", "branch-v2"), run_folder(plan, "branch-v2").path
        history = read_history(folder)
        assert history.steps.tolist() == [10, 11, 12]
        assert history["lr"].tolist() == [run.path.lr_at(step - 1) for step in (10, 11, 12)]
        lineage = read_lineage(folder)
        assert lineage is not None
        assert [start["step"] for start in lineage["starts"]] == [9, 11]
        assert is_complete(folder, run)
        evaluation = fresh_evaluation(folder, 12)
        assert evaluation is not None
        assert evaluation["checkpoint"] == json.loads(RunFolder(folder).result.read_text())["checkpoint"]


def test_an_earlier_model_is_exported(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["export", "plan.yaml", "--paradigm", "ours", "--run", "branch-v1", "--output", "model"]
    launch("tests.support.export_worker:commands", [json.dumps(argv)]).ok()
    card = (copy / "model/README.md").read_text()
    assert (copy / "model/model.safetensors").is_file()
    assert "127.5475" in card


def test_in_a_copy_nothing_is_stale(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = load_plan(Path("plan.yaml"))
    assert lrpath(["run", "plan.yaml", "--paradigm", "ours", "--device", "cpu"]) == 0
    assert "nothing to do: 3 runs" in capsys.readouterr().out
    assert lrpath(["eval", "plan.yaml", "--paradigm", "ours"]) == 0
    assert "2 of 2 versions are trained, all of them evaluated" in capsys.readouterr().out
    assert lrpath(["eval", "plan.yaml", "--main-path"]) == 0
    assert "all checkpoints of the main path are evaluated" in capsys.readouterr().out
    assert not [gap for gap in gaps(collect(plan)) if "ours/" in gap.text]
    assert set(jobs(capsys).values()) == {"done"}


def test_a_plan_whose_last_version_was_removed_has_nothing_left_to_do(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Path("plan.yaml")
    plan.write_text(plan.read_text().replace("- name: v2\n  steps: 6\n", ""))
    assert lrpath(["run", "plan.yaml", "--paradigm", "ours", "--device", "cpu"]) == 0
    assert "nothing to do: 2 runs" in capsys.readouterr().out
    assert not [gap for gap in gaps(collect(load_plan(plan))) if "ours/" in gap.text]
    assert set(jobs(capsys).values()) == {"done"}


def test_what_was_trained_again_is_evaluated_and_reported_again(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = load_plan(Path("plan.yaml"))
    run, folder = plan.run("ours", "branch-v2"), run_folder(plan, "branch-v2")
    weights = next(folder.checkpoints.glob("iter_0000012/*.distcp"))
    content = bytearray(weights.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    weights.write_bytes(content)
    write_result(folder.path, run, 12)
    assert needs_evaluation(plan, run)
    assert any("branch-v2: eval.json is not known to be of" in gap.text for gap in gaps(collect(plan)))
    assert jobs(capsys) == {
        "ours/main": "done",
        "ours/branch-v1": "done",
        "ours/branch-v2": "done",
        "eval/ours/branch-v1": "done",
        "eval/ours/branch-v2": "submit",
        "report": "submit",
    }
    evaluation, _ = read_sealed(folder.evaluation)
    result, _ = read_sealed(folder.result)
    write_sealed(folder.evaluation, evaluation | {"checkpoint": result["checkpoint"], "perplexity": 99.0})
    assert {key for key, action in jobs(capsys).items() if action != "done"} == {"report"}


def test_an_old_evaluation_of_a_new_training_is_done_again(copy: Path) -> None:
    plan = load_plan(Path("plan.yaml"))
    run, folder = plan.run("ours", "branch-v1"), run_folder(plan, "branch-v1")
    assert not needs_evaluation(plan, run)
    write_result(folder.path, run, 6)
    assert needs_evaluation(plan, run)


def test_a_new_evaluation_of_an_old_training_is_compared_with_the_checkpoint(copy: Path) -> None:
    plan = load_plan(Path("plan.yaml"))
    run, folder = plan.run("ours", "branch-v2"), run_folder(plan, "branch-v2")
    result, _ = read_sealed(folder.result)
    del result["checkpoint"]
    write_sealed(folder.result, result)
    assert not needs_evaluation(plan, run)
    (folder.checkpoints / "iter_0000012/manifest.json").write_text("{}")
    assert needs_evaluation(plan, run)
    shutil.rmtree(folder.checkpoints)
    assert not needs_evaluation(plan, run)


def tables(heading: str) -> dict[str, str]:
    """Return the tables below a heading: first column without its marks -> the rest of the row."""
    section = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(heading)]
    return {match[1]: match[2] for match in re.finditer(r"^\| `([^`]+)` \|(.*)$", text, re.MULTILINE)}


def fields(value: Any, place: str = "") -> set[str]:
    """Return the fields of an object and of the objects in its lists, as the page names them."""
    found: set[str] = set()
    for name, inner in value.items():
        found.add(place + name)
        if place + name in ("parent", "starts", "skipped"):
            for one in inner if isinstance(inner, list) else [inner or {}]:
                found |= fields(one, f"{place}{name}{'[]' if isinstance(inner, list) else ''}.")
    return found


@pytest.mark.parametrize("file", ["history.jsonl", "result.json", "eval.json", "lineage.json"])
def test_the_page_describes_every_field_and_no_other(continued: Path, file: str) -> None:
    described = tables(f"Fields of `{file}`")
    runs = continued / "runs/ours"
    lines = [(runs / "branch-v2" / file).read_text()]
    if file == "history.jsonl":
        lines = lines[0].splitlines()
    found = set().union(*(fields(json.loads(line)) for line in lines))
    assert found <= described.keys()
    assert {name for name, about in described.items() if "only" not in about} <= found


def test_the_page_describes_every_field_of_a_failure() -> None:
    assert tables("Fields of `error.json`").keys() == {
        *(field.name for field in dataclasses.fields(Failure)),
        SEAL,
    }


def test_evaluations_of_the_main_path_have_the_fields_of_an_evaluation(continued: Path) -> None:
    entries, sealed = read_sealed(continued / "runs/ours/main/evals.json")
    assert sealed
    assert [int(step) for step in entries] == list(MAIN_STEPS)
    described = tables("Fields of `eval.json`").keys()
    assert all(entry["checkpoint"] and entry.keys() <= described for entry in entries.values())


def test_the_page_describes_every_file(continued: Path) -> None:
    files, output = tables("Files of a run"), tables("Files of a plan's output")
    of_run = [re.sub(r"<\w+>", "*", name).rstrip("/") for name in files]
    for folder in (continued / "runs/ours").iterdir():
        for path in (*folder.iterdir(), *(folder / "checkpoints").iterdir()):
            name = path.relative_to(folder).as_posix()
            assert any(fnmatch(name, pattern) for pattern in of_run), name
    of_output = [re.sub(r"<\w+>", "*", name).rstrip("/") for name in output]
    for path in (*(continued / "runs").iterdir(), *(continued / "runs/ours").iterdir()):
        name = path.relative_to(continued / "runs").as_posix()
        assert name == "ours" or any(fnmatch(name, pattern) for pattern in of_output), name
    assert (continued / "runs/report/made-from.json").is_file()


def test_the_page_names_the_files_that_the_code_names() -> None:
    described = tables("Files of a run")
    found = {value.name for value in vars(RunFolder).values() if isinstance(value, Entry)}
    assert found == {name.rstrip("/") for name in described if not name.startswith("checkpoints/")} | {
        "checkpoints"
    }


@pytest.mark.parametrize(
    "name",
    [
        "history.jsonl", "result.json", "eval.json", "evals.json", "lineage.json", "downstream.json", "error.json"
    ],
)  # fmt: skip
def test_one_module_alone_spells_the_name_of_a_file(name: str) -> None:
    spelled = re.compile(rf"(?<![\w.-]){re.escape(name)}")
    modules = (ROOT / "megatron_lrpath").rglob("*.py")
    found = [path.name for path in modules if spelled.search(path.read_text(encoding="utf-8"))]
    assert found == ["folder.py"]

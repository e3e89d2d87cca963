"""The content of the output: a run is bound by its checkpoints, and by nothing before the first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lrpath.cli import main
from megatron_lrpath.data.identity import training_identity
from megatron_lrpath.data.slice import open_slices
from megatron_lrpath.plan import Plan, load_plan
from megatron_lrpath.readiness import FAILED, WARNING, Request, check_plan
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.runs.lineage import write_lineage
from tests.support.fake_trainer import save
from tests.support.training_fixtures import history, make_plan, run_words, train

STORY = (6, 6, 6)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_plan(tmp_path_factory.mktemp("data"), versions=STORY)


@pytest.fixture
def plan(data: Path, tmp_path: Path) -> Plan:
    """Return a plan with its own output on the module's data."""
    path = tmp_path / "plan.yaml"
    text = data.read_text().replace(f"output: {data.parent}/runs", f"output: {tmp_path}/runs")
    path.write_text(text)
    return load_plan(path)


def begun(plan: Plan, key: str, step: int | None = None, parent: int | None = None, **other: object) -> Path:
    """Return the folder of a run trained under the plan, with a checkpoint of `step` unless it is None."""
    run = plan.run(*key.split("/"))
    folder = plan.folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    names = [version.name for version in plan.versions[: run.version_index]]
    identity = training_identity(plan, run, open_slices(plan.data, names, verify=False)) | other
    write_lineage(folder, json.loads(json.dumps(identity)), None, 0, 1, None)
    if step is not None:
        save(RunFolder(folder).checkpoints, step)
    return folder


def edited(plan: Plan, *changes: tuple[str, str]) -> Plan:
    text = plan.path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    plan.path.write_text(text)
    return load_plan(plan.path)


def failures(plan: Plan, *extra: str, **request: object) -> list[str]:
    found = check_plan(plan, replace(Request(evaluate=False), extra=extra, **request))
    return [one.line for one in found if one.status == FAILED and not one.name.startswith("parent of")]


def parents(plan: Plan, run: str) -> list[str]:
    found = check_plan(plan, Request(("ours",), (run,)))
    return [one.line for one in found if one.status == FAILED]


V1, V2, V3 = (f"name: v{number}\n  steps: 6" for number in (1, 2, 3))

# the step of the main path's checkpoint, the change to the plan, the message
CHANGES: dict[str, tuple[int | None, tuple[tuple[str, str], ...], str]] = {
    "nothing": (4, (), ""),
    "no checkpoint, another rate": (None, (("max_lr: 0.01", "max_lr: 0.02"),), ""),
    "a checkpoint, another rate": (4, (("max_lr: 0.01", "max_lr: 0.02"),), "main.max_lr: was 0.01, is 0.02"),
    "a version that is not reached": (6, ((V2, "name: v2\n  steps: 5"),), ""),
    "a version that is not reached, gone": (6, ((f"- {V3}\n", ""),), ""),
    "the version that it is in, shorter": (4, ((V1, "name: v1\n  steps: 5"),), ""),
    "the version that it is in, too short": (
        5,
        ((V1, "name: v1\n  steps: 4"),),
        "version 1: was v1 with 6 steps",
    ),
    "a version that it has left": (8, ((V1, "name: v1\n  steps: 5"),), "version 1: was v1 with 6 steps"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_is_bound_by_what_it_has_kept(name: str, plan: Plan) -> None:
    step, changes, said = CHANGES[name]
    begun(plan, "ours/main", step)
    found = failures(edited(plan, *changes), paradigms=("ours",))
    assert len(found) == bool(said)
    assert said in " ".join(found)
    assert all(line.startswith(f"identity: {plan.output}: trained under other settings") for line in found)


def test_other_runs_are_bound_by_all_of_theirs(plan: Plan) -> None:
    begun(plan, "ptfs/scratch-v2", 4)
    assert failures(plan) == []
    found = failures(edited(plan, (V2, "name: v2\n  steps: 5")))
    assert "ptfs/scratch-v2 (version 2: was v2 with 6 steps, is v2 with 5 steps" in found[0]


def test_runs_that_differ_alike_are_named_together(plan: Plan) -> None:
    for key in ("ptfs/scratch-v1", "ptfs/scratch-v2", "ours/main"):
        begun(plan, key, 4)
    [found] = failures(edited(plan, ("seed: 7", "seed: 8")))
    assert "(seed: was 7, is 8)" in found
    assert "ours/main" in found
    assert found.count("seed: was") == 1


def test_a_slice_that_was_drawn_again_is_noticed_where_it_was_trained_on(plan: Plan) -> None:
    other = {"slices": {"v1": "0" * 64, "v2": "0" * 64, "v3": "0" * 64}}
    begun(plan, "ours/main", 4, **other)
    [found] = failures(plan)
    assert "slice v1 holds other documents" in found
    assert "slice v2" not in found


def test_command_line_arguments_are_compared_for_resumed_runs(plan: Plan) -> None:
    begun(plan, "ours/main", 4, arguments={"clip_grad": 0.5})
    assert failures(plan, "--clip-grad", "0.5", paradigms=("ours",)) == []
    [found] = failures(plan, "--clip-grad", "0.25", paradigms=("ours",))
    assert "argument clip_grad: was 0.5, is 0.25" in found
    [found] = failures(plan, paradigms=("ours",))
    assert "argument clip_grad: was 0.5, is not given" in found
    assert failures(plan, paradigms=("ptfs",)) == []  # no resume requested


def test_a_parent_without_the_checkpoint_that_a_run_starts_from(plan: Plan) -> None:
    folder = begun(plan, "ours/main", 18)
    step = plan.run("ours", "branch-v2").parent.step
    save(RunFolder(folder).checkpoints, plan.run("ours", "branch-v1").parent.step)
    [found] = parents(plan, "branch-v2")
    assert f"starts from the checkpoint of ours/main at step {step}, which is not in" in found
    assert parents(plan, "branch-v1") == []


@pytest.mark.parametrize(
    ("key", "step", "status"), [("ours/main", 8, FAILED), ("ptfs/scratch-v2", 8, WARNING)]
)
def test_a_renamed_version_exists_under_its_old_name(key: str, step: int, status: str, plan: Plan) -> None:
    folder = begun(plan, key, step)
    renamed = edited(plan, ("name: v2", "name: new"))
    found = {one.line: one.status for one in check_plan(renamed, Request()) if one.name == "versions"}
    assert list(found.values()) == [FAILED]  # the slice has the old name
    [line] = found
    assert f"version 2 is new in the plan, and has been trained under its old name v2 ({folder})" in line
    slices = Path(plan.path.parent / "slices")
    slices.mkdir()
    for name in ("v1", "v3", "valid"):
        (slices / f"{name}.slice").symlink_to(Path(plan.data.slices) / f"{name}.slice")
    (slices / "new.slice").touch()
    apart = replace(renamed, data=replace(renamed.data, slices=str(slices)))
    found = {one.line: one.status for one in check_plan(apart, Request()) if one.name == "versions"}
    assert list(found.values()) == [status]


def test_a_version_that_nothing_has_reached_may_be_renamed(plan: Plan) -> None:
    begun(plan, "ours/main", 6)
    found = check_plan(edited(plan, ("name: v2", "name: new")), Request())
    assert [one for one in found if one.name in ("versions", "identity")] == []


def test_the_trainer_agrees(plan: Plan) -> None:
    argv = run_words(plan.path, "ours", "main", "--save-interval", "4")
    begun(plan, "ours/main", None, seed=99)  # started once, without a checkpoint
    train([*argv, "--exit-interval", "4"])
    folder = plan.folder(plan.main)
    assert json.loads((folder / "lineage.json").read_text())["identity"]["seed"] == 7
    before = history(folder)
    shorter = edited(plan, (V1, "name: v1\n  steps: 5"), (V2, "name: v2\n  steps: 4"), (f"- {V3}\n", ""))
    assert failures(shorter, paradigms=("ours",)) == []
    train(argv).ok()
    assert history(folder)[: len(before)] == before
    names = json.loads((folder / "lineage.json").read_text())["identity"]["versions"]
    assert [version["steps"] for version in names] == [5, 4]
    longer = edited(plan, ("name: v1\n  steps: 5", "name: v1\n  steps: 6"))
    [found] = failures(longer, paradigms=("ours",))
    refused = train(argv)
    assert "version 1: was v1 with 5 steps, is v1 with 6 steps" in found
    assert "version 1: was v1 with 5 steps, is v1 with 6 steps" in refused.output
    assert main(["plan", str(plan.path), "--no-curves"]) == 2


def test_too_few_tokens_are_refused_before_a_lineage_is_written(plan: Plan) -> None:
    long = edited(plan, (V2, "name: v2\n  steps: 60"))
    refused = train(run_words(long.path, "ours", "main"))
    assert "version v2: its steps need 240 samples" in refused.output
    assert not (long.folder(long.main) / "lineage.json").exists()

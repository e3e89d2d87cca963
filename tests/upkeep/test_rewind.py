"""`lrpath rewind` resets the main path to before a version; nothing is lost before --confirm, at any kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lrpath.cli import main
from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import Plan, load_plan
from megatron_lrpath.plan.file.edit import with_version, without_versions
from megatron_lrpath.runs.checkpoints import complete_steps, tracked_step
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.runs.history import read_history
from megatron_lrpath.runs.lineage import check_parent, check_same_run, read_lineage
from megatron_lrpath.runs.results import completed_step
from megatron_lrpath.runs.rewinds import unfinished
from megatron_lrpath.upkeep.rewind import prepare
from tests.support.data_fixtures import make_indexed_dataset, make_slice
from tests.support.killed_at import killed_at
from tests.support.training_fixtures import history, make_plan, run_words, train
from tests.support.years_tree import again_and_again, make_tree, save

WORDS = ("--to-step", "40", "--drop", "v3")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return grown(tmp_path)


def grown(folder: Path) -> Plan:
    """Return the tree with the slices of its versions."""
    plan = make_tree(folder)
    for number, name in enumerate(("v1", "v2", "v3", "valid", "valid-v3")):
        prefix = make_indexed_dataset(folder / f"data/{name}_text_document", [[number + 1] * 30] * 50)
        make_slice(folder / f"data/slices/{name}.slice", [(prefix, range(50), "prose")])
    return plan


def steps(plan: Plan, name: str = "main") -> list[int]:
    return complete_steps(RunFolder(plan.folder(plan.run("ours", name))).checkpoints)


def test_the_main_path_goes_back_without_the_version(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = Path(plan.path), Path(plan.output)
    before = path.read_text()
    assert main(["rewind", str(path), *WORDS, "--dry-run"]) == 0
    assert path.read_text() == before
    assert len(steps(plan)) == 10
    assert main(["rewind", str(path), *WORDS]) == 0
    said = capsys.readouterr().out
    assert f"set aside in {output}/set-aside/1: 2 checkpoints after step 40 and ours/branch-v3" in said
    assert "available again: v3 and valid-v3" in said
    assert "as they are: ours/branch-v1 and ours/branch-v2" in said
    text = path.read_text()
    assert [line for line in before.splitlines() if line not in text.splitlines()] == [
        f"  valid: [{path.parent}/data/slices/valid, {path.parent}/data/slices/valid-v3]",
        "  - {name: v3, steps: 20}   # from the new crawler",
    ]
    assert [version.name for version in load_plan(path).versions] == ["v1", "v2"]
    after_rewind(load_plan(path))
    assert main(["rewind", str(path), *WORDS]) == 0
    assert "nothing to do" in capsys.readouterr().out


def after_rewind(plan: Plan) -> None:
    """Check the files that a finished rewind leaves."""
    output, folder = Path(plan.output), plan.folder(plan.main)
    run = RunFolder(folder)
    assert steps(plan) == [5, 10, 15, 20, 25, 30, 35, 40]
    assert tracked_step(run.checkpoints) == completed_step(folder) == read_history(folder).steps[-1] == 40
    assert steps(plan, "branch-v2") == [35, 40]
    aside = output / "set-aside/1/ours"
    assert complete_steps(aside / "main/checkpoints") == [45, 50]
    assert complete_steps(aside / "branch-v3/checkpoints") == [55, 60]
    assert read_history(aside / "main").steps[-1] == completed_step(aside / "main") == 50
    assert not (output / "ours/branch-v3").exists()
    (rewind,) = (read_lineage(folder) or {})["rewinds"]
    assert (rewind["from_step"], rewind["to_step"], rewind["dropped"]) == (50, 40, ["v3"])
    slices = Path(plan.data.slices)
    assert sorted(one.name for one in slices.glob("*.slice")) == ["v1.slice", "v2.slice", "valid.slice"]
    assert not plan.data.more_valid


def test_new_data_can_follow_and_what_is_set_aside_goes_when_confirmed(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = str(plan.path), Path(plan.output)
    assert main(["rewind", path, *WORDS]) == 0
    assert main(["status", path]) == 0
    assert "set aside by rewinds: " in capsys.readouterr().out
    assert main(["rewind", path]) == 0
    assert "nothing was removed" in capsys.readouterr().out
    assert main(["rewind", path, "--confirm"]) == 0
    assert not (output / "set-aside").exists()
    assert not list(Path(plan.data.slices).glob("*set-aside*"))
    capsys.readouterr()
    assert main(["status", path, "--json"]) == 0
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)["runs"]}
    assert rows["ours/main"]["rewinds"][0].startswith("rewound from step 50 to step 40 on ")
    assert main(["status", path]) == 0
    assert "ours/main: rewound from step 50 to step 40 on " in capsys.readouterr().out
    assert main(["report", path]) == 0
    report = (output / "report/report.md").read_text()
    assert "ours/main was rewound from step 50 to step 40 on " in report
    assert ", without v3." in report
    # the documents of the dropped version are free again
    source = ["--source", str(tmp_path / "data/v3_text_document"), "--name", "v3b", "--valid-share", "0"]
    assert main(["update", path, *source]) == 0
    assert [version.name for version in load_plan(path).versions] == ["v1", "v2", "v3b"]
    assert main(["rewind", path, "--to-step", "30"]) == 0
    assert steps(plan) == [5, 10, 15, 20, 25, 30]
    assert (output / "set-aside/2").is_dir()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ("--to-step", "45", "--drop", "v3"),
            "from step 40 on; choose that step or an earlier one (steps that",
        ),
        (("--to-step", "50"), "the main path is at 50; choose an earlier step"),
        (("--to-step", "38"), "no complete checkpoint of step 38 (steps that are kept: 10, 15, 20, 25"),
        (("--to-step", "40", "--drop", "v9"), "--drop v9: no version of"),
        (("--to-step", "40", "--drop", "v1"), "begin a new plan"),
        (("--drop", "v3"), "--to-step S is the step"),
        (("--to-step", "40", "--confirm"), "call it alone"),
    ],
)
def test_impossible_rewinds_are_refused(
    plan: Plan, argv: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rewind", str(plan.path), *argv]) == 2
    assert said in capsys.readouterr().err
    assert len(steps(plan)) == 10


def test_other_plan_keys_for_removed_steps_are_reported(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(plan.path)
    before = path.read_text()
    path.write_text(before + "also_branch_at: [45, 55]\n")
    assert main(["rewind", str(path), "--to-step", "40"]) == 0
    assert (
        "for branches of other plans (also_branch_at) until trained again: step 45 and 55"
        in capsys.readouterr().out
    )
    path.write_text(before + "also_branch_at: [55]\n")
    assert main(["rewind", str(path), "--to-step", "20", "--drop", "v3"]) == 2
    said = capsys.readouterr().err
    assert "without these versions the plan could not be used; change it first: " in said
    assert "also_branch_at" in said
    path.write_text(before.replace("20}   # from", "20, branch_mix: {slices: {valid-v2: 0.5}}}   # from"))
    assert main(["rewind", str(path), "--to-step", "20", "--drop", "v2"]) == 2
    assert "v3 mixes in valid-v2" in capsys.readouterr().err
    assert not [*Path(plan.data.slices).glob("*set-aside*")]


def test_a_record_whose_rewind_never_began_moves_nothing(plan: Plan) -> None:
    prepare(plan, 40, ["v3"]).record.save(Path(plan.output))  # killed at once; then the main path continues
    save(RunFolder(plan.folder(plan.main)).checkpoints, 55)
    assert main(["rewind", str(plan.path), "--confirm"]) == 0
    assert steps(plan)[-1] == 55
    assert main(["rewind", str(plan.path), *WORDS]) == 0
    assert steps(plan)[-1] == 40
    aside = Path(plan.output) / "set-aside/1/ours/main/checkpoints"
    assert complete_steps(aside) == [45, 50, 55]


def test_an_output_and_slices_behind_links_are_set_aside_where_they_lie(plan: Plan, tmp_path: Path) -> None:
    for place in ("runs", "data/slices"):
        there = tmp_path / "elsewhere" / place
        there.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).rename(there)
        (tmp_path / place).symlink_to(there)
    assert main(["rewind", str(plan.path), *WORDS]) == 0
    after_rewind(load_plan(plan.path))
    assert main(["rewind", str(plan.path), "--confirm"]) == 0
    assert not list((tmp_path / "elsewhere/data/slices").glob("*set-aside*"))


def test_a_rewound_main_path_trains_like_one_that_never_had_the_version(tmp_path: Path) -> None:
    path = make_plan(tmp_path, (6, 6, 6))
    train(run_words(path, "ours", "main")).ok()
    train(run_words(path, "ours", "branch-v3")).ok()
    assert main(["rewind", str(path), "--to-step", "12", "--drop", "v3"]) == 0
    assert not (tmp_path / "runs/ours/branch-v3").exists()
    prefix = make_indexed_dataset(
        tmp_path / "data/better_text_document", [[n % 90 + 1] * 31 for n in range(30)]
    )
    make_slice(tmp_path / "data/slices/v3.slice", [(prefix, range(30), "prose")])
    path.write_text(with_version(path, path.read_text(), {"name": "v3", "steps": 6}, []))
    train(run_words(path, "ours", "main")).ok()
    other = tmp_path / "other.yaml"
    other.write_text(path.read_text().replace(f"{tmp_path}/runs", f"{tmp_path}/other"))
    train(run_words(other, "ours", "main")).ok()
    losses = [[row["loss"] for row in history(tmp_path / f"{name}/ours/main")] for name in ("runs", "other")]
    assert len(losses[0]) == 15
    assert losses[0] == losses[1]


def test_killed_anywhere_it_can_be_called_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number, plan in enumerate(again_and_again(grown, tmp_path), 1):
        argv = ["rewind", str(plan.path), *WORDS]
        if not killed_at(number, argv):
            break
        refused_until_finished(load_plan(plan.path), capfd)
        assert main(argv) == 0
        after_rewind(load_plan(plan.path))
        assert main(["rewind", str(plan.path), "--confirm"]) == 0
    assert number > 12


def refused_until_finished(plan: Plan, capfd: pytest.CaptureFixture[str]) -> None:
    """Check that an interrupted rewind blocks training of the main path, and a finished one does not."""
    folder = plan.folder(plan.main)
    lineage = read_lineage(folder) or {}
    if unfinished(lineage) is None:
        return
    refusal = (
        rf"to step 40 was interrupted; call it again first: lrpath rewind {plan.path} --to-step 40 --drop v3"
    )
    with pytest.raises(UserError, match=refusal):
        check_same_run(folder, lineage["identity"])
    with pytest.raises(UserError, match=refusal):
        check_parent(plan.folder(plan.run("ours", "branch-v2")), folder, 30, lineage["identity"])
    assert main(["prune", str(plan.path), "--yes"]) == 2
    assert main(["rewind", str(plan.path), "--to-step", "20"]) == 2
    assert "another rewind was interrupted" in capfd.readouterr().err
    assert main(["rewind", str(plan.path), "--confirm"]) == 2


def test_a_killed_confirmation_can_be_called_again(tmp_path: Path) -> None:
    for number, plan in enumerate(again_and_again(grown, tmp_path), 1):
        assert main(["rewind", str(plan.path), *WORDS]) == 0
        argv = ["rewind", str(plan.path), "--confirm"]
        was_killed = killed_at(number, argv)
        assert main(argv) == 0
        assert not (Path(plan.output) / "set-aside").exists()
        assert steps(plan)[-1] == 40
        if not was_killed or number > 8:
            break


BLOCK = """\
data:
  valid:   # by these
  - s/valid
  - s/valid-v2   # its own
  - s/valid-v3
versions:
# the first
- name: v1
  steps: 4
# a comment that stays
- name: v2   # bad
  steps: 4
- {name: v3, steps: 4}
seed: 1
"""


@pytest.mark.parametrize(
    ("text", "names", "wanted"),
    [
        (
            BLOCK,
            ["v2"],
            BLOCK.replace("  - s/valid-v2   # its own\n", "").replace("- name: v2   # bad\n  steps: 4\n", ""),
        ),
        (
            BLOCK,
            ["v3"],
            BLOCK.replace("  - s/valid-v3\n", "").replace("- {name: v3, steps: 4}\n", ""),
        ),
        (
            "data: {valid: [a, valid-v2]}\nversions: [{name: v1, steps: 1}, {name: v2, steps: 2}]  # all\n",
            ["v2"],
            "data: {valid: [a]}\nversions: [{name: v1, steps: 1}]  # all\n",
        ),
        (
            "versions: [\n  {name: v1, steps: 1},\n  {name: v2, steps: 2},\n  {name: v3, steps: 2}]\ndata: {}\n",
            ["v2", "v3"],
            "versions: [\n  {name: v1, steps: 1}]\ndata: {}\n",
        ),
    ],
)
def test_versions_are_taken_out_of_the_text(text: str, names: list[str], wanted: str) -> None:
    valid = [f"{folder}valid-{name}" for name in names for folder in ("s/", "")]
    assert without_versions(Path("plan.yaml"), text, names, valid) == wanted

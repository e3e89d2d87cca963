"""`lrpath prune` removes only checkpoints from which nothing starts; a call after any kill completes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_lrpath.cli import main
from megatron_lrpath.merge.preview import plan_preview
from megatron_lrpath.plan import Plan, load_plan
from megatron_lrpath.runs.checkpoints import REMOVING, complete_steps
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.runs.storage import checkpoint_size, lying
from tests.support.killed_at import killed_at
from tests.support.training_fixtures import MODEL, make_plan, run_words, train
from tests.support.years_tree import again_and_again, make_tree


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return make_tree(tmp_path)


def steps(plan: Plan, name: str) -> list[int]:
    return complete_steps(RunFolder(plan.folder(plan.run("ours", name))).checkpoints)


def test_it_lists_first_and_removes_with_yes(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", str(plan.path)]) == 0
    said = capsys.readouterr().out
    assert "the model of v2" in said
    assert "nothing was removed; 8 checkpoints, " in said
    assert said.endswith(f"next: lrpath prune {plan.path} --yes\n")
    assert len(steps(plan, "main")) == 10
    assert main(["prune", str(plan.path), "--yes"]) == 0
    assert steps(plan, "main") == [45, 50]
    assert steps(plan, "branch-v2") == [35, 40]
    assert main(["prune", str(plan.path), "--yes"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_what_something_may_start_from_stays(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(plan.folder(plan.run("ours", "branch-v2")))
    path = Path(plan.path)
    path.write_text(path.read_text() + "also_branch_at: [15]\n")
    assert main(["prune", str(path), "--yes", "--keep-ends", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    reasons = {row["step"]: row["reason"] for row in answer["staying"] if row["key"] == "ours/main"}
    assert steps(plan, "main") == sorted(reasons) == [15, 20, 25, 30, 35, 40, 45, 50]
    assert "also_branch_at" in reasons[15]
    assert "the end of v1" in reasons[20]
    assert "ours/branch-v2" in reasons[30]
    assert "another alpha may leave from it, or a merge read it" in reasons[35]
    assert plan_preview(load_plan(path), "v2", None, None, None).steps == (30, 35, 40)


def test_a_run_in_another_output_is_left_alone(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, elsewhere = plan.folder(plan.main), tmp_path / "other/ours/main"
    elsewhere.parent.mkdir(parents=True)
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    assert main(["prune", str(plan.path), "--yes"]) == 0
    assert "ours/main: left alone: it is in another output" in capsys.readouterr().out
    assert len(steps(plan, "main")) == 10
    assert steps(plan, "branch-v2") == [35, 40]


def test_a_plan_with_fewer_versions_does_not_decide(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(plan.path)
    lines = [line for line in path.read_text().splitlines() if "crawler" not in line]
    path.write_text("\n".join(lines) + "\n")
    assert len(load_plan(path).versions) == 2
    assert main(["prune", str(path), "--yes"]) == 0
    assert len(steps(plan, "main")) == 10
    assert "the plan that has its later versions" in capsys.readouterr().out


def test_killed_anywhere_it_can_be_called_again(tmp_path: Path) -> None:
    for number, plan in enumerate(again_and_again(make_tree, tmp_path), 1):
        argv = ["prune", str(plan.path), "--yes"]
        was_killed = killed_at(number, argv)
        assert set(steps(plan, "main")) >= {45, 50}
        assert main(argv) == 0
        assert steps(plan, "main") == [45, 50]
        assert not [*Path(plan.output).rglob(f"*{REMOVING}")]
        if not was_killed:
            break
    assert number > 10


def test_plan_and_status_show_the_size_of_checkpoints(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(plan.path), "--json"]) == 0
    storage = json.loads(capsys.readouterr().out)["paradigms"]["ours"]["storage"]
    assert storage["checkpoint"] == storage["weights"] + storage["optimizer_state"]
    one = storage["checkpoint"]
    # main: branch points 10, 30, 50 and the ends 20, 40; a branch: its end
    assert storage["kept_by_version"] == {"v1": 3 * one, "v2": 3 * one, "v3": 2 * one}
    assert main(["plan", str(plan.path), "--no-curves"]) == 0
    assert "Storage: a checkpoint takes about" in capsys.readouterr().out
    assert main(["status", str(plan.path), "--json"]) == 0
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)["runs"]}
    assert rows["ours/main"]["bytes"] > 10_000
    assert main(["status", str(plan.path)]) == 0
    assert "on disk" in capsys.readouterr().out


@pytest.mark.parametrize("megatron", [{}, {"bf16": True}])
def test_a_real_checkpoint_takes_what_is_predicted(tmp_path: Path, megatron: dict[str, bool]) -> None:
    model = MODEL | {"hidden_size": 128, "ffn_hidden_size": 512}
    path = make_plan(tmp_path, (6,), model=model, megatron=megatron)
    train(run_words(path, "ours", "main")).ok()
    plan = load_plan(path)
    real = lying(RunFolder(plan.folder(plan.main)).checkpoints, plan.main.last_step)
    assert real == pytest.approx(checkpoint_size(plan).total, rel=0.05)

"""`lrpath archive`: ends of versions and branch points in an object store, and their retrieval."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from megatron_lrpath.cli import main
from megatron_lrpath.commands.generate import export_of
from megatron_lrpath.errors import UserError
from megatron_lrpath.export.folder import RECORD
from megatron_lrpath.locks import FolderLock
from megatron_lrpath.merge.preview import plan_preview
from megatron_lrpath.plan import Plan, load_plan
from megatron_lrpath.readiness import Request, check_plan, fetch_archived
from megatron_lrpath.readiness.output import parent_checks
from megatron_lrpath.runs.archive import FETCHING, Archive
from megatron_lrpath.runs.checkpoints import (
    MANIFEST,
    FileSum,
    checkpoint_folder,
    complete_steps,
    present_fingerprint,
    sum_files,
    write_manifest,
)
from megatron_lrpath.runs.folder import RunFolder
from tests.support.killed_at import killed_at
from tests.support.s3_server import BUCKET, s3_server
from tests.support.training_fixtures import history, make_plan, run_words, train
from tests.support.years_tree import make_tree
from tests.training.test_training_branch import tensors

POINTS = {
    "ours/main": [10, 20, 30, 40, 50],
    "ours/branch-v1": [20],
    "ours/branch-v2": [40],
    "ours/branch-v3": [60],
}


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with s3_server():
        yield


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return make_team(tmp_path, f"s3://{BUCKET}/{tmp_path.name}")


def make_team(folder: Path, url: str) -> Plan:
    made = make_tree(folder)
    path = Path(made.path)
    path.write_text(path.read_text() + f"archive: {url}\n")
    return load_plan(path)


def root(plan: Plan, name: str) -> Path:
    return RunFolder(plan.folder(plan.run("ours", name))).checkpoints


def steps(plan: Plan, name: str) -> list[int]:
    return complete_steps(root(plan, name))


def archived(plan: Plan) -> dict[str, list[int]]:
    """Return the steps of the complete checkpoints in the archive, by run."""
    found = Archive.of(plan)
    assert found is not None
    return {key: sorted(steps) for key, steps in found.complete.items()}


def reads_checkpoint(event: str, arguments: tuple[Any, ...]) -> bool:
    """Return whether an audit event opens a file of a checkpoint, as each copy of a checkpoint does."""
    return event == "open" and str(arguments[0]).endswith((".distcp", MANIFEST))


def test_what_is_archived_can_leave_the_disk_and_comes_back(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(plan.path)
    assert main(["archive", path, "--dry-run"]) == 0
    assert "to copy: 8 checkpoints" in capsys.readouterr().out
    assert archived(plan) == {}
    assert main(["archive", path]) == 0
    assert archived(plan) == POINTS
    assert "copied to s3://" in capsys.readouterr().out
    assert main(["archive", path]) == 0
    assert "nothing to copy" in capsys.readouterr().out
    assert main(["archive", path, "--verify"]) == 0
    assert "8 archived checkpoints: all files hold" in capsys.readouterr().out
    # prune detects it
    before = {name: steps(plan, name) for name in ("main", "branch-v1")}
    content = (checkpoint_folder(root(plan, "main"), 10) / "__0_0.distcp").read_bytes()
    assert main(["prune", path, "--keep-ends", "--yes"]) == 0
    assert "the model of v1; archived" in capsys.readouterr().out
    assert steps(plan, "main") == [20, 40, 45, 50]
    assert main(["prune", path, "--keep-ends", "--archived", "--yes"]) == 0
    assert steps(plan, "main") == [45, 50]
    assert steps(plan, "branch-v3") == [55, 60]
    assert main(["prune", path]) == 0  # a model in the archive counts: no other checkpoint is kept for it
    assert "nothing to do" in capsys.readouterr().out
    assert main(["archive", path, "--fetch", "ours/main:10"]) == 0
    assert steps(plan, "main") == [10, 45, 50]
    assert (checkpoint_folder(root(plan, "main"), 10) / "__0_0.distcp").read_bytes() == content
    assert before["main"] != [45, 50]
    assert main(["archive", path, "--fetch", "ours/main:15"]) == 2
    assert "has no complete checkpoint of ours/main at step 15" in capsys.readouterr().err
    assert main(["archive", path, "--fetch", "main"]) == 2
    assert "it has ours/branch-v1:20" in capsys.readouterr().err


def test_a_branch_that_needs_an_archived_checkpoint_gets_it(plan: Plan) -> None:
    assert main(["archive", str(plan.path)]) == 0
    shutil.rmtree(plan.folder(plan.run("ours", "branch-v1")))
    shutil.rmtree(checkpoint_folder(root(plan, "main"), 10))
    request = Request(paradigms=("ours",))
    tasks = request.tasks(plan)
    [found] = parent_checks(plan, request.todo(tasks), tasks)
    assert (found.status, "fetched before the training starts" in found.found) == ("info", True)
    assert not any(
        one.name == "parent of ours/branch-v1" and one.status == "failed" for one in check_plan(plan, request)
    )
    fetch_archived([plan], request)
    assert 10 in steps(plan, "main")
    tasks = request.tasks(plan)
    assert parent_checks(plan, request.todo(tasks), tasks) == []


def exports_once(plan: Plan, run: str) -> None:
    """Export a run with the function that `lrpath generate` uses."""
    exported = export_of(plan, plan.run("ours", run))
    assert exported == RunFolder(plan.folder(plan.run("ours", run))).exported


def of_branch(*argv: str) -> Callable[[Plan], object]:
    """Return a call of a command on branch-v1."""
    return lambda plan: main([argv[0], str(plan.path), "--run", "branch-v1", *argv[1:]])


@pytest.mark.parametrize(
    ("run", "step", "command"),
    [
        ("branch-v1", 20, of_branch("eval")),
        ("branch-v1", 20, of_branch("eval", "--tasks", "gsm8k")),
        ("branch-v1", 20, of_branch("export")),
        ("branch-v1", 20, lambda plan: exports_once(plan, "branch-v1")),
        ("main", 10, lambda plan: plan_preview(plan, "v1", None, None, None)),
    ],
    ids=["eval", "eval --tasks", "export", "generate", "merge"],
)
def test_what_reads_an_archived_checkpoint_gets_it(
    run: str,
    step: int,
    command: Callable[[Plan], object],
    plan: Plan,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["archive", str(plan.path)]) == 0
    folder = checkpoint_folder(root(plan, run), step)
    before = sum_files(folder)
    shutil.rmtree(folder)
    capsys.readouterr()
    read: list[dict[str, FileSum]] = []

    def reads(*_: object, **__: object) -> Any:
        """Record the checkpoint's checksums in place of a reader, and stop the command."""
        read.append(sum_files(folder))
        raise UserError("it has been read")

    monkeypatch.setattr("megatron_lrpath.commands.eval.run_logged", reads)
    monkeypatch.setattr("megatron_lrpath.commands.eval.require_harness", lambda: None)
    monkeypatch.setattr("megatron_lrpath.export.folder.export_checkpoint", reads)
    with suppress(UserError):
        command(plan)
    assert sum_files(folder) == before
    assert read == ([] if run == "main" else [before])  # a preview of a merge reads only what exists
    told = [line for line in capsys.readouterr().err.splitlines() if "fetching" in line]
    assert len(told) == 1
    assert told[0].startswith(f"ours/{run}: fetching the checkpoint of step {step} from s3://")
    with suppress(UserError):
        command(plan)
    assert "fetching" not in capsys.readouterr().err


def test_two_processes_do_not_fetch_one_checkpoint_at_once(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["archive", str(plan.path)]) == 0
    place = root(plan, "branch-v1")
    folder = checkpoint_folder(place, 20)
    before = sum_files(folder)
    shutil.rmtree(folder)
    lock = FolderLock.acquire(folder.with_name(folder.name + FETCHING))
    fetch = ["archive", str(plan.path), "--fetch", "ours/branch-v1:20"]
    assert main(fetch) == 2
    assert f"process {os.getpid()} on" in capsys.readouterr().err
    assert steps(plan, "branch-v1") == [15]
    lock.close()
    assert main(fetch) == 0
    assert sum_files(folder) == before


def test_a_model_that_is_exported_is_not_fetched_again(plan: Plan) -> None:
    assert main(["archive", str(plan.path)]) == 0
    run = plan.run("ours", "branch-v1")
    exported = RunFolder(plan.folder(run)).exported
    exported.mkdir()
    made_of = present_fingerprint(root(plan, "branch-v1"), 20)
    (exported / RECORD).write_text(json.dumps({"checkpoint": made_of}))
    shutil.rmtree(checkpoint_folder(root(plan, "branch-v1"), 20))
    assert export_of(plan, run) == exported
    assert steps(plan, "branch-v1") == [15]


@pytest.mark.slow
def test_a_branch_from_a_fetched_checkpoint_is_the_same_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_plan(tmp_path, (6, 6), archive=f"file://{tmp_path}/store")
    plan, argv = load_plan(path), run_words(path, "ours", "branch-v1")
    train(run_words(path, "ours", "main")).ok()
    train(argv).ok()
    branch = plan.folder(plan.run("ours", "branch-v1"))

    def trained() -> tuple[dict[str, str], list[tuple[int, float, float]]]:
        rows = [(row["step"], row["loss"], row["lr"]) for row in history(branch)]
        return tensors(branch / "checkpoints/iter_0000006"), rows

    wanted = trained()
    assert len(wanted[1]) == 3
    assert main(["archive", str(path)]) == 0
    assert main(["prune", str(path), "--archived", "--yes"]) == 0
    assert steps(plan, "main") == [6, 9], "the branch point of v1 has left the disk"
    shutil.rmtree(branch)
    capsys.readouterr()
    monkeypatch.setattr("megatron_lrpath.launch.local.carry_out", lambda *_: train(argv).ok() and 0)
    assert main(["run", str(path), "--run", "branch-v1", "--device", "cpu", "--no-evaluate"]) == 0
    assert "ours/main: fetching the checkpoint of step 3 from file://" in capsys.readouterr().err
    assert steps(plan, "main") == [3, 6, 9]
    assert trained() == wanted


def test_a_copy_and_a_fetch_that_were_killed_at_any_point_continue(plan: Plan, tmp_path: Path) -> None:
    argv = ["archive", str(plan.path)]
    for number in range(2, 400, 7):
        was_killed = killed_at(number, argv, reads_checkpoint)
        for key, found in archived(plan).items():
            assert set(found) <= set(POINTS[key])
        if not was_killed:
            break
    assert number > 9
    assert main(argv) == 0
    assert archived(plan) == POINTS
    assert main([*argv, "--verify"]) == 0
    folder = checkpoint_folder(root(plan, "main"), 30)
    shutil.rmtree(folder)
    fetch = [*argv, "--fetch", "ours/main:30"]
    for number in range(1, 400, 2):
        was_killed = killed_at(number, fetch)
        assert not folder.exists() or (folder / MANIFEST).is_file()
        if not was_killed or folder.exists():
            break
    assert main(fetch) == 0
    assert 30 in steps(plan, "main")
    assert not [*root(plan, "main").glob(f"*{FETCHING}")]


def test_nothing_damaged_is_archived_or_fetched_or_removed(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = str(plan.path), checkpoint_folder(root(plan, "main"), 20)
    good = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(good[:-1] + b"x")
    assert main(["archive", path]) == 2
    assert "the checkpoint is damaged and was not archived" in capsys.readouterr().err
    assert 20 not in archived(plan).get("ours/main", [])
    (folder / "__0_0.distcp").write_bytes(good)
    assert main(["archive", path]) == 0
    # another training of the same step
    (folder / "__0_0.distcp").write_bytes(good[::-1])
    write_manifest(folder, 20, sum_files(folder, {}))
    assert main(["prune", path, "--keep-ends", "--archived", "--yes"]) == 2
    assert "has another checkpoint of this step; nothing was removed" in capsys.readouterr().err
    assert len(steps(plan, "main")) == 10
    archive = Archive.of(plan)
    assert archive is not None
    with pytest.raises(UserError, match="are different checkpoints of this step"):
        archive.put("ours/main", root(plan, "main"), 20)
    # damage in the store
    archive.fs.pipe_file(f"{archive.place('ours/main', 30)}/__0_0.distcp", b"z" * len(good))
    assert main(["archive", path, "--verify"]) == 1
    assert "iter_0000030/__0_0.distcp is missing, or holds other bytes" in capsys.readouterr().err
    shutil.rmtree(checkpoint_folder(root(plan, "main"), 30))
    assert main(["archive", path, "--fetch", "ours/main:30"]) == 2
    assert "holds other bytes than were written; restore it" in capsys.readouterr().err
    assert 30 not in steps(plan, "main")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s3://no-such-bucket/years", "Check the address, the credentials"),
        ("nosuch://place/years", "Protocol not known: nosuch"),
    ],
)
def test_an_archive_that_cannot_be_used_names_the_way_on(
    url: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_team(tmp_path, url)
    assert main(["archive", str(plan.path)]) == 2
    assert told in capsys.readouterr().err
    if url.startswith("nosuch"):
        assert main(["prune", str(plan.path), "--archived"]) == 2
        assert main(["prune", str(plan.path), "--json"]) == 0  # archived checkpoints are not needed
        said = capsys.readouterr()
        assert "what is archived is not known" in said.err
        assert json.loads(said.out)["spare"]


@pytest.mark.parametrize(
    ("url", "told"), [("bucket/x", "is no address"), ("s3://me:word@host/x", "holds credentials")]
)
def test_an_address_in_the_plan_is_checked(
    url: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=told):
        make_team(tmp_path, url)
    path = tmp_path / "plan.yaml"
    path.write_text(path.read_text().split("archive: ")[0])
    assert main(["archive", str(path)]) == 2
    assert "add a line like `archive: s3://BUCKET/FOLDER`" in capsys.readouterr().err

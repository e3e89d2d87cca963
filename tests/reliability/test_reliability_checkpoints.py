"""Only complete checkpoints count: damaged ones are set aside on loading, retention keeps needed ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import xxhash

from megatron_lrpath.checkpoints.reader import written_items
from megatron_lrpath.runs import checkpoints as disk
from megatron_lrpath.runs.checkpoints import MANIFEST, item_key, read_manifest, sum_file
from megatron_lrpath.training.checkpoints.ahead import ReadAhead
from megatron_lrpath.training.checkpoints.commit import Saves
from megatron_lrpath.training.options import from_plan
from megatron_lrpath.training.options.arguments import read_early
from tests.support.training_fixtures import Outcome, history, make_plan, run_words, train

EVERY_TWO = ("--save-interval", "2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a main path trained for six of nine steps; checkpoints of steps 2, 3, 4, 6."""
    folder = tmp_path_factory.mktemp("trained")
    argv = run_words(make_plan(folder, (6, 6)), "ours", "main", *EVERY_TWO, "--exit-interval", "6")
    train(argv).ok()
    return folder


@pytest.fixture
def folder(trained: Path) -> Iterator[Path]:
    """Yield the trained folder in its original state."""
    shutil.copytree(trained / "runs", trained / "kept")
    yield trained
    shutil.rmtree(trained / "runs")
    (trained / "kept").rename(trained / "runs")


def root_of(folder: Path) -> Path:
    """Return the folder of the main path's checkpoints."""
    return folder / "runs/ours/main/checkpoints"


def again(folder: Path, *extra: str, nproc: int = 1) -> Outcome:
    """Call the main path again, for one step."""
    argv = run_words(folder / "plan.yaml", "ours", "main", "--exit-interval", "1", *extra)
    return train(argv, nproc)


def flip(path: Path, where: float = 0.5) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as stream:
        stream.seek(int(path.stat().st_size * where))
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


def weights(folder: Path, step: int) -> Path:
    """Return a file with weights in the checkpoint of `step`."""
    return next(disk.checkpoint_folder(root_of(folder), step).glob("*.distcp"))


def first_step(folder: Path) -> int:
    """Return the step at which the last start began, according to the lineage."""
    starts = json.loads((folder / "runs/ours/main/lineage.json").read_text())["starts"]
    return int(starts[-1]["step"])


def xxh3(path: Path, offset: int, length: int) -> str:
    """Return the checksum of a part of a file."""
    return xxhash.xxh3_128_hexdigest(path.read_bytes()[offset : offset + length])


@pytest.mark.parametrize("extra", [(), ("--async-save",)], ids=["sync", "async"])
def test_a_manifest_has_the_checksum_of_every_file_and_item(tmp_path: Path, extra: tuple[str]) -> None:
    argv = run_words(make_plan(tmp_path, (6, 6)), "ours", "main", *EVERY_TWO, *extra)
    train([*argv, "--exit-interval", "5"], nproc=2).ok()
    assert disk.complete_steps(root_of(tmp_path)) == [2, 3, 4, 5]
    for step in (2, 3, 4, 5):
        checkpoint = disk.checkpoint_folder(root_of(tmp_path), step)
        manifest = read_manifest(checkpoint)
        assert set(manifest) == {path.name for path in checkpoint.iterdir()} - {MANIFEST}
        assert {name: sum_file(checkpoint / name) for name in manifest} == manifest
        items = written_items(checkpoint)
        assert {name for name, one in manifest.items() if one.items} == items.keys()
        for name, places in items.items():
            expected = {item_key(*place): xxh3(checkpoint / name, *place) for place in places}
            assert manifest[name].items == expected, "a sum of each tensor and object"
    assert disk.tracked_step(root_of(tmp_path)) == 5
    assert [name for name in os.listdir(root_of(tmp_path)) if disk.SAVING in name] == []
    train([*argv, "--exit-interval", "7"]).ok()
    assert first_step(tmp_path) == 5


DAMAGE = {
    "flipped bit": lambda path: flip(path),
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "missing": lambda path: path.unlink(),
    "no manifest, unfinished": lambda path: [path.with_name(n).unlink() for n in (MANIFEST, "metadata.json")],
    "manifest damaged": lambda path: path.with_name(MANIFEST).write_text('{"format": 1, "st'),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_used(folder: Path, name: str) -> None:
    DAMAGE[name](weights(folder, 6))
    outcome = again(folder).ok()
    assert "the checkpoint of step 6 is damaged" in outcome.output
    assert "Set aside as iter_0000006.damaged" in outcome.output
    assert first_step(folder) == 4
    assert disk.complete_steps(root_of(folder)) == [2, 3, 4, 5]
    assert [line["step"] for line in history(folder / "runs/ours/main")] == [1, 2, 3, 4, 5]


def test_a_start_reads_ahead_while_it_imports_and_confirms_what_is_whole(folder: Path) -> None:
    ahead = ReadAhead()

    def confirmed(run: str, checkpoint: Path) -> tuple[set[str], set[str]]:
        ahead.begin(read_early(run_words(folder / "plan.yaml", "ours", run)))
        sums = read_manifest(checkpoint)
        return ahead.confirmed(checkpoint, sums, sums), set(sums)

    newest = disk.checkpoint_folder(root_of(folder), 6)
    found, every = confirmed("main", newest)
    assert found == every
    flip(weights(folder, 6))
    found, every = confirmed("main", newest)
    assert found == every - {weights(folder, 6).name}
    found, every = confirmed("branch-v1", disk.checkpoint_folder(root_of(folder), 3))
    assert found == every, "a branch's first start reads its parent's checkpoint"
    assert ahead.confirmed(disk.checkpoint_folder(root_of(folder), 4), {}, ["a file"]) == set()


@pytest.mark.parametrize(
    "argv", [["--plan"], ["--plan", "missing.yaml", "--paradigm", "ours", "--run", "main"], []]
)
def test_reading_ahead_reports_no_errors(argv: list[str]) -> None:
    ReadAhead().begin(read_early(argv))


def test_all_ranks_go_back_to_the_same_checkpoint(folder: Path) -> None:
    flip(weights(folder, 6))
    flip(weights(folder, 4), where=0.1)
    outcome = again(folder, "--tensor-model-parallel-size", "2", nproc=2).ok()
    assert outcome.output.count("is damaged") == 2
    assert first_step(folder) == 3


def test_sizes_alone_are_checked_on_request(folder: Path) -> None:
    flip(weights(folder, 6))
    assert "is damaged" not in again(folder, "--checkpoint-check", "sizes").output
    assert first_step(folder) == 6
    os.truncate(weights(folder, 7), 10)
    assert "has 10 bytes instead of" in again(folder, "--checkpoint-check", "sizes").ok().output


def test_where_no_checkpoint_is_whole_the_run_stops_with_the_list(folder: Path) -> None:
    for step in (2, 3, 4, 6):
        flip(weights(folder, step))
    for _ in range(2):
        outcome = again(folder)
        assert outcome.status == [2]
        error = outcome.output.partition("lrpath: error: ")[2]
        assert "no whole checkpoint is left" in error
        for step in (2, 3, 4, 6):
            assert f"iter_000000{step}.damaged" in error
    assert first_step(folder) == 0


def test_a_branch_refuses_a_damaged_branch_point_and_leaves_it_where_it_is(folder: Path) -> None:
    flip(weights(folder, 3))
    outcome = train(run_words(folder / "plan.yaml", "ours", "branch-v1"))
    assert outcome.status == [2]
    assert "the checkpoint of step 3, from which this run starts, is damaged" in outcome.output
    assert disk.checkpoint_folder(root_of(folder), 3).is_dir()


def test_a_branch_neither_waits_for_nor_reads_what_is_still_being_written(folder: Path) -> None:
    """The checkpoint is complete except for its name."""
    point = disk.checkpoint_folder(root_of(folder), 3)
    point.rename(disk.saving_folder(point))
    outcome = train(run_words(folder / "plan.yaml", "ours", "branch-v1"))
    assert outcome.status == [2]
    assert "no checkpoint of step 3; it has steps 2, 4, 6" in outcome.output
    disk.saving_folder(point).rename(point)
    train(run_words(folder / "plan.yaml", "ours", "branch-v1")).ok()


def test_a_branch_with_checkpoints_of_its_own_outlives_its_parents(folder: Path) -> None:
    argv = run_words(folder / "plan.yaml", "ours", "branch-v1")
    train([*argv, "--exit-interval", "4"]).ok()
    shutil.rmtree(disk.checkpoint_folder(root_of(folder), 3))
    train(argv).ok()
    assert [line["step"] for line in history(folder / "runs/ours/branch-v1")] == [4, 5, 6]


def test_a_damaged_or_missing_tracker_has_no_effect(folder: Path) -> None:
    tracker = root_of(folder) / disk.TRACKER
    tracker.write_bytes(b"\xff\x00 not a number")
    train(run_words(folder / "plan.yaml", "ours", "branch-v1", "--exit-interval", "4")).ok()
    assert tracker.read_bytes() == b"\xff\x00 not a number"
    again(folder).ok()
    assert first_step(folder) == 6
    assert tracker.read_text() == "7"
    tracker.unlink()
    again(folder).ok()
    assert first_step(folder) == 7


def test_what_a_killed_save_left_is_swept_and_never_loaded(folder: Path) -> None:
    root = root_of(folder)
    shutil.copytree(root / "iter_0000006", root / "iter_0000008.saving")
    shutil.copytree(root / "iter_0000006", root / "iter_0000002.removing")
    (root / "iter_0000008").mkdir()
    run = root.parent
    unfinished = [root / f".{disk.TRACKER}.abcdefgh.tmp"]
    unfinished += [run / f".{name}.abcdefgh.tmp" for name in ("lineage.json", "history.jsonl", "result.json")]
    others = run / ".eval.json.abcdefgh.tmp"  # an evaluation may be writing it
    for path in (*unfinished, others):
        path.touch()
    again(folder, *EVERY_TWO).ok()
    assert first_step(folder) == 6
    assert sorted(os.listdir(root)) == sorted(
        [".lock", disk.TRACKER, *(f"iter_000000{step}" for step in (2, 3, 4, 6, 7))]
    )
    assert not any(path.exists() for path in unfinished)
    assert others.exists()


def test_retention_leaves_two_newest_and_what_others_start_from(tmp_path: Path) -> None:
    argv = run_words(make_plan(tmp_path, (6, 6)), "ours", "main", "--save-interval", "1")
    train([*argv, "--save-retain-interval", "8"]).ok()
    assert disk.complete_steps(root_of(tmp_path)) == [3, 6, 8, 9]


def test_checkpoints_that_an_earlier_start_had_to_keep_are_kept(tmp_path: Path) -> None:
    """Called again without the --save-interval of the first start, the run falls under the default."""
    argv = run_words(make_plan(tmp_path, (6, 6)), "ours", "main")
    train([*argv, *EVERY_TWO, "--exit-interval", "5"]).ok()
    train(argv).ok()
    assert disk.complete_steps(root_of(tmp_path)) == [2, 3, 4, 5, 6, 9]


def test_a_plan_without_save_keys_saves_every_500_steps_and_keeps_the_newest_two(tmp_path: Path) -> None:
    args = SimpleNamespace(save_interval=None, save_retain_interval=None, train_iters=1700, optimizer="adam")
    args.tensor_model_parallel_size = 1
    from_plan.apply_defaults(args, {})
    assert args.save_interval == 500
    saves = Saves(tmp_path, frozenset({700}), frozenset(), args.save_retain_interval, [])
    assert [step for step in (500, 700, 1000, 1500) if saves.is_kept(step)] == [700]

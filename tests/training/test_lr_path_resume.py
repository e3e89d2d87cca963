"""A run by --lr-path resumes only as the same run: its curve, parent, weight decay, batch, seed and data."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_lrpath.runs.checkpoints import complete_steps
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.runs.lineage import read_lineage
from tests.support.training_fixtures import Outcome, make_plan, train
from tests.training.test_training_branch import refusal
from tests.training.test_training_rates import words_without_plan

RATES = ["--lr", "0.01", "--min-lr", "0.001"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data and runs.

    The main path of 8 steps keeps step 4; a run of every other kind was stopped before its end.
    """
    folder = tmp_path_factory.mktemp("resume")
    make_plan(folder, (12, 12))
    train([*command(folder, "main")]).ok()
    for name in ("branch", "scratch", "continual"):
        train([*command(folder, name), "--exit-interval", "6"]).ok()
    return folder


STARTS = {
    "main": [
        "--lr-path",
        "main",
        "--lr-warmup-iters",
        "2",
        "--train-iters",
        "8",
        "--lr-path-keep-steps",
        "4",
    ],
    "branch": ["--lr-path", "branch", "--lr-path-decay-iters", "8"],
    "scratch": ["--lr-path", "scratch", "--lr-warmup-iters", "2", "--train-iters", "8"],
    "continual": ["--lr-path", "continual", "--lr-path-style", "wsd", "--lr-path-decay-iters", "8"],
}


def command(folder: Path, name: str, *changes: str, root: Path | None = None) -> list[str]:
    """Return the command line of a run, with `changes` (an option and its value) instead of the defaults.

    Its folder and its parent's are in `root`.
    """
    root = root or folder
    argv = [
        *words_without_plan(folder / "plan.yaml", folder),
        *RATES,
        *STARTS[name],
        "--save",
        str(root / name),
    ]
    if name in ("branch", "continual"):
        argv += ["--lr-path-parent", str(root / "main"), "--lr-path-parent-step", "4"]
    for option, value in zip(changes[::2], changes[1::2], strict=True):
        if option in argv:
            place = argv.index(option) + 1
            argv[place : place + 1] = value.split()
        else:
            argv += [option, *value.split()]
    return argv


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the runs, which a test may change; the data are not copied."""
    for name in STARTS:
        shutil.copytree(folder / name, tmp_path / name)
    return tmp_path


CHANGES = [
    ("branch", ("--lr-path-decay-iters", "4"), "learning rate of this run.end: was 12, is 8"),
    ("branch", ("--lr-path-style", "linear"), "style: was cosine, is linear"),
    ("branch", ("--lr", "0.02"), "max_lr: was 0.01, is 0.02"),
    ("branch", ("--min-lr", "0.002"), "min_lr: was 0.001, is 0.002"),
    ("branch", ("--lr-path-cycle-iters", "20"), "cycle: was 8, is 20"),
    ("branch", ("--lr-path-parent-step", "8"), "start: was 4, is 8"),
    ("branch", ("--lr-path", "continual"), "kind: was branch, is continual"),
    ("branch", ("--lr-path-parent", "scratch"), "is gone, so that it cannot be compared"),
    ("branch", ("--seed", "8"), "argument seed: was 7, is 8"),
    ("branch", ("--global-batch-size", "8"), "batch.global_batch_size: was 4, is 8"),
    ("branch", ("--seq-length", "8"), "batch.seq_length: was 16, is 8"),
    ("branch", ("--data-path", "v2_text_document"), "argument data_path: was ['v1_text_document ("),
    ("branch", ("--split", "1,1,0"), "argument split: was 1,0,0, is 1,1,0"),
    ("branch", ("--weight-decay", "0.1"), "weight decay.constant: was 0.01, is 0.1"),
    ("branch", ("--adam-beta2", "0.9"), "argument adam_beta2: was not given, is 0.9"),
    ("branch", ("--clip-grad", "0.5"), "argument clip_grad"),
    ("branch", ("--vocab-size", "119"), "argument vocab_size: was 120, is 119"),
    ("branch", ("--dataloader-type", "cyclic"), "dataloader"),
    ("scratch", ("--train-iters", "16"), "end: was 8, is 16"),
    ("scratch", ("--lr-warmup-iters", "3"), "warmup: was 2, is 3"),
    ("continual", ("--lr-path-cpt-variant", "keep-min"), "shape: was whole, is floor"),
    ("continual", ("--lr-path-wsd-decay-fraction", "0.5"), "wsd_decay_fraction"),
    ("continual", ("--lr-path-wsd-decay-shape", "minus-sqrt"), "wsd_decay_shape"),
    ("main", ("--lr-warmup-iters", "3"), "warmup: was 2, is 3"),
    ("main", ("--lr", "0.02"), "max_lr: was 0.01, is 0.02"),
]


@pytest.mark.parametrize(("name", "change", "said"), CHANGES)
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "older version"])
def test_a_run_does_not_resume_as_a_different_run(
    folder: Path, copy: Path, name: str, change: tuple[str, str], said: str, recorded: bool
) -> None:
    """This includes a run begun by a version without records: its checkpoints contain most settings."""
    if not recorded:
        RunFolder(copy / name).lineage.unlink()
        if change[0] == "--lr-path-parent":
            pytest.skip("a checkpoint does not record its parent")
    place = {"scratch": str(copy / "scratch"), "v2_text_document": str(folder / "data/v2_text_document")}
    option, value = change
    option_and_value = (option, place.get(value, value))
    steps = complete_steps(copy / name)
    message = refusal(command(folder, name, *option_and_value, root=copy))
    assert message.count("\n") == 1, "one line"
    if recorded:
        assert said in message
        assert "--save" in message or "cannot be given" in message
    assert complete_steps(copy / name) == steps


SAME = [
    ("branch", ("--adam-beta2", "0.999")),
    ("branch", ("--weight-decay", "0.01", "--weight-decay-incr-style", "constant")),
    ("branch", ("--lr-path-decay-iters", "8", "--train-iters", "12")),
    ("branch", ("--lr-path-wsd-decay-fraction", "0.5")),
    ("branch", ("--micro-batch-size", "1", "--log-interval", "5")),
    ("main", ("--train-iters", "10")),
    ("main", ("--train-iters", "10", "--lr-path-style", "linear", "--min-lr", "0.002")),
]


@pytest.mark.parametrize(("name", "changes"), SAME)
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "older version"])
def test_a_run_resumes_with_changes_that_keep_its_identity(
    folder: Path, copy: Path, name: str, changes: tuple[str, ...], recorded: bool
) -> None:
    """These are given defaults, values that its curve does not read, its layout, and a longer main path."""
    if not recorded:
        RunFolder(copy / name).lineage.unlink()
    outcome = train(command(folder, name, *changes, root=copy)).ok()
    assert ("have no record" in outcome.output) == (not recorded)
    lineage = read_lineage(copy / name)
    assert lineage is not None
    assert lineage["identity"]["kind"] == name
    assert lineage["starts"][-1]["step"] == (8 if name == "main" else 6)


def test_two_ranks_refuse_with_one_message(folder: Path, copy: Path) -> None:
    for unrecorded in (False, True):
        if unrecorded:
            RunFolder(copy / "branch").lineage.unlink()
        outcome = train(command(folder, "branch", "--lr-path-style", "linear", root=copy), nproc=2)
        assert_refused(outcome, "style: was cosine, is linear")
    train(command(folder, "branch", "--tensor-model-parallel-size", "2", root=copy), nproc=2).ok()


def assert_refused(outcome: Outcome, said: str) -> None:
    """Assert that all ranks exit with 2, and one of them prints the reason."""
    assert outcome.status == [2] * len(outcome.status), outcome.output[-3000:]
    assert outcome.output.count("lrpath: error: ") == 1
    assert said in outcome.output


def test_a_changed_parent_is_refused_and_a_moved_or_removed_one_is_not(folder: Path, copy: Path) -> None:
    (copy / "main").rename(copy / "moved")
    moved = ("--lr-path-parent", str(copy / "moved"))
    train([*command(folder, "branch", *moved, root=copy), "--exit-interval", "7"]).ok()
    weights = next((copy / "moved/iter_0000004").glob("*.distcp"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert "is not the parent that" in refusal(command(folder, "branch", *moved, root=copy))
    shutil.rmtree(copy / "moved/iter_0000004")
    assert "is gone" in refusal(command(folder, "branch", *moved, root=copy))
    train(command(folder, "branch", "--lr-path-parent", str(folder / "main"), root=copy)).ok()


def test_a_run_without_a_checkpoint_starts_again_under_other_settings(folder: Path, copy: Path) -> None:
    shutil.rmtree(copy / "scratch/iter_0000006")
    train(command(folder, "scratch", "--train-iters", "4", "--seed", "8", root=copy)).ok()
    lineage = read_lineage(copy / "scratch")
    assert lineage is not None
    assert lineage["identity"]["arguments"]["seed"] == 8
    assert len(lineage["starts"]) == 1


def test_a_ramp_of_the_weight_decay_needs_a_run_with_an_end(folder: Path, tmp_path: Path) -> None:
    ramp = ("--weight-decay-incr-style", "linear", "--start-weight-decay", "0.0", "--end-weight-decay", "0.1")
    message = refusal(command(folder, "main", *ramp, root=tmp_path))
    assert "--weight-decay-incr-style linear" in message
    train([*command(folder, "scratch", *ramp, root=tmp_path), "--exit-interval", "4"]).ok()
    wider = (*ramp[:-1], "0.2")
    assert "weight decay.end: was 0.1, is 0.2" in refusal(command(folder, "scratch", *wider, root=tmp_path))

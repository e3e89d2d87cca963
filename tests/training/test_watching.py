"""TensorBoard and W&B show a plan's runs over tokens: real and planned rates, branches from their branch points."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_lrpath.devices import peak_flops
from megatron_lrpath.plan import differences, load_plan, run_identity
from megatron_lrpath.training import steps as watching
from megatron_lrpath.training.steps import forget_points
from tests.support.training_fixtures import history, make_plan, run_words, train
from tests.training.test_training_rates import words_without_plan

BATCH_TOKENS = 4 * 16
PEAK = ["--peak-tflops", "0.001"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a main path, watched by TensorBoard only, and a branch, watched also by W&B."""
    folder = tmp_path_factory.mktemp("watched")
    plan = make_plan(folder, (6, 6))
    train(run_words(plan, "ours", "main", "--exit-interval", "5"))
    train(run_words(plan, "ours", "main")).ok()
    wandb = ["--wandb-project", "versions", *PEAK]
    train(run_words(plan, "ours", "branch-v2", *wandb), probe="wandb_offline").ok()
    return folder


def curves(run: Path) -> dict[str, dict[int, float]]:
    """Return every scalar curve of a run's event files: its values by step."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in names}


def points(run: Path) -> dict[str, list[int]]:
    """Return the steps of every point of a run's curves, with repeated ones."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [event.step for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


LOST = {"main": ["iter_0000009"], "branch-v2": ["iter_0000012"]}


def test_steps_that_are_trained_again_are_shown_once(tmp_path: Path) -> None:
    """A main path and a branch lose their last checkpoint; the branch has no other and begins again."""
    plan = make_plan(tmp_path, (6, 6))
    wanted = {}
    for name, lost in LOST.items():
        argv = run_words(plan, "ours", name, "--save-interval", "100")
        own = tmp_path / "runs/ours" / name
        train(argv).ok()
        wanted[name] = points(own)
        for left in lost:
            shutil.rmtree(own / "checkpoints" / left)
        (own / "result.json").unlink()
        train(argv).ok()
    for name, before in wanted.items():
        again = points(tmp_path / "runs/ours" / name)
        exact = [one for one in before if one != watching.PACE]
        assert {one: again[one] for one in exact} == {one: before[one] for one in exact}
        assert len(again[watching.PACE]) == len(set(again[watching.PACE]))


def test_an_event_file_that_cannot_be_read_stays(tmp_path: Path) -> None:
    """Neither a torn last record nor foreign bytes end a start."""
    for content in (b"", b"foreign", bytes(64), b"\x08" + bytes(7) + b"\xff" * 64):
        file = tmp_path / "events.out.tfevents.1"
        file.write_bytes(content)
        forget_points(tmp_path, 0, 4, 16, tmp_path / "own")
        assert file.read_bytes() == content


@pytest.mark.parametrize(("run", "first"), [("main", 0), ("branch-v2", 9)])
def test_actual_and_planned_rates_are_shown_over_tokens(folder: Path, run: str, first: int) -> None:
    plan = load_plan(folder / "plan.yaml")
    path = plan.run("ours", run).path
    seen = curves(folder / "runs/ours" / run)
    last = plan.run("ours", run).last_step
    steps = range(first + 1, last + 1)
    planned = {step * BATCH_TOKENS: pytest.approx(path.lr_at(step - 1)) for step in steps}
    assert seen[watching.PLANNED] == planned
    real = {tokens: value for tokens, value in seen[watching.RATE].items() if tokens > first * BATCH_TOKENS}
    assert real == planned
    losses = {
        row["step"] * BATCH_TOKENS: pytest.approx(row["loss"]) for row in history(folder / f"runs/ours/{run}")
    }
    assert {k: v for k, v in seen[watching.LOSS].items() if k > first * BATCH_TOKENS} == losses


def test_a_branch_begins_at_the_main_paths_point(folder: Path) -> None:
    main, branch = (curves(folder / "runs/ours" / run) for run in ("main", "branch-v2"))
    point = 9 * BATCH_TOKENS
    for name in (watching.LOSS, watching.RATE, watching.NORM):
        assert min(branch[name]) == point
        assert branch[name][point] == main[name][point]


def test_pace_is_shown_and_utilization_only_where_a_peak_is_known(folder: Path) -> None:
    main, branch = (curves(folder / "runs/ours" / run) for run in ("main", "branch-v2"))
    assert all(value > 0 for value in branch[watching.PACE].values())
    assert len(branch[watching.PACE]) == 2  # three steps; the first has no start time
    assert watching.MFU not in main
    assert all(value > 0 for value in branch[watching.MFU].values())
    recorded = [row.get("mfu") for row in history(folder / "runs/ours/branch-v2")]
    assert recorded[0] is None
    assert recorded[1:] == [pytest.approx(value, abs=1e-5) for value in branch[watching.MFU].values()]
    assert not any("mfu" in row for row in history(folder / "runs/ours/main"))


def test_tensorboard_lays_out_actual_and_planned_rates_together(folder: Path) -> None:
    events = EventAccumulator(str(folder / "runs/ours/main/tensorboard"))
    events.Reload()
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert watching.PLANNED.encode() in layout
    assert watching.RATE.encode() in layout


def wandb_records(path: Path) -> list[Any]:
    """Return the records of an offline run's file: protocol buffers in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the rest of a block has no room for a header
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


def test_wandb_has_one_project_with_a_run_of_its_own(folder: Path) -> None:
    (file,) = (folder / "runs").glob("wandb/offline-run-*/run-*.wandb")
    records = wandb_records(file)
    run = next(record.run for record in records if record.HasField("run"))
    assert (run.project, run.display_name) == ("versions", "ours/branch-v2")
    assert (run.run_group, run.job_type) == ("tiny-test", "branch")
    place = str((folder / "runs/ours/branch-v2").resolve())
    assert run.run_id == hashlib.sha256(place.encode()).hexdigest()[:16]
    metrics = {record.metric.glob_name or record.metric.name: record.metric for record in records}
    assert metrics[f"{watching.GROUP}/*"].step_metric == "tokens"
    seen: dict[float, dict[str, float]] = {}
    for record in records:
        row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        if "tokens" in row:
            seen.setdefault(row["tokens"], {}).update(row)
    assert sorted(seen) == [step * BATCH_TOKENS for step in (9, 10, 11, 12)]
    rows = {row["step"]: row for row in history(folder / "runs/ours/branch-v2")}
    for step in (10, 11, 12):
        assert seen[step * BATCH_TOKENS][watching.LOSS] == pytest.approx(rows[step]["loss"])
        assert seen[step * BATCH_TOKENS][watching.PLANNED] == pytest.approx(rows[step]["lr"])


def arguments(**changes: Any) -> argparse.Namespace:
    """Return the arguments that a pace reads."""
    given = {"global_batch_size": 8, "seq_length": 100, "world_size": 4, "peak_tflops": None}
    given |= {"bf16": True, "fp16": False, "distributed_backend": "gloo"}
    return argparse.Namespace(**(given | changes))


def test_utilization_is_the_models_operations_over_the_devices_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "sample_flops", lambda args: 6e15 / 8)
    times = iter([10.0, 12.0, 12.0])
    pace = watching.Pace(arguments(peak_tflops=1000), clock=lambda: next(times))
    assert pace.step_ended(8) == (None, None)
    assert pace.step_ended(8) == (400.0, pytest.approx(6e15 / 2 / 4 / 1000e12))
    assert pace.step_ended(8) == (None, None)
    assert watching.Pace(arguments(), clock=lambda: 0.0).peak is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GeForce GTX 1080", None),
        ("NVIDIA L40S", 362e12),
    ],
)
def test_peaks_are_found_by_the_devices_names(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_a_peak_in_the_plan_changes_no_run(tmp_path: Path) -> None:
    plan = load_plan(make_plan(tmp_path, (4,)))
    said = load_plan(make_plan(tmp_path, (4,), megatron={"peak_tflops": 989, "wandb_project": "x"}))
    run = plan.run("ours", "main")
    assert differences(run_identity(plan, run), run_identity(said, run)) == []


def test_a_run_by_lr_path_resumes_in_its_wandb_run(folder: Path, tmp_path: Path) -> None:
    argv = [*words_without_plan(folder / "plan.yaml", folder), "--lr", "0.01", "--lr-path", "main"]
    argv += ["--train-iters", "4", "--save", str(tmp_path / "own"), "--wandb-save-dir", str(tmp_path)]
    argv += ["--wandb-project", "versions", "--wandb-exp-name", "main"]
    train([*argv, "--exit-interval", "2"], probe="wandb_offline").ok()
    train(argv, probe="wandb_offline").ok()
    own = hashlib.sha256(str((tmp_path / "own").resolve()).encode()).hexdigest()[:16]
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert [path.name for path in files] == [f"run-{own}.wandb"] * 2
    steps = []
    for path in files:
        records = wandb_records(path)
        run = next(record.run for record in records if record.HasField("run"))
        assert run.run_id == own
        rows = [
            {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            for record in records
        ]
        steps.append([round(float(row["tokens"])) // BATCH_TOKENS for row in rows if watching.LOSS in row])
    assert steps == [[1, 2], [3, 4]]

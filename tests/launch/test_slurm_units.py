"""Decisions about jobs, without a cluster: how starts are judged, causes, rendezvous, preflight."""

from __future__ import annotations

import pytest

from megatron_lrpath.errors import UserError
from megatron_lrpath.launch import preflight
from megatron_lrpath.launch.preflight import Facts, find_problems
from megatron_lrpath.launch.slurm.jobs import Spec
from megatron_lrpath.launch.slurm.ledger import (
    COMPLETE,
    FAILED,
    SAVED,
    Attempt,
    SubmittedJob,
    conclude,
    dependents,
    note_attempt,
    read_attempts,
)
from megatron_lrpath.launch.slurm.queue import clock_seconds
from megatron_lrpath.launch.slurm.rank import torch_variables
from megatron_lrpath.launch.slurm.settings import limit_seconds, read_settings
from megatron_lrpath.launch.slurm.show import REASONS
from megatron_lrpath.launch.slurm.steps import Place, Steps, cause
from megatron_lrpath.launch.slurm.stop import StopRequest
from megatron_lrpath.plan import load_plan
from megatron_lrpath.runs import failure
from megatron_lrpath.runs.storage import checkpoint_bytes
from tests.support import ROOT
from tests.support.launch_fixtures import write_plan


def failed(start: int, step: int, checkpoint: int | None = None) -> Attempt:
    return Attempt(start, step, start if checkpoint is None else checkpoint, FAILED, "boom")


def saved(start: int, checkpoint: int) -> Attempt:
    return Attempt(start, checkpoint, checkpoint, SAVED)


@pytest.mark.parametrize(
    ("attempts", "action", "said"),
    [
        ([Attempt(0, 9, 9, COMPLETE)], "complete", ""),
        ([failed(0, 5)], "requeue", ""),
        ([failed(0, 5), failed(4, 5)], "stop", "failed twice at step 6: boom"),
        ([failed(0, 5, 4), saved(4, 5), failed(5, 5)], "stop", "failed twice at step 6"),
        ([failed(0, 5, 4), failed(4, 9, 8), failed(8, 11, 8)], "requeue", ""),
        (
            [failed(0, 5), failed(0, 6), failed(0, 7)],
            "stop",
            "started 3 times from step 0 without a new checkpoint",
        ),
        ([saved(0, 5), saved(5, 9), saved(9, 14)], "requeue", ""),
        ([saved(0, 0), saved(0, 0)], "requeue", ""),
        ([saved(0, 0), saved(0, 0), saved(0, 0)], "stop", "the time limit is too short"),
        ([Attempt(0, 5, 0, FAILED, "bad data", hopeless=True)], "stop", "bad data"),
    ],
)
def test_a_failure_is_tried_again_but_not_for_ever(attempts, action, said):
    conclusion = conclude(attempts[-1], attempts[:-1])
    assert conclusion.action == action
    assert said in conclusion.reason


def test_attempts_survive_a_line_that_was_cut_off(tmp_path):
    file = tmp_path / "a" / "1.jsonl"
    note_attempt(file, failed(0, 5))
    note_attempt(file, saved(0, 8))
    with file.open("a") as stream:
        stream.write('{"start": 8, "st')
    assert read_attempts(file) == [failed(0, 5), saved(0, 8)]


def test_ranks_are_slurms_also_where_nodes_have_different_numbers_of_tasks():
    variables = {
        "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
        "SLURM_STEP_NUM_TASKS": "20",
        "SLURM_PROCID": "17",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "2",
    }
    found = torch_variables(variables)
    assert found == {"RANK": "17", "WORLD_SIZE": "20", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_neighbouring_jobs_and_the_starts_of_one_have_ports_of_their_own():
    ports = [Place(number, start, "n1").port for number in range(10_000, 10_200) for start in range(5)]
    assert len(set(ports)) == len(ports)
    assert 1024 < min(ports) <= max(ports) < 32768


@pytest.mark.parametrize(
    ("printed", "written", "status", "text", "again"),
    [
        (
            "srun: error: n1: task 0: Exited with exit code 2\n",
            ["user", "killed"],
            9,
            "the slice is damaged",
            False,
        ),
        (
            "srun: error: n2: task 1: Killed\n",
            ["lost", "killed"],
            9,
            "rank 1 on n2 was killed by SIGKILL, possibly out of memory",
            None,
        ),
        ("", ["lost", "bad luck"], 9, "rank 1: ValueError: bad luck", False),
        (
            "srun: error: n2: task 1: Killed\nsrun: error: n1: task 0: Exited with exit code 1\n",
            ["lost"],  # rank 1's own parent was also killed
            137,
            "a rank was killed by SIGKILL, possibly out of memory: srun: error: n2: task 1: Killed",
            None,
        ),
        ("", ["lost"], 1, "rank 1: RuntimeError: Connection reset by peer", None),
        ("", ["exit 2"], 2, "rank 0 exited with status 2", False),
        ("[lrpath 12:00:00] a note\n", [], 124, "it did not end within its time", None),
        (
            "slurmstepd: error: no such image\n[lrpath 12:00:00] a note\n\n",
            [],
            9,
            "srun ended with status 9: slurmstepd: error: no such image",
            None,
        ),
        ("", [], 9, "srun ended with status 9: it printed nothing", None),
    ],
)
def test_the_cause_is_what_a_rank_has_written_else_sruns_end(
    tmp_path, monkeypatch, printed, written, status, text, again
):
    spec = Spec("ours/main", "train", "p", "ours", "main", str(tmp_path), "cpu", (), (), (), False)
    steps = Steps(
        spec,
        Place(1, 0, "n1"),
        tmp_path / "x.log",
        tmp_path / "error.json",
        StopRequest(tmp_path / "signals"),
    )
    steps.log.write_text(printed)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    failures = {
        "user": failure.of_error(UserError("the slice is damaged")),
        "lost": failure.of_error(RuntimeError("Connection reset by peer")),
        "bad luck": failure.of_error(ValueError("bad luck")),
        "killed": failure.of_status("rank 1 on n2", -9, 1),
        "exit 2": failure.of_status("rank 0", 2, 0),
    }
    for name in written:
        failure.write(steps.error_file, failures[name])
    found = cause(steps, status)
    assert (found.message, found.calling_again_helps) == (text, again)


def test_the_documents_have_a_row_for_every_reason_that_status_explains():
    text = (ROOT / "docs/cluster.md").read_text()
    assert [reason for reason in REASONS if reason not in text] == []


SECONDS_OF = [("90", 5400), ("1:30", 90), ("1:00:30", 3630), ("2-3", 183600), ("1-0:30", 88200), ("0", None)]


@pytest.mark.parametrize(("text", "seconds"), SECONDS_OF)
def test_time_limits_are_read_as_sbatch_reads_them(text, seconds):
    assert limit_seconds(text) == seconds


@pytest.mark.parametrize(
    ("time", "own", "evaluation", "report"),
    [
        (None, {}, None, None),
        ("2-00:00:00", {}, "4:00:00", "30"),
        ("20", {}, "20", "20"),
        ("0", {}, "4:00:00", "30"),
        ("20", {"eval_time": "1:00:00", "report_time": "5"}, "1:00:00", "5"),
    ],
)
def test_evaluations_and_the_report_have_short_limits_of_their_own(time, own, evaluation, report):
    settings = read_settings(None, {"time": time, **own})
    assert settings.time_of("train") == time
    assert (settings.time_of("eval"), settings.time_of("report")) == (evaluation, report)


def places(**own: str) -> dict[str, tuple[str | None, int, int, str | None, tuple[str, ...]]]:
    """Return by kind of job: partition, GPUs and processes of a node, memory, further options."""
    settings = read_settings(None, {"partition": "gpu", "memory": "0", "sbatch": "--constraint=h100", **own})
    return {
        kind: (
            settings.partition_of(kind),
            settings.gpus_of(kind),
            settings.per_node_of(kind),
            settings.memory_of(kind),
            settings.sbatch_of(kind),
        )
        for kind in ("train", "eval", "report")
    }


def test_evaluations_and_the_report_have_places_of_their_own():
    train = ("gpu", 8, 8, "0", ("--constraint=h100",))
    assert places() == {"train": train, "eval": train, "report": ("gpu", 0, 1, None, ("--constraint=h100",))}
    found = places(eval_partition="small", eval_gpus="1")
    assert (found["train"], found["eval"][:3], found["report"][0]) == (train, ("small", 1, 1), "gpu")
    found = places(
        eval_partition="cpu", eval_gpus="0", tasks_per_node="4", eval_memory="64G", short_sbatch=""
    )
    assert found == {"train": train, "eval": ("cpu", 0, 4, "64G", ()), "report": ("cpu", 0, 4, None, ())}
    assert places(eval_partition="cpu", eval_gpus="0", report_partition="r")["report"][0] == "r"


def test_a_limit_that_leaves_a_training_no_time_is_refused():
    with pytest.raises(UserError, match="of 7 minutes or more"):
        read_settings(None, {"time": "5"})
    read_settings(None, {"time": "5", "signal_seconds": "60"})


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (Attempt(0, 20, 20, SAVED), "saved at step 20 of 50"),
        (Attempt(0, 23, 20, SAVED), "stopped at step 23 of 50; its newest checkpoint is of step 20"),
        (Attempt(20, 23, 20, SAVED), "stopped at step 23 of 50 without a new checkpoint"),
        (Attempt(20, 20, 20, SAVED), "stopped before the first step, nothing to save"),
    ],
)
def test_saved_is_printed_only_after_a_save(attempt, said):
    assert attempt.said(50) == said


def test_what_waits_for_a_job_is_found_through_others():
    entries = [
        SubmittedJob("ours/main", 1, "s"),
        SubmittedJob("ours/branch-v1", 2, "s", (1,)),
        SubmittedJob("ours/branch-v2", 3, "s"),
        SubmittedJob("eval/ours/branch-v1", 4, "s", (2,)),
        SubmittedJob("report", 5, "s", (4, 3)),
    ]
    assert [entry.number for entry in dependents(entries, 1)] == [2, 4, 5]
    assert [entry.number for entry in dependents(entries, 3)] == [5]


@pytest.mark.parametrize(
    ("text", "seconds"), [("00:01:30", 90), ("2-03:00:00", 183600), ("UNLIMITED", None), ("", None)]
)
def test_slurms_clock_is_read(text, seconds):
    assert clock_seconds(text) == seconds


def fact(rank: int, host: str, **changes: object) -> Facts:
    values: dict[str, object] = {
        "gpus": ["H100", "H100"],
        "versions": {"torch": "2.9"},
        "files": {"/d": ["a 1"]},
    }
    return Facts(rank=rank, host=host, local_ranks=2, **{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"gpus": ["H100"]}, None),  # bound to its own GPU by Slurm
        ({"gpus": []}, "n2 shows 0 GPUs to 2 processes"),
        ({"gpus": ["A100", "A100"]}, "n2 has A100, n1 has H100"),
        ({"versions": {"torch": "2.8"}}, "torch is 2.8 on n2 and 2.9 on n1"),
        ({"files": {"/d": None}}, "/d is not the same folder on n2"),
        ({"files": {"/d": ["a 2"]}}, "/d holds other files on n2 than on n1"),
    ],
)
def test_the_preflight_names_the_node_and_what_is_wrong_there(changes, said):
    ranks = [fact(0, "n1"), fact(1, "n1"), fact(2, "n2", **changes), fact(3, "n2", **changes)]
    problems = find_problems(ranks, "cuda")
    assert [said is not None and said in problem for problem in problems] == ([True] if said else [])


def test_too_little_disk_is_reported_with_figures(tmp_path):
    assert preflight.disk_problem(tmp_path, 1) == []
    (said,) = preflight.disk_problem(tmp_path, 2**60)
    assert "the checkpoints to come take about 1,073,741,824 GiB" in said


def test_memory_is_predicted_for_the_gpus_and_hosts_that_are_there(capsys):
    plan = load_plan(ROOT / "examples/paper/3.1b.yaml")

    def problems(gpu: float, host: float, *arguments: str) -> list[str]:
        ranks = [fact(rank, "n1", gpu_bytes=80 * 2**30, host_bytes=2**40) for rank in range(2)]
        ranks += [fact(rank, "n2", gpu_bytes=gpu * 2**30, host_bytes=host * 2**30) for rank in range(2, 4)]
        return preflight.memory_problems(plan, arguments, ranks)

    assert problems(80, 1024) == []
    assert capsys.readouterr().out == ""
    assert problems(40, 1024) == []
    assert "on n2 it has 42.9 GB" in capsys.readouterr().out
    (state,) = problems(20, 1024)
    assert "weights, gradients and optimizer alone take" in state
    (host,) = problems(80, 8)
    assert "n2 has 8.6 GB" in host
    assert problems(20, 1024, "--tensor-model-parallel-size", "4", "--sequence-parallel") == []


def test_checkpoints_are_counted_as_retention_leaves_them(tmp_path):
    plan = load_plan(ROOT / "examples/paper/3.1b.yaml")
    size = 3_094_022_144 * 14
    main = checkpoint_bytes(plan, plan.run("ours", "main"))
    # branch points 4, 14, 24, 34 thousand, ends 10, 20, 30 thousand, and the newest two
    assert main == pytest.approx(9 * size, rel=0.01)
    small = write_plan(tmp_path)
    assert checkpoint_bytes(small, small.run("ours", "branch-v1")) > 0
    del plan.megatron["save_interval"], plan.megatron["save_retain_interval"]  # the same by default
    assert checkpoint_bytes(plan, plan.run("ours", "main")) == main

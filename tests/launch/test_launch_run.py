"""`lrpath run` with a stand-in for training: order, resume, failure, the end of all its processes."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from megatron_lrpath.errors import UserError
from megatron_lrpath.launch.display import PlainDisplay
from megatron_lrpath.launch.local import Options, carry_out, chosen_tasks, evaluation_argv
from megatron_lrpath.launch.process import only_one
from megatron_lrpath.launch.resources import Share
from megatron_lrpath.launch.runner import RunProcess
from megatron_lrpath.launch.torchrun import training
from megatron_lrpath.locks import is_held
from megatron_lrpath.plan import PARADIGMS, Plan
from megatron_lrpath.runs.tasks import build_tasks
from tests.support import ROOT
from tests.support.launch_fixtures import fake_command, write_plan
from tests.support.waiting import until

SCRIPT = ROOT / "tests/support/launch_fixtures.py"


def run(plan: Plan, pace: float = 0.005, **chosen) -> tuple[int, str]:
    """Run the plan here; return the exit status and the console's output."""
    text = io.StringIO()
    options = Options(**{"jobs": 2, "device": "cpu", "evaluate": False, "grace": 3.0, **chosen})
    display = PlainDisplay(Console(file=text, width=200))
    return carry_out(plan, options, fake_command(plan, pace), display), text.getvalue()


def start(plan: Plan, jobs: int = 2, **environment: str) -> subprocess.Popen[str]:
    """Run the plan in another process."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(plan.path), str(jobs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), **environment},
    )


def starts(plan: Plan, key: str) -> list[tuple[float, dict[str, str]]]:
    """Return the time and the environment of each start of the run's process."""
    lines = (Path(plan.output) / key / "started").read_text().splitlines()
    return [(float(line.split(" ", 1)[0]), json.loads(line.split(" ", 1)[1])) for line in lines]


def steps(plan: Plan, key: str) -> list[int]:
    rows = (Path(plan.output) / key / "history.jsonl").read_text().splitlines()
    return [json.loads(row)["step"] for row in rows]


def gone(pids: list[int]) -> bool:
    return all(not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie" for pid in pids)


def hanging(plan: Plan, key: str) -> list[int]:
    """Return the process ids of a hanging run and its worker, once they exist."""
    path = Path(plan.output) / key / "pids"
    until(lambda: path.is_file() and len(path.read_text().split()) == 2)
    return [int(pid) for pid in path.read_text().split()]


def test_a_whole_plan_runs_exactly_once(tmp_path):
    plan = write_plan(tmp_path, 2)
    status, shown = run(plan)
    assert status == 0
    assert "trained 6 runs" in shown
    for task in build_tasks(plan, PARADIGMS):
        assert steps(plan, task.key) == list(range(task.run.first_step + 1, task.run.last_step + 1))
        assert len(starts(plan, task.key)) == 1
    assert (Path(plan.output) / "cpt/continual-v1").resolve() == Path(plan.output) / "ptfs/scratch-v1"


def test_nothing_left_to_do_is_reported_and_starts_nothing(tmp_path, capsys):
    plan = write_plan(tmp_path, 1)
    assert run(plan)[0] == 0
    status, shown = run(plan)
    assert (status, shown) == (0, "")
    assert "nothing to do" in capsys.readouterr().out
    assert len(starts(plan, "ours/main")) == 1


def test_a_branch_starts_while_the_main_path_trains_on(tmp_path, monkeypatch):
    plan = write_plan(tmp_path, 3)
    monkeypatch.setenv("FAKE_UNTIL_main", f"20:{plan.output}/ours/branch-v1/result.json")
    assert run(plan, paradigms=("ours",))[0] == 0
    main_done = (Path(plan.output) / "ours/main/result.json").stat().st_mtime
    assert starts(plan, "ours/branch-v3")[0][0] > main_done  # its branch point is the end of the main path


def test_with_one_job_runs_go_one_after_the_other(tmp_path):
    plan = write_plan(tmp_path, 2)
    assert run(plan, jobs=1, paradigms=("ours",))[0] == 0
    main_done = (Path(plan.output) / "ours/main/result.json").stat().st_mtime
    assert starts(plan, "ours/branch-v1")[0][0] > main_done


def test_the_cores_are_shared_out(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("megatron_lrpath.launch.resources.cores", lambda: 8)
    plan = write_plan(tmp_path, 1)
    assert run(plan, jobs=2, nproc=2, paradigms=("ptfs",))[0] == 0
    environment = starts(plan, "ptfs/scratch-v1")[0][1]
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize(
    ("mode", "cause"),
    [
        ("fail:6", "RuntimeError: the loss is not finite"),
        ("error:6", "the slice v9 is damaged; draw it again"),
        ("die:6", "its process was killed by SIGKILL, possibly out of memory"),
        ("early:6", "its process ended before the run was complete"),
    ],
)
def test_the_first_failure_stops_with_its_cause_and_the_log(tmp_path, monkeypatch, capsys, mode, cause):
    plan = write_plan(tmp_path, 1)
    monkeypatch.setenv("FAKE_scratch_v1", mode)
    assert run(plan, paradigms=("ptfs",))[0] == (2 if mode == "error:6" else 1)
    said = capsys.readouterr().err
    assert f"ptfs/scratch-v1 failed at step 5 of 10: {cause}" in said
    log = next((Path(plan.output) / "ptfs/scratch-v1/logs").glob("*.log"))
    assert str(log) in said
    assert "a page of arguments" in log.read_text()


def test_a_call_after_a_failure_resumes_from_the_last_checkpoint(tmp_path, monkeypatch):
    plan = write_plan(tmp_path, 1)
    monkeypatch.setenv("FAKE_scratch_v1", "fail:6")
    assert run(plan)[0] == 1
    monkeypatch.delenv("FAKE_scratch_v1")
    status, shown = run(plan)
    assert status == 0
    assert "ptfs/scratch-v1: started from step 4" in shown
    assert steps(plan, "ptfs/scratch-v1") == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10]
    assert not is_held(Path(plan.output) / "ptfs/scratch-v1")


def test_a_failure_ends_the_other_runs_and_their_workers(tmp_path, monkeypatch):
    plan = write_plan(tmp_path, 1)
    monkeypatch.setenv("FAKE_main", "hang:3")
    monkeypatch.setenv("FAKE_UNTIL_scratch_v1", f"3:{plan.output}/ours/main/pids")
    monkeypatch.setenv("FAKE_scratch_v1", "fail:4")
    status, shown = run(plan)
    assert status == 1
    assert "ending ours/main" in shown
    assert gone(hanging(plan, "ours/main"))


def test_a_run_that_ignores_sigterm_is_killed_after_the_grace_period(tmp_path, monkeypatch):
    plan = write_plan(tmp_path, 1)
    monkeypatch.setenv("FAKE_main", "deaf:3")
    monkeypatch.setenv("FAKE_UNTIL_scratch_v1", f"3:{plan.output}/ours/main/pids")
    monkeypatch.setenv("FAKE_scratch_v1", "fail:4")
    assert run(plan, grace=0.5)[0] == 1
    assert gone(hanging(plan, "ours/main"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_everything_and_the_next_call_resumes(tmp_path, number):
    plan = write_plan(tmp_path, 1)
    before = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored, as intended
    try:
        process = start(plan, FAKE_main="hang:5", FAKE_scratch_v1="hang:5")
    finally:
        signal.signal(number, before)
    pids = hanging(plan, "ours/main") + hanging(plan, "ptfs/scratch-v1")
    process.send_signal(number)
    shown, _ = process.communicate(timeout=240)
    assert process.returncode == 128 + number, shown
    assert "Traceback" not in shown
    assert gone(pids)
    assert run(plan)[0] == 0
    assert steps(plan, "ours/main") == [1, 2, 3, 4, 5]


def test_a_background_job_is_ended_by_sigint_although_its_shell_ignores_it(tmp_path):
    plan = write_plan(tmp_path, 1)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = start(plan, FAKE_main="hang:5")
    finally:
        signal.signal(signal.SIGINT, before)
    pids = hanging(plan, "ours/main")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=240)
    assert process.returncode == 130
    assert gone(pids)


@pytest.mark.parametrize("mode", ["hang:5", "deaf:5"])
def test_nothing_outlives_a_killed_runner_and_its_locks_are_free(tmp_path, mode):
    plan = write_plan(tmp_path, 1)
    process = start(plan, FAKE_main=mode, FAKE_GRACE="1")
    pids = hanging(plan, "ours/main")
    process.kill()
    process.communicate()
    assert run(plan)[0] == 0  # immediately: waits until the old processes of the run have ended
    assert gone(pids)


def test_nothing_outlives_a_killed_supervisor(tmp_path):
    plan = write_plan(tmp_path, 1)
    process = start(plan, FAKE_main="hang:5", FAKE_scratch_v1="hang:5")
    pids, others = hanging(plan, "ours/main"), hanging(plan, "ptfs/scratch-v1")
    psutil.Process(pids[0]).parent().kill()
    shown, _ = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "ours/main failed at step 4 of 5: its supervising process was killed by signal 9" in shown
    assert gone(pids[:1] + others)
    psutil.Process(pids[1]).kill()  # a worker in its own session: torchrun would have ended it


def test_a_second_call_on_the_same_output_is_refused_with_the_owner(tmp_path):
    plan = write_plan(tmp_path, 1)
    owner = f"process {os.getpid()} on .* is running a plan"
    with only_one(Path(plan.output), "is here"), pytest.raises(UserError, match=owner):
        run(plan)
    assert run(plan)[0] == 0


def test_an_appended_version_extends_the_main_path(tmp_path):
    assert run(write_plan(tmp_path, 2), paradigms=("ours",))[0] == 0
    longer = write_plan(tmp_path, 3)
    status, shown = run(longer, paradigms=("ours",))
    assert status == 0
    assert "2 runs, 30 steps, 2 complete already" in shown
    assert steps(longer, "ours/main") == list(range(1, 26))
    assert len(starts(longer, "ours/branch-v1")) == 1


def test_a_branch_whose_checkpoint_is_gone_is_refused_with_those_that_exist(tmp_path, capsys):
    plan = write_plan(tmp_path, 2)
    assert run(plan, run="main")[0] == 0
    folder = Path(plan.output) / "ours/main/checkpoints/iter_0000005"
    (folder / "metadata.json").unlink()
    (folder / ".metadata").unlink()
    folder.rmdir()
    assert run(plan, paradigms=("ours",))[0] == 1
    said = capsys.readouterr().err
    assert "ours/main at step 5, which is not there" in said
    assert "4, 8, 10, 12, 15" in said


def test_one_run_takes_its_ancestors_along(tmp_path):
    plan = write_plan(tmp_path, 2)
    assert run(plan, run="continual-v2")[0] == 0
    assert not (Path(plan.output) / "ours").exists()
    assert steps(plan, "cpt/continual-v2") == list(range(11, 21))


def test_plain_output_has_no_control_codes_and_shows_progress(tmp_path):
    plan = write_plan(tmp_path, 1)
    shown = run(plan)[1]
    assert "\x1b" not in shown
    assert "\r" not in shown
    assert "small: 0/20 steps; " in shown
    assert "ours/main: complete at step 5 in 0:0" in shown


def test_the_command_is_torchrun_with_the_entry_module(tmp_path):
    plan = write_plan(tmp_path, 1)
    command = training(plan.path, build_tasks(plan, ("ours",))[1], 2, "cpu", ["--log-interval", "5"]).command
    text = " ".join(command[1:])
    assert "-m megatron_lrpath.launch.torchrun --standalone" in text
    assert "--nproc-per-node 2 -m -- megatron_lrpath.training.pretrain --plan" in text
    assert text.endswith("--paradigm ours --run branch-v1 --device cpu --log-interval 5")


def evaluation(plan: Plan, *runs: str, **chosen) -> list[str] | None:
    options = Options(**{"device": "cpu", **chosen})
    share = Share(jobs=1, nproc=2, threads=1, device="cpu")
    return evaluation_argv(plan, chosen_tasks(plan, options), share, options)


def test_what_is_trained_and_not_evaluated_is_evaluated_at_the_end(tmp_path):
    plan = write_plan(tmp_path, 1)
    assert evaluation(plan) is None
    assert run(plan)[0] == 0
    command = evaluation(plan, extra=("--seed", "3"))
    assert command is not None
    argv = ["--paradigm", "all", "--nproc", "2", "--device", "cpu", "--", "--seed", "3"]
    assert command == ["eval", str(plan.path), *argv]
    for key in ("ours/branch-v1", "ptfs/scratch-v1"):
        (Path(plan.output) / key / "eval.json").write_text('{"step": 10, "perplexity": 9.0}')
    assert evaluation(plan) is None
    assert evaluation(plan, run="main") is None


def test_the_evaluations_exit_status_is_the_commands(tmp_path, monkeypatch):
    plan = write_plan(tmp_path, 1)
    failing = ["eval", str(tmp_path / "no such plan")]
    monkeypatch.setattr("megatron_lrpath.launch.local.evaluation_argv", lambda *arguments: failing)
    assert run(plan, evaluate=True, cold=True)[0] == 2


def test_an_output_on_a_full_disk_ends_no_run(tmp_path):
    plan = write_plan(tmp_path, versions=2)
    options = Options(jobs=2, device="cpu", evaluate=False, grace=3.0)
    # Unbuffered, so that every line fails on the full disk, and nothing is left to fail at the close.
    with io.TextIOWrapper(open("/dev/full", "wb", buffering=0), write_through=True) as full:
        display = PlainDisplay(Console(file=full, width=200))
        assert carry_out(plan, options, fake_command(plan, 0.005), display) == 0


def test_a_run_that_a_full_disk_keeps_from_starting_waits_for_room(tmp_path, monkeypatch):
    plan = write_plan(tmp_path, versions=2)
    start_process, refused = RunProcess.start.__func__, []
    show, shown = PlainDisplay.event, tmp_path / "shown"
    monkeypatch.setenv("FAKE_UNTIL_main", f"3:{shown}")  # the other run trains until this one waits

    def event(display, text):
        show(display, text)
        if "waits for room" in text:
            shown.touch()

    monkeypatch.setattr(PlainDisplay, "event", event)

    def refuse_the_second_once(cls, task, *args, **options):
        if (plan.path.parent / "out/ours/main/started").exists() and not refused:
            refused.append(task.key)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(task.folder / "logs"))
        return start_process(cls, task, *args, **options)

    monkeypatch.setattr(RunProcess, "start", classmethod(refuse_the_second_once))
    status, text = run(plan)
    assert status == 0, text
    assert f"{refused[0]}: waits for room on the disk" in text
    assert f"{refused[0]}: complete" in text

"""Jobs through the real sbatch with a stand-in for training: order, requeueing, failures, new versions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lrpath.launch.slurm.ledger import Ledger
from megatron_lrpath.plan import load_plan
from tests.support.slurm_cluster.site import FAKE, ROOT, Site, fake_site

pytestmark = pytest.mark.slow
ODD = "a b$(touch pwned); 'c' \"d\" %j \\e `f` & #"


@pytest.fixture
def site(tmp_path: Path):
    made = fake_site(tmp_path)
    yield made
    made.cluster.empty()


def test_a_plan_is_carried_out_once_and_grows(tmp_path):
    site = fake_site(tmp_path, ODD, processes=2)
    site.write_plan(10, 60, 10)
    jobs = site.submit(FAKE_main="hold:20")
    assert [job["action"] for job in jobs.values()] == ["submit"] * 8
    # the first branch is trained while the main path runs, each on its own nodes
    site.finish(jobs["ours/branch-v1"]["job"])
    site.go_on("ours/main")
    site.finish(jobs["report"]["job"], 90)
    folder = site.folder / "runs"
    assert (folder / "report/index.html").is_file()
    assert all((folder / f"ours/branch-v{number}/eval.json").is_file() for number in (1, 2, 3))
    check_ranks(site)
    assert not list(tmp_path.rglob("pwned")), "a name was run as code"

    assert {job["action"] for job in site.submit().values()} == {"done"}
    site.write_plan(10, 60, 10, 10)
    again = site.submit()
    new = {key for key, job in again.items() if job["action"] == "submit"}
    assert new == {"ours/main", "ours/branch-v4", "eval/ours/branch-v4", "report"}
    site.finish(again["report"]["job"])
    assert site.steps("ours/main") == list(range(1, 86))
    assert [start["step"] for start in site.starts("ours/main") if start["rank"] == 0] == [0, 75]


def check_ranks(site: Site) -> None:
    """Check that every rank of the first start has its place, one address and port, and a log."""
    starts = sorted(site.starts("ours/main"), key=lambda start: start["rank"])
    assert [start["rank"] for start in starts] == [0, 1, 2, 3]
    assert {start["world"] for start in starts} == {"4"}
    assert [start["LOCAL_RANK"] for start in starts] == ["0", "1", "0", "1"]
    assert [start["host"] for start in starts] == ["n1", "n1", "n2", "n2"]
    other = site.starts("ours/branch-v1")[0]
    assert len({(start["MASTER_ADDR"], start["MASTER_PORT"]) for start in starts}) == 1
    assert other["MASTER_PORT"] != starts[0]["MASTER_PORT"]
    logs = sorted(path.name for path in (site.run_folder("ours/main") / "logs").glob("*/rank-*.log"))
    assert logs == ["rank-0.log", "rank-1.log", "rank-2.log", "rank-3.log"]
    assert (site.folder / "runs/slurm/logs").is_dir()
    assert list((site.folder / "runs/slurm/logs").glob("ours.main-*.log")), "the job's own log is missing"


def test_a_killed_rank_is_started_again_and_resumes(site):
    site.write_plan(20, interval=4)
    jobs = site.submit(FAKE_main="kill:7")
    site.finish(jobs["ours/branch-v1"]["job"])
    assert site.cluster.job(jobs["ours/main"]["job"])["Restarts"] == "1"
    assert [start["step"] for start in site.starts("ours/main") if start["rank"] == 0] == [0, 4]
    assert site.status()["ours/main"]["state"] == "done"


def test_before_the_time_limit_it_saves_requeues_itself_and_resumes(site):
    site.write_plan(80)
    main = site.submit(FAKE_main="hold:24,30")["ours/main"]["job"]
    site.cluster.until(lambda: len(site.steps("ours/main")) >= 23)
    site.cluster.call("scancel", "--batch", "--signal=USR2", str(main))  # as Slurm does before the limit
    site.cluster.until(lambda: len(site.starts("ours/main")) == 4, 60)
    first, again = (start["step"] for start in site.starts("ours/main") if start["rank"] == 0)
    assert first == 0
    saved = site.run_folder("ours/main") / "checkpoints/latest_checkpointed_iteration.txt"
    assert again == int(saved.read_text())
    assert again in (23, 24)  # it waits in step 24; the signal may arrive at the end of step 23
    status = site.status()["ours/main"]
    assert (status["state"], status["job"]["number"], status["job"]["starts"]) == ("running", main, 2)
    site.go_on("ours/main")
    site.finish(main)
    assert site.steps("ours/main") == list(range(1, 41))


def test_a_node_that_dies_does_not_end_the_run(site):
    site.write_plan(80, interval=10)
    main = site.submit(FAKE_main="hold:24")["ours/main"]["job"]
    site.cluster.until(lambda: len(site.steps("ours/main")) > 20)
    site.cluster.call("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    site.cluster.until(lambda: len(site.starts("ours/main")) >= 4, 60)
    site.go_on("ours/main")
    site.finish(main)
    assert site.cluster.job(main)["Restarts"] == "1"
    assert site.steps("ours/main") == list(range(1, 41))


def test_the_same_step_failing_twice_stops_the_chain_with_the_reason(site):
    site.write_plan(10, 20, 10)
    jobs = site.submit(FAKE_main="fail:12")
    main = jobs["ours/main"]["job"]
    site.cluster.wait(main, "FAILED", seconds=60)
    assert site.cluster.job(main)["Restarts"] == "1"
    reason = "failed twice at step 12: rank 0: RuntimeError: the loss is not finite"
    assert reason in site.cluster.call("squeue", "-h", "-t", "all", "-j", str(main), "-o", "%k")
    # branch 1 has its checkpoint and runs; jobs that cannot run are held, with a comment
    site.finish(jobs["eval/ours/branch-v1"]["job"])
    for key in ("ours/branch-v2", "ours/branch-v3", "eval/ours/branch-v2", "eval/ours/branch-v3"):
        held = site.cluster.job(jobs[key]["job"])
        assert (held["JobState"], held["Reason"]) in (("PENDING", "JobHeldUser"), ("PENDING", "Dependency"))
        assert held["Priority"] == "0", key
        assert reason in site.cluster.call("squeue", "-h", "-j", str(jobs[key]["job"]), "-o", "%k")
    status = site.status()
    assert "failed twice at step 12" in status["ours/main"]["cause"]
    site.finish(jobs["report"]["job"])  # it does not wait for held jobs, and lists what is missing
    assert "branch-v2" in (site.folder / "runs/report/report.md").read_text()
    assert reason in status["ours/branch-v2"]["job"]["comment"]

    again = site.submit()  # without the cause
    assert again["ours/branch-v1"]["action"] == again["eval/ours/branch-v1"]["action"] == "done"
    assert again["ours/main"]["action"] == "submit"
    assert again["ours/branch-v2"]["action"] == "replace"
    assert again["report"]["action"] == "submit"
    site.finish(again["ours/branch-v3"]["job"])
    assert site.steps("ours/main") == list(range(1, 36))


def test_a_branch_with_bad_data_harms_nothing_but_itself(site):
    site.write_plan(10, 10)
    jobs = site.submit(FAKE_branch_v1="error:7")
    site.finish(jobs["eval/ours/branch-v2"]["job"])
    failed = site.cluster.job(jobs["ours/branch-v1"]["job"])
    assert (failed["JobState"], failed["Restarts"]) == ("FAILED", "0"), "bad data do not get better"
    assert site.cluster.job(jobs["eval/ours/branch-v1"]["job"])["Priority"] == "0"
    cause = "the slice v9 is damaged; draw it again; fix the cause, then `lrpath submit` again"
    assert site.status()["ours/branch-v1"]["cause"] == cause
    site.finish(jobs["report"]["job"])  # it does not wait for held jobs; a new one is submitted then
    again = site.submit()
    new = {key for key, job in again.items() if job["action"] not in ("done", "queued")}
    assert new == {"ours/branch-v1", "eval/ours/branch-v1", "report"}
    site.finish(again["eval/ours/branch-v1"]["job"])


def test_a_main_path_cancelled_outside_lrpath_leaves_no_branch_stuck(site):
    site.write_plan(10, 80, 10)
    jobs = site.submit(FAKE_main="hold:24")
    site.cluster.until(lambda: len(site.steps("ours/main")) > 20)
    site.cluster.call("scancel", str(jobs["ours/main"]["job"]))
    site.finish(jobs["eval/ours/branch-v1"]["job"])
    branch = jobs["ours/branch-v2"]["job"]
    site.cluster.until(lambda: site.cluster.job(branch)["Priority"] == "0")
    assert "ended without its checkpoint of step 50" in site.status()["ours/branch-v2"]["cause"]
    again = site.submit()
    assert again["ours/main"]["action"] == "submit"
    assert again["ours/branch-v2"]["action"] == again["ours/branch-v3"]["action"] == "replace"
    site.finish(again["ours/branch-v3"]["job"])


def test_a_version_appended_while_the_main_path_runs_continues_it(site):
    site.write_plan(10, 40)
    first = site.submit(FAKE_main="hold:20")
    site.cluster.until(lambda: site.steps("ours/main"))
    site.write_plan(10, 40, 10)
    second = site.submit()
    row = site.status()["ours/main"]
    assert (row["job"]["number"], row["job"]["state"]) == (first["ours/main"]["job"], "running")
    assert (row["next_job"]["number"], row["next_job"]["state"]) == (second["ours/main"]["job"], "pending")
    site.go_on("ours/main")
    assert second["ours/main"]["action"] == "extend"
    assert {second[key]["action"] for key in ("ours/branch-v1", "ours/branch-v2")} <= {"queued", "done"}
    site.finish(second["ours/branch-v3"]["job"])
    assert site.cluster.job(first["ours/main"]["job"])["JobState"] == "COMPLETED"
    assert [start["step"] for start in site.starts("ours/main") if start["rank"] == 0] == [0, 30]
    assert site.steps("ours/main") == list(range(1, 56))
    # a branch that was waiting reads the plan that was submitted last, as its parent does
    argv = site.starts("ours/branch-v3")[0]["argv"]
    assert len(load_plan(argv[argv.index("--plan") + 1]).versions) == 3
    assert len({tuple(start["argv"]) for start in site.starts("ours/branch-v2")}) == 1, (
        "ranks with different plans"
    )
    assert site.starts("ours/branch-v2")[0]["argv"][1] == argv[1]


def test_continual_pretraining_is_a_chain(site):
    site.write_plan(8, 8, 8)
    override = ("--set", "schedule.max_lr=2e-3")
    jobs = site.submit("--paradigm", "cpt", *override)
    assert list(jobs)[:3] == ["ptfs/scratch-v1", "cpt/continual-v2", "cpt/continual-v3"]
    site.finish(jobs["cpt/continual-v3"]["job"])
    times = [site.starts(key)[0]["time"] for key in list(jobs)[:3]]
    assert times == sorted(times)
    assert (site.run_folder("cpt/continual-v1")).is_symlink()
    argv = site.starts("cpt/continual-v3")[0]["argv"]
    assert load_plan(Path(argv[argv.index("--plan") + 1])).schedule.max_lr == 2e-3
    assert load_plan(site.folder / "runs/plan.yaml").schedule.max_lr == 2e-3
    done = [one["action"] for one in site.submit("--paradigm", "cpt", *override).values()]
    assert done[:3] == ["done"] * 3


def test_cancel_lets_a_running_training_save_and_ends_the_rest(site):
    site.write_plan(10, 80)
    jobs = site.submit(FAKE_main="hold:24")
    site.cluster.until(lambda: len(site.steps("ours/main")) > 20)
    answer = site.lrpath("cancel", "plan.yaml")
    assert f"ours/main (job {jobs['ours/main']['job']}): saves and ends" in answer.stdout
    site.cluster.until(lambda: not site.cluster.call("squeue", "-h"))
    assert site.cluster.job(jobs["ours/main"]["job"])["Restarts"] == "0"
    step = site.steps("ours/main")[-1]
    assert (site.run_folder("ours/main") / f"checkpoints/iter_{step:07d}/metadata.json").is_file()
    assert "no job" in site.lrpath("cancel", "plan.yaml").stdout


@pytest.mark.parametrize("how", ["cancel", "scancel"])
def test_submitted_again_while_a_cancelled_training_still_saves_it_trains_on(site, how):
    site.write_plan(10, 80)
    jobs = site.submit(FAKE_main="hold:24")
    main = jobs["ours/main"]["job"]
    site.cluster.until(lambda: len(site.steps("ours/main")) > 20)
    saving = site.run_folder("ours/main") / "saving"
    saving.touch()
    if how == "cancel":
        assert "saves and ends" in site.lrpath("cancel", "plan.yaml").stdout
    else:
        site.cluster.call("scancel", str(main))
        site.cluster.wait(main, "COMPLETING")
    again = site.submit()
    assert again["ours/main"]["action"] == "submit"
    assert again["ours/branch-v2"]["action"] == ("submit" if how == "cancel" else "replace")
    assert site.cluster.job(again["ours/main"]["job"])["JobState"] == "PENDING"
    assert {job["action"] for job in site.submit().values()} <= {"queued", "done"}, "no doubles"
    saving.unlink()
    site.finish(again["ours/main"]["job"])
    first, second = (one["step"] for one in site.starts("ours/main") if one["rank"] == 0)
    assert first == 0
    assert second > 20
    assert site.steps("ours/main") == list(range(1, 51))


def test_a_submission_that_was_killed_is_taken_up_without_doubles(site):
    site.write_plan(40)
    jobs = site.submit(FAKE_main="hold:10")
    ledger = site.folder / "runs/slurm/jobs.json"
    ledger.unlink()  # as if the command had been killed right after sbatch
    again = site.submit(FAKE_main="hold:10")
    assert again["ours/main"]["job"] != jobs["ours/main"]["job"]
    site.cluster.wait(jobs["ours/main"]["job"], "CANCELLED")


def test_a_script_submitted_by_hand_resumes_and_is_tracked(site):
    site.write_plan(10, 40)
    main = site.submit(FAKE_main="hold:20")["ours/main"]["job"]
    site.cluster.until(lambda: len(site.steps("ours/main")) > 18)
    site.cluster.call("scancel", str(main))
    site.cluster.until(lambda: str(main) not in site.cluster.call("squeue", "-h", "-o", "%A").split())
    assert "the job was ended" in site.status()["ours/main"]["cause"]
    script = next((site.folder / "runs/slurm/scripts").glob("ours.main-*.sh"))
    argv = ["sbatch", "--parsable", str(script)]
    environment = site.cluster.environment | site.variables
    by_hand = int(subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout)
    again = site.submit()["ours/main"]
    assert (again["action"], again["job"]) == ("queued", by_hand) or again["action"] == "done"
    site.finish(by_hand)
    assert site.steps("ours/main") == list(range(1, 31))


def test_status_shows_evaluations_the_report_and_an_early_death(site):
    site.write_plan(10)
    jobs = site.submit("--setup", "missing.sh")  # the script ends in its first lines
    site.cluster.wait(jobs["ours/main"]["job"], "FAILED")
    row = site.status()["ours/main"]
    assert (row["state"], row["job"]["state"]) == ("not started", "ended")
    assert "missing.sh" in row["cause"]
    jobs = site.submit(FAKE_branch_v1="hold:9")
    site.cluster.until(lambda: site.steps("ours/branch-v1"))
    site.cluster.call("scancel", str(jobs["eval/ours/branch-v1"]["job"]))
    site.go_on("ours/branch-v1")
    site.finish(jobs["report"]["job"])
    others = {one["key"]: one for one in site.all_status()["jobs"]}
    assert {one["state"] for one in others.values()} == {"missing"}
    assert "`lrpath submit` again" in others["eval/ours/branch-v1"]["cause"]
    again = site.submit()
    assert {key for key, job in again.items() if job["action"] == "submit"} == set(others)
    site.finish(again["report"]["job"])
    assert {one["state"] for one in site.all_status()["jobs"]} == {"done"}


def test_sbatch_of_a_recipe_trains_the_whole_plan_with_the_settings_file_alone(site):
    site.write_plan(6, 6)
    root = site.folder
    shutil.copytree(ROOT / "slurm", root / "slurm")
    (root / "examples/paper").mkdir(parents=True)
    site.plan.rename(root / "examples/paper/203m.yaml")
    settings = f"""\
LRPATH_NODES=2
LRPATH_GPUS_PER_NODE=0
LRPATH_CPUS_PER_TASK=1
LRPATH_PYTHON='{FAKE}'
LRPATH_PREFLIGHT=no
LRPATH_OUTPUT='{root}/results of mine'
LRPATH_EVAL_PARTITION=short
LRPATH_EVAL_GPUS=0
LRPATH_SHORT_SBATCH="--nice=7"
"""
    (root / "slurm/settings.env").write_text(settings)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = site.cluster.environment | site.variables | {"PATH": path, "PYTHONPATH": str(ROOT)}
    command = ["sbatch", "--wait", "--output=recipe.log", "--partition=test", "slurm/ours_203m.sh"]
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, timeout=240)
    said = (root / "recipe.log").read_text()
    assert "ours/branch-v2" in said, said
    evaluation = root / "results of mine/ours/branch-v2/eval.json"
    site.cluster.until(evaluation.is_file, 90)
    assert (root / "results of mine/ours/branch-v1/result.json").is_file()
    assert "results of mine/slurm/plan.yaml" in said
    submitted = Ledger.of(f"{root}/results of mine").newest()
    jobs = [site.cluster.job(submitted[f"{kind}ours/branch-v2"].number) for kind in ("", "eval/")]
    jobs.append(site.cluster.job(submitted["report"].number))
    assert [(job["Partition"], job["Nice"]) for job in jobs] == [
        ("test", "0"),
        ("short", "7"),
        ("short", "7"),
    ]


def test_a_count_of_gpus_that_does_not_fit_is_refused_before_anything_starts(site):
    site.write_plan(10)
    answer = site.lrpath("submit", "plan.yaml", *site.options, "--nodes", "3")
    assert answer.returncode == 2
    assert "the batch of 8 samples does not divide by 3 model copies" in answer.stderr
    assert not (site.folder / "runs").exists()


def test_a_command_is_called_when_a_job_fails_for_good_and_when_the_report_is_written(site):
    site.write_plan(10, 10)
    told = site.folder / "told to me"
    script = site.folder / "notify me.sh"
    script.write_text(f'#!/bin/bash\nprintf "%s|" "$@" >>"{told}"; echo >>"{told}"; exit 7\n')
    script.chmod(0o755)
    jobs = site.submit("--notify", f"'{script}' --urgent", FAKE_branch_v1="error:7")
    site.finish(jobs["report"]["job"])
    failed, done = sorted(told.read_text().splitlines(), reverse=True)
    assert failed.startswith("--urgent|failed|ours/branch-v1|the slice v9 is damaged; draw it again")
    assert done.startswith("--urgent|done|report|the report of ")

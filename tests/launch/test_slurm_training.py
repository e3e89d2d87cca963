"""Real trainings through the real sbatch, on two nodes: disturbed ones end bit-equal to undisturbed ones."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import yaml

from tests.support import ROOT
from tests.support.slurm_cluster.site import Site, cluster_or_skip
from tests.support.states import states
from tests.support.training_fixtures import make_plan, run_words, train

pytestmark = pytest.mark.slow
SLOW = ROOT / "tests/support/slurm_cluster/slow_python"
VERSIONS = (10, 240, 10)
SETTINGS = {"save_interval": 30}


def real_site(folder: Path, versions: tuple[int, ...], pace: str, *options: str) -> Site:
    """Return a site with a tiny plan in `folder`, trained for real on the cluster's two nodes."""
    cluster = cluster_or_skip()
    folder.mkdir()
    make_plan(folder, versions, output=str(folder / "runs"), megatron=SETTINGS)
    common = ("--gpus-per-node", "0", "--cpus-per-task", "1", "--python", str(SLOW))
    variables = {"FAKE_PYTHON": sys.executable, "SLOW_SECONDS": pace, "GLOO_SOCKET_IFNAME": "lo"}
    return Site(cluster, folder, variables, (*common, *options))


@pytest.fixture(scope="module")
def limited(tmp_path_factory):
    """Return the site and jobs of a run that its time limit of three minutes interrupts and requeues."""
    options = ("--paradigm", "ptfs", "--nodes", "1", "--preflight", "no")
    options += ("--time", "3", "--signal-seconds", "1")
    site = real_site(tmp_path_factory.mktemp("limited") / "work", (190,), "1", *options)
    return site, site.submit()


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory, limited):
    """Return the site of a disturbed plan of three versions and a fourth, and the observations on the way."""
    options = ("--paradigm", "ours", "--nodes", "2")
    site = real_site(tmp_path_factory.mktemp("disturbed") / "a b'c", VERSIONS, "0.2", *options)
    seen: dict[str, object] = {"first": site.submit("--preflight", "no")}
    site.cluster.until(lambda: len(site.steps("ours/main")) > 40, 120)
    kill_rank(seen["first"]["ours/main"]["job"], 1)
    main = site.run_folder("ours/main")
    site.cluster.until(lambda: len(json.loads((main / "lineage.json").read_text())["starts"]) == 2, 120)
    site.cluster.until(lambda: site.steps("ours/main")[-1] > 60, 120)
    slice_file = site.folder / "data/slices/v2.slice"  # the main path has opened it by now
    good = slice_file.read_bytes()
    slice_file.write_bytes(good[: len(good) // 2])
    site.cluster.wait(seen["first"]["ours/branch-v2"]["job"], "FAILED", seconds=180)
    seen["status"] = site.status()
    slice_file.write_bytes(good)
    site.finish(seen["first"]["ours/main"]["job"], 240)
    seen["second"] = site.submit("--preflight", "no")
    make_plan(site.folder, (*VERSIONS, 10), output=str(site.folder / "runs"), megatron=SETTINGS)
    seen["third"] = site.submit()
    site.finish(seen["third"]["report"]["job"], 300)
    return site, seen


def kill_rank(job: int, rank: int) -> None:
    """Kill a rank of a job with SIGKILL."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_rank = b"slow_training" in (folder / "cmdline").read_bytes()
            if is_rank and wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                return os.kill(int(folder.name), signal.SIGKILL)
        except OSError:
            continue
    raise AssertionError(f"no rank {rank} of job {job}")


def reference(site: Site, folder: Path, paradigm: str, runs: list[str], nproc: int) -> list[Path]:
    """Train the same runs without a cluster, undisturbed; return their last checkpoints, then the site's."""
    plan = yaml.safe_load(site.plan.read_text()) | {"output": str(folder / "runs")}
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    for run in runs:
        train(run_words(path, paradigm, run), nproc).ok()
    roots = [folder / "runs" / paradigm / run / "checkpoints" for run in runs]
    last = [max(root.glob("iter_???????")) for root in roots]
    return last + [
        site.run_folder(f"{paradigm}/{run}") / "checkpoints" / one.name
        for run, one in zip(runs, last, strict=True)
    ]


def test_killed_requeued_and_extended_runs_end_bit_equal_to_undisturbed_ones(disturbed, tmp_path):
    site, seen = disturbed
    runs = ["main", *(f"branch-v{number}" for number in (1, 2, 3, 4))]
    folders = reference(site, tmp_path, "ours", runs, nproc=2)
    found = states(*folders)
    for run, expected, ours in zip(runs, found[:5], found[5:], strict=True):
        assert ours == expected, run
    assert site.cluster.job(seen["first"]["ours/main"]["job"])["Restarts"] == "1"
    assert site.steps("ours/main") == list(range(1, 266))


def test_the_first_branch_ran_while_the_main_path_ran(disturbed):
    site, _ = disturbed
    branch, main = (site.run_folder(f"ours/{run}") for run in ("branch-v1", "main"))
    # the main path's checkpoint after its disturbed part is younger than the branch's result
    later = main / "checkpoints" / "iter_0000240"
    assert (branch / "result.json").stat().st_mtime < later.stat().st_mtime


def test_a_branch_with_bad_data_stops_alone_and_is_repaired_by_submitting_again(disturbed):
    _, seen = disturbed
    row = seen["status"]["ours/branch-v2"]
    assert "v2.slice" in row["cause"]
    assert seen["status"]["ours/main"]["state"] in ("running", "done")
    second = {key for key, job in seen["second"].items() if job["action"] in ("submit", "replace")}
    assert second == {"ours/branch-v2", "eval/ours/branch-v2", "report"}
    third = {key for key, job in seen["third"].items() if job["action"] in ("submit", "extend", "replace")}
    assert third == {"ours/main", "ours/branch-v4", "eval/ours/branch-v4", "report"}


def test_every_version_is_evaluated_and_reported(disturbed):
    site, _ = disturbed
    for number in (1, 2, 3, 4):
        row = json.loads((site.run_folder(f"ours/branch-v{number}") / "eval.json").read_text())
        assert row["perplexity"] > 1
    assert (site.folder / "runs/report/index.html").is_file()


def test_the_lineage_records_nodes_versions_and_the_preflights_results(disturbed):
    site, seen = disturbed
    starts = json.loads((site.run_folder("ours/main") / "lineage.json").read_text())["starts"]
    assert [start["world_size"] for start in starts] == [2, 2, 2]
    assert starts[0]["launch"]["slurm"]["SLURM_JOB_NODELIST"] == "n[1-2]"
    assert starts[2]["launch"]["slurm"]["SLURM_JOB_ID"] == str(seen["third"]["ours/main"]["job"])
    assert list(starts[2]["launch"]["hosts"]) == ["n1", "n2"]
    assert starts[2]["launch"]["all_reduce_bytes_per_second"] > 0
    assert starts[2]["launch"]["problems"] == []


def test_a_run_that_hits_its_time_limit_saves_requeues_itself_and_ends_bit_equal(
    limited, disturbed, tmp_path
):
    site, jobs = limited
    number = jobs["ptfs/scratch-v1"]["job"]
    site.finish(number, 400)
    assert int(site.cluster.job(number)["Restarts"]) >= 1
    attempts = (site.folder / f"runs/slurm/attempts/{number}.jsonl").read_text().splitlines()
    assert [json.loads(line)["ending"] for line in attempts][-1] == "complete"
    assert {json.loads(line)["ending"] for line in attempts[:-1]} == {"saved"}
    expected, ours = states(*reference(site, tmp_path, "ptfs", ["scratch-v1"], nproc=1))
    assert ours == expected

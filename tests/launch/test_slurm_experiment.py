"""An experiment through the real sbatch: several plans as one graph, shared runs trained once."""

from __future__ import annotations

import json

import pytest

from tests.support.slurm_cluster.site import Site, fake_site

pytestmark = pytest.mark.slow
EXPERIMENT = """\
name: alphas
plan: plan.yaml
vary: {alpha: [0.5, 0.2]}
paradigms: [ours]
output: runs
"""


@pytest.fixture
def site(tmp_path):
    made = fake_site(tmp_path)
    made.write_plan(10, 10)
    (made.folder / "experiment.yaml").write_text(EXPERIMENT)
    yield made
    made.cluster.empty()


def submit(site: Site, *argv: str, **variables: str) -> dict[str, dict]:
    """Run `lrpath submit` on the experiment; return its jobs by key."""
    answer = site.lrpath("submit", "experiment.yaml", "--json", *site.options, *argv, **variables)
    assert answer.returncode == 0, answer.stderr
    return {job["key"]: job for job in json.loads(answer.stdout)["jobs"]}


def status(site: Site) -> dict[str, dict]:
    """Return the rows of `lrpath status` of the experiment, by key."""
    answer = site.lrpath("status", "experiment.yaml", "--json")
    assert answer.returncode == 0, answer.stderr
    return {row["key"]: row for row in json.loads(answer.stdout)["runs"]}


def test_every_alpha_leaves_one_main_path_that_is_trained_once(site):
    jobs = submit(site)
    mains = [key for key in jobs if key.endswith("/main")]
    branches = sorted(key for key, job in jobs.items() if job["kind"] == "train" and key not in mains)
    assert mains == ["alpha0.5/ours/main"]
    assert len(branches) == 4
    assert {jobs[key]["waits_for"][0]["key"] for key in branches} == set(mains)
    site.finish(jobs["report"]["job"], 120)
    assert site.steps(mains[0]) == list(range(1, 19))
    assert site.steps("alpha0.2/ours/branch-v1") == [9, 10]
    assert (site.folder / "runs/alpha0.2/ours/main").is_symlink()
    assert "20.1" in (site.folder / "runs/report/table.md").read_text()
    assert {row["state"] for row in status(site).values()} == {"done"}
    assert {job["action"] for job in submit(site).values()} == {"done"}


def test_its_jobs_are_cancelled_together(site):
    jobs = submit(site, FAKE_PACE="5")
    answer = site.lrpath("cancel", "experiment.yaml", "--now")
    assert answer.returncode == 0, answer.stderr
    assert all(key in answer.stdout for key in jobs)
    site.cluster.until(lambda: not site.cluster.queue().splitlines()[1:])


def test_folders_that_the_report_would_not_find_are_refused(site):
    answer = site.lrpath("submit", "experiment.yaml", "--dry-run", *site.options, "--output", "elsewhere")
    assert answer.returncode == 2
    assert "--output (or the settings file's) does not reach an experiment" in answer.stderr

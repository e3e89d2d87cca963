"""Settings of a cluster, layouts and recipes: the source of each value, and refusals before any start."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lrpath.errors import UserError
from megatron_lrpath.launch.layouts import LAYOUTS, allocate, allocate_evaluation
from megatron_lrpath.launch.slurm.jobs import job_files, plan_jobs
from megatron_lrpath.launch.slurm.ledger import SubmittedPlan
from megatron_lrpath.launch.slurm.settings import SETTINGS, Settings, read_settings, within_job
from megatron_lrpath.plan import Plan, load_plan, run_identity
from tests.support import ROOT

SIZES = ("203m", "406m", "608m", "1.2b", "2.1b", "3.1b")


def paper(size: str) -> Plan:
    return load_plan(ROOT / f"examples/paper/{size}.yaml")


def settings_file(folder: Path, text: str) -> Path:
    path = folder / "settings.env"
    path.write_text(text)
    return path


def test_the_example_file_shows_every_setting_and_no_other():
    text = (ROOT / "slurm/settings.env.example").read_text()
    assert sorted(re.findall(r"^#(LRPATH_\w+)=", text, re.MULTILINE)) == sorted(s.variable for s in SETTINGS)
    assert {setting.name for setting in SETTINGS} == {field.name for field in dataclasses.fields(Settings)}


def test_every_line_of_the_example_file_is_valid(tmp_path):
    text = (ROOT / "slurm/settings.env.example").read_text()
    path = settings_file(tmp_path, re.sub(r"^#(?=LRPATH_)", "", text, flags=re.MULTILINE))
    settings = read_settings(path, {})
    assert settings.sbatch == ("--exclusive", "--exclude=node17")
    assert settings.preflight is True


def test_an_option_overrides_the_file_and_the_file_overrides_the_job(tmp_path):
    path = settings_file(tmp_path, "LRPATH_NODES=4\nLRPATH_PARTITION=gpu\n")
    settings = read_settings(path, {"nodes": "2", "account": None})
    assert (settings.nodes, settings.partition) == (2, "gpu")
    job = {"SLURM_JOB_PARTITION": "cpu", "SLURM_JOB_ACCOUNT": "us"}
    assert (within_job(settings, job).partition, within_job(settings, job).account) == ("gpu", "us")


def test_nothing_in_the_file_is_expanded_or_run(tmp_path):
    path = settings_file(tmp_path, "LRPATH_DATA='/a b/$(touch pwned) $HOME'\n")
    assert read_settings(path, {}).data == "/a b/$(touch pwned) $HOME"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("LRPATH_NODE=4", "there is no setting LRPATH_NODE"),
        ("LRPATH_NODES=four", "'four' is not a whole number"),
        ("LRPATH_NODES=0", "must be at least 1"),
        ("LRPATH_TIME=tomorrow", "is not a time"),
        ("LRPATH_DATA=/a b", "quote a value that contains spaces"),
        ("LRPATH_DATA='/a", "No closing quotation"),
        ("LRPATH_PREFLIGHT=maybe", "neither yes nor no"),
        ("LRPATH_CONTAINER_RUNTIME=docker", "is none of pyxis, apptainer"),
        ("module load cuda", "not NAME=VALUE"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, said):
    path = settings_file(tmp_path, f"# comment\n{line}\n")
    with pytest.raises(UserError) as error:
        read_settings(path, {})
    assert str(error.value).startswith(f"{path}:2: ")
    assert said in str(error.value)


@pytest.mark.parametrize("size", SIZES)
def test_each_recipe_has_a_layout_that_fits_its_plan_on_nodes_of_eight(size):
    plan = paper(size)
    assert plan.batch.tokens == 1_048_576
    place = allocate(plan, None, 8, "cuda")
    assert place.nodes == LAYOUTS[size].nodes
    assert place.layout.tensor <= 8
    assert plan.batch.global_batch_size % (place.data_parallel * place.layout.micro_batch_size) == 0
    assert ("--sequence-parallel" in place.arguments) == (place.layout.tensor > 1)


@pytest.mark.parametrize(
    ("nodes", "fits"), [(1, True), (2, True), (3, False), (5, False), (64, True), (128, False)]
)
def test_a_count_of_gpus_that_does_not_divide_the_batch_is_refused(nodes, fits):
    if fits:
        assert allocate(paper("203m"), nodes, 8, "cuda").world_size == 8 * nodes
    else:
        with pytest.raises(UserError, match=r"does not divide by \d+ model copies.*that do: 1, 2, 4"):
            allocate(paper("203m"), nodes, 8, "cuda")


def test_the_micro_batch_shrinks_to_what_a_copy_of_the_model_gets():
    assert allocate(paper("203m"), 64, 8, "cuda").layout.micro_batch_size == 1
    assert "--micro-batch-size" in allocate(paper("203m"), 64, 8, "cuda").arguments
    with pytest.raises(UserError, match="does not divide the 64 samples"):
        allocate(paper("203m"), 1, 8, "cuda", ("--micro-batch-size", "7"))


def test_the_layout_of_the_command_line_is_used():
    place = allocate(paper("3.1b"), 8, 8, "cuda", ("--tensor-model-parallel-size=4",))
    assert place.data_parallel == 16
    assert "--tensor-model-parallel-size" not in place.arguments
    with pytest.raises(UserError, match="32 attention heads do not divide"):
        allocate(paper("3.1b"), 8, 8, "cuda", ("--tensor-model-parallel-size", "5"))


def test_an_evaluation_takes_one_node_where_the_model_fits():
    place = allocate_evaluation(paper("3.1b"), 8, "cuda")
    assert (place.nodes, place.per_node) == (1, 8)
    assert allocate_evaluation(paper("203m"), 6, "cuda").per_node == 4


def test_an_evaluation_on_cpus_takes_no_gpu_and_is_refused_where_the_model_needs_one(tmp_path):
    submitted = SubmittedPlan.of(ROOT / "examples/paper/203m.yaml")
    given = {"partition": "gpu", "eval_partition": "cpu", "eval_gpus": "0", "tasks_per_node": "2"}
    settings = read_settings(None, given)
    jobs = {job.kind: job for job in plan_jobs(submitted, ["ours"], settings)}
    made = {kind: job_files("paper", job, settings, tmp_path, ()) for kind, job in jobs.items()}
    assert {"--partition=gpu", "--gpus-per-node=8"} <= set(made["train"].options)
    for kind in ("eval", "report"):
        assert "--partition=cpu" in made[kind].options
        assert "gpus" not in " ".join(made[kind].options)
    assert "--ntasks-per-node=2" in made["eval"].options
    assert [made[kind].spec["device"] for kind in ("train", "eval")] == ["cuda", "cpu"]
    with pytest.raises(UserError, match=r"give them GPUs.*\n- --fp8-format hybrid needs"):
        plan_jobs(submitted, ["ours"], settings, extra=("--fp8-format", "hybrid"))


@pytest.mark.parametrize("paradigm", ["ours", "ptfs", "cpt"])
@pytest.mark.parametrize("size", SIZES)
def test_each_recipe_is_short_and_names_its_plan(paradigm, size):
    recipe = ROOT / f"slurm/{paradigm}_{size}.sh"
    lines = recipe.read_text().splitlines()
    assert len(lines) < 10
    assert lines[-1] == f'submit {paradigm} {size} "$@"'
    assert subprocess.run(["bash", "-n", recipe]).returncode == 0
    assert recipe.stat().st_mode & 0o111


def test_a_recipe_plans_the_whole_paradigm_of_its_size(tmp_path):
    argv = ["bash", str(ROOT / "slurm/ours_3.1b.sh"), "--dry-run", "--json", "--account", "us"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}
    answer = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert answer.returncode == 2  # the data are missing, which is printed below the jobs
    assert "no slice" in answer.stderr
    shown = json.loads(answer.stdout)
    (cost,) = shown["cost"]
    assert (cost["steps"], cost["pace"], list(cost["gpu_hours"])) == (58_000, None, ["H100", "A100"])
    gpus, chain = 64, 40_000  # every step of the longest chain takes all GPUs of its job
    for name, seconds in cost["wall_seconds"].items():
        assert seconds * gpus / chain == pytest.approx(cost["gpu_hours"][name] * 3600 / cost["steps"])
    jobs = {job["key"]: job for job in shown["jobs"]}
    assert list(jobs)[:5] == ["ours/main", *(f"ours/branch-v{number}" for number in (1, 2, 3, 4))]
    assert jobs["ours/branch-v2"]["waits_for"] == [{"key": "ours/main", "step": 14000}]
    assert jobs["report"]["waits_for"] == [
        {"key": f"eval/ours/branch-v{number}", "step": None} for number in (1, 2, 3, 4)
    ]
    argv = jobs["ours/main"]["sbatch"]
    assert {"--nodes=8", "--gpus-per-node=8", "--account=us", "--signal=B:USR2@300", "--requeue"} <= set(argv)


def test_data_and_output_are_taken_from_the_settings_without_another_word_of_the_plan(tmp_path):
    plan = ROOT / "examples/paper/203m.yaml"
    data, output = str(tmp_path / "d: '\"x"), str(tmp_path / "o #1")
    snapshot = SubmittedPlan.of(plan, data, output)
    snapshot.write()
    again, before = load_plan(snapshot.latest), load_plan(plan)
    assert (again.output, again.data.slices) == (output, f"{data}/slices")
    assert again.data.valid == f"{data}/slices/valid"
    for run in before.runs("ours"):
        assert run_identity(again, again.run("ours", run.name)) == run_identity(before, run)
    assert dataclasses.replace(again, path=plan) == snapshot.plan


def test_without_them_the_snapshot_is_the_plan_word_by_word():
    plan = ROOT / "examples/paper/203m.yaml"
    assert SubmittedPlan.of(plan).text == plan.read_bytes()


@pytest.mark.slow
def test_the_tables_of_the_documentation_are_what_the_command_computes():
    command = [sys.executable, "-W", "ignore", "-m", "megatron_lrpath.launch.layouts"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    text = (ROOT / "docs/cluster.md").read_text()
    assert len(answer.stdout.splitlines()) == 35
    assert [line for line in answer.stdout.splitlines() if line not in text] == []

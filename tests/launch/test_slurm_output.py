"""An output folder belongs to one plan: another plan is refused before any write (Slurm is a stand-in)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lrpath.errors import UserError
from megatron_lrpath.launch.slurm import queue as commands
from megatron_lrpath.launch.slurm.ledger import SubmittedPlan
from megatron_lrpath.launch.slurm.settings import Settings, read_settings
from megatron_lrpath.launch.slurm.submit import Submission
from megatron_lrpath.locks import LOCK_NAME
from megatron_lrpath.plan import load_plan, run_identity
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.runs.lineage import write_lineage
from tests.support.fake_trainer import save
from tests.support.launch_fixtures import write_plan

RATE = ("max_lr: 1.0e-3", "max_lr: 2.0e-3")
ALPHA = ("alpha: 0.5", "alpha: 0.2")
MODEL = ("model: tiny", "model: {recipe: tiny, num_layers: 3}")


class Slurm:
    """A queue in which nothing runs."""

    def __init__(self) -> None:
        self.jobs: dict[int, commands.QueuedJob] = {}

    def submit(self, argv: list[str], script: Path) -> int:
        number = len(self.jobs) + 1
        self.jobs[number] = commands.QueuedJob(number, "PENDING", "Priority", "0:00", "", str(script), "")
        return number


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    made = Slurm()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "submit", made.submit)
    monkeypatch.setattr(commands, "queue", lambda: dict(made.jobs))
    monkeypatch.setattr(commands, "cancel", lambda numbers: [made.jobs.pop(number) for number in numbers])
    for name in ("v1", "v2", "v3", "valid"):
        for folder in ("data/slices", "moved/slices"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            Path(folder, f"{name}.slice").touch()
            Path(folder).with_name("tokenizer.model").touch()
    return made


def plan_file(folder: Path, *changes: tuple[str, str], versions: int = 2) -> Path:
    """Write the small plan with these replacements; return its path."""
    path = write_plan(folder, versions).path
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


def submission(path: Path, paradigm: str = "ours", settings: Settings | None = None) -> Submission:
    options = {"gpus_per_node": "0", "nodes": "1"}
    settings = settings or read_settings(None, options)
    return Submission.of(SubmittedPlan.of(path, settings.data, settings.output), settings, (paradigm,))


def files(folder: Path) -> dict[str, str]:
    found = {str(path): path.read_text() for path in folder.rglob("*") if path.is_file()}
    found.pop(str(folder / "slurm" / LOCK_NAME), None)  # changes with every reader
    return found


@pytest.mark.parametrize("paradigm", ["ours", "ptfs"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (MODEL, "model.num_layers: was 4, is 3"),
        (RATE, "learning rate of main.max_lr: was 0.001, is 0.002"),
    ],
)
def test_a_plan_is_refused_while_anothers_jobs_wait_in_its_output(tmp_path, slurm, paradigm, change, said):
    submission(plan_file(tmp_path)).carry_out()
    before, jobs = files(tmp_path / "out"), dict(slurm.jobs)
    other = submission(plan_file(tmp_path, change), paradigm)
    for call in (other.look, other.carry_out):
        with pytest.raises(UserError) as error:
            call()
        assert f"{tmp_path / 'out'} is another plan's output: ours/main has a job" in str(error.value)
        assert said in str(error.value)
        assert f"lrpath cancel {tmp_path / 'out/slurm/plan.yaml'}" in str(error.value)
    assert (files(tmp_path / "out"), slurm.jobs) == (before, jobs)
    elsewhere = replace(other.settings, output=str(tmp_path / "elsewhere"))
    submission(tmp_path / "plan.yaml", paradigm, elsewhere).carry_out()
    assert files(tmp_path / "out") == before


def test_a_plan_is_refused_where_another_has_trained(tmp_path, slurm):
    plan = load_plan(plan_file(tmp_path))
    main = plan.run("ours", "main")
    plan.folder(main).mkdir(parents=True)
    write_lineage(plan.folder(main), json.loads(json.dumps(run_identity(plan, main))), None, 0, 1, None)
    submission(plan_file(tmp_path, MODEL), "ptfs").look()  # no checkpoint has been saved yet
    save(RunFolder(plan.folder(main)).checkpoints, 4)
    submission(plan_file(tmp_path)).look()
    with pytest.raises(UserError, match=r"ours/main was trained there under other settings \(model\.num_l"):
        submission(plan_file(tmp_path, MODEL), "ptfs").carry_out()
    assert not (tmp_path / "out/slurm/plan.yaml").exists()
    assert slurm.jobs == {}


def test_the_same_plan_grown_or_moved_is_accepted(tmp_path, slurm):
    submission(plan_file(tmp_path)).carry_out()
    rows = submission(plan_file(tmp_path, versions=3)).carry_out()
    assert "ours/branch-v3" in {decision.job.key for decision, _ in rows if decision.is_new}
    moved = read_settings(None, {"gpus_per_node": "0", "nodes": "2", "data": "moved", "account": "us"})
    submission(tmp_path / "plan.yaml", settings=moved).carry_out()
    copy = load_plan(tmp_path / "out/slurm/plan.yaml")
    assert (copy.data.slices, copy.tokenizer.model) == ("moved/slices", "moved/tokenizer.model")


def test_a_corrected_plan_is_accepted_once_no_job_waits_for_the_old_one(tmp_path, slurm):
    rows = submission(plan_file(tmp_path)).carry_out()
    numbers = {decision.job.key: number for decision, number in rows}
    mended = plan_file(tmp_path, ALPHA)  # the main path is the same
    with pytest.raises(UserError, match="ours/branch-v1 has a job"):
        submission(mended).carry_out()
    for key, number in numbers.items():
        if "branch-v1" in key:
            commands.cancel([number])
        elif "branch-v2" in key:  # as a job holds jobs that can no longer start
            slurm.jobs[number] = replace(slurm.jobs[number], comment="lrpath: held: bad data")
    actions = {decision.job.key: decision.action for decision, _ in submission(mended).carry_out()}
    assert actions["ours/main"] == "extend"  # to a later branch point
    assert (actions["ours/branch-v1"], actions["ours/branch-v2"]) == ("submit", "replace")

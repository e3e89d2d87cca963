"""`--set` on `plan`, `run` and `submit`: a plan with other values in its own output, and refusals."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lrpath.cli import main
from megatron_lrpath.launch import local
from megatron_lrpath.launch.slurm import queue as commands
from megatron_lrpath.locks import FolderLock
from megatron_lrpath.plan import Plan, load_plan
from tests.support.launch_fixtures import fake_command
from tests.support.training_fixtures import make_plan

HOT = ("--set", "schedule.max_lr=2e-2")
THERE = ("--set", "output=hot")


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a plan with its data, in the working directory; trainings are only pretended."""
    monkeypatch.chdir(tmp_path)
    for name in ("LRPATH_OUTPUT", "LRPATH_DATA"):
        monkeypatch.delenv(name, raising=False)
    carry_out = local.carry_out

    def pretend(plan: Plan, options: local.Options) -> int:
        assert plan == load_plan(plan.path)  # the plan that the trainings read
        return carry_out(plan, replace(options, evaluate=False), fake_command(plan))

    monkeypatch.setattr(local, "carry_out", pretend)
    return make_plan(Path(), (4, 4))


def run(*argv: str) -> int:
    return main(["run", "plan.yaml", "--device", "cpu", *argv])


def files() -> set[str]:
    return {str(path) for path in Path().rglob("*")}


def test_the_plan_with_other_values_is_trained_and_read_by_the_other_commands(
    plan: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = plan.read_bytes()
    assert run(*HOT, *THERE, "--set", "versions.steps=60") == 2  # more steps than the slices have samples for
    assert run(*HOT, *THERE, "--set", "branch_mix={slices: {gone: 0.25}}") == 2
    said = capsys.readouterr().err
    assert "plan.yaml: " in said
    assert "--set branch_mix.slices.gone" in said
    assert "hot/plan.yaml" not in said
    assert not Path("hot").exists()
    assert run(*HOT, *THERE, "--set", "alpha=0.25") == 0
    made = Path("hot/plan.yaml").resolve()
    assert f"next: lrpath report {made}" in capsys.readouterr().out
    first = made.read_text().splitlines()[0]
    assert first.startswith(
        f"# made by lrpath from {plan.resolve()} {shlex.join([*HOT, *THERE, '--set', 'alpha=0.25'])}"
    )
    assert plan.read_bytes() == before
    monkeypatch.chdir("hot")
    trained = load_plan("plan.yaml")
    assert (trained.schedule.max_lr, trained.alpha, trained.output) == (0.02, 0.25, str(made.parent))
    assert main(["status", "plan.yaml", "--json"]) == 0
    assert '"done"' in capsys.readouterr().out
    monkeypatch.chdir("..")
    content = made.read_bytes()
    assert run("--set", "alpha=0.25", "--set", "output=./hot", "--set", "schedule.max_lr=0.02") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert made.read_bytes() == content


def test_plan_shows_what_would_be_trained_and_writes_nothing(
    plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files()
    assert main(["plan", str(plan), *HOT, "--set", "output=a b", "--no-curves"]) == 0
    said = capsys.readouterr().out
    assert "0.02" in said or "2e-02" in said or "2.0e-02" in said
    assert f"next: lrpath run {plan} {shlex.join([*HOT, '--set', 'output=a b'])}" in said
    assert files() == before


@pytest.mark.parametrize("command", ["plan", "run", "submit"])
def test_the_output_of_another_plan_is_refused(
    plan: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*argv: str) -> str:
        before = files()
        assert main([command, str(plan), *argv]) == 2
        assert files() == before
        return capsys.readouterr().err

    Path("runs/ours/main").mkdir(parents=True)
    assert "runs: holds runs of a plan without these overrides (schedule.max_lr=2e-2)" in call(*HOT)
    Path("old/slurm").mkdir(parents=True)
    Path("old/slurm/jobs.json").touch()
    assert "holds submitted jobs" in call(*HOT, "--set", "output=old")
    Path("mine").mkdir()
    Path("mine/plan.yaml").write_bytes(plan.read_bytes())
    assert "mine/plan.yaml: exists already, and no plan that --set has written" in call(
        *HOT, "--set", "output=mine"
    )
    Path("hot").mkdir()
    assert run(*HOT, *THERE, "--run", "main") == 0
    said = call("--set", "schedule.max_lr=3e-2", *THERE)
    assert "is the output of other overrides (schedule.max_lr=2e-2 output=hot), not of these" in said
    assert "--set output=FOLDER" in said
    assert "may be removed" not in said
    assert "is the output of other overrides" in call(*THERE)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--set", "schedule.max_rl=1"], "--set schedule.max_rl: unknown key (did you mean 'max_lr'?)"),
        (["--set", "schedule"], "write it like --set schedule.max_lr=1e-3"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "run", "submit"])
def test_mistakes_are_reported(
    plan: Path, command: str, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(plan), *argv]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "submit"])
def test_the_error_for_an_experiment_names_its_own_key(
    plan: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("many.yaml").write_text("name: many\nplan: plan.yaml\nvary: {alpha: [0.25, 0.5]}\n")
    assert main([command, "many.yaml", *HOT]) == 2
    assert "write the keys under `set:` in it" in capsys.readouterr().err


def test_a_call_that_was_killed_before_the_training_resumes(
    plan: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(*_: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(local, "carry_out", killed)
        assert run(*HOT, *THERE) == 130
    assert Path("hot/plan.yaml").is_file()
    assert run("--set", "alpha=0.25", *THERE) == 2
    assert "Nothing is trained there: " in capsys.readouterr().err
    assert run(*HOT, *THERE) == 0
    assert Path("hot/ours/branch-v2/result.json").is_file()


def test_a_plan_that_has_grown_is_written_again_and_an_edited_copy_is_not(
    plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan.write_text(plan.read_text().replace("- name: v2\n  steps: 4\n", ""))
    assert run(*HOT, *THERE) == 0
    make_plan(Path(), (4, 4))
    lock = FolderLock.acquire(Path("hot"))
    assert run(*HOT, *THERE) == 2
    assert "is running a plan there" in capsys.readouterr().err
    lock.close()
    assert run(*HOT, *THERE) == 0
    assert [version.name for version in load_plan("hot/plan.yaml").versions] == ["v1", "v2"]
    edited = Path("hot/plan.yaml").read_text() + "license: mit\n"
    Path("hot/plan.yaml").write_text(edited)
    assert run(*HOT, *THERE) == 2
    assert "was edited since it was made" in capsys.readouterr().err
    assert main(["run", "hot/plan.yaml", "--device", "cpu"]) == 0
    assert Path("hot/plan.yaml").read_text() == edited


def test_jobs_train_the_plan_with_other_values(
    plan: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs: dict[int, commands.QueuedJob] = {}

    def submit(argv: list[str], script: Path) -> int:
        number = len(jobs) + 1
        jobs[number] = commands.QueuedJob(number, "PENDING", "Priority", "0:00", "", str(script), "")
        return number

    monkeypatch.setattr(commands, "submit", submit)
    monkeypatch.setattr(commands, "queue", lambda: dict(jobs))
    argv = ["submit", str(plan), *HOT, "--gpus-per-node", "0", "--nodes", "1"]
    before = files()
    assert main([*argv, *THERE, "--dry-run"]) == 0
    assert files() == before
    assert main([*argv, *THERE]) == 0
    made = Path("hot/plan.yaml").resolve()
    assert f"next: lrpath status {made}" in capsys.readouterr().out
    assert load_plan("hot/slurm/plan.yaml").schedule.max_lr == load_plan(made).schedule.max_lr == 0.02
    count = len(jobs)
    assert main([*argv, *THERE]) == 0
    assert main(["submit", str(made), "--gpus-per-node", "0", "--nodes", "1"]) == 0
    assert len(jobs) == count
    assert main([*argv, "--output", "other"]) == 0
    assert load_plan("other/plan.yaml").output == str(Path("other").resolve())
    assert main([*argv, *THERE, "--output", "third"]) == 2
    assert "leave one of them out" in capsys.readouterr().err
    Path("moved").mkdir()
    Path("moved/slices").symlink_to(Path("data/slices").resolve())
    assert main([*argv, "--set", "output=fourth", "--data", "moved"]) == 0
    assert load_plan("fourth/plan.yaml").data.slices == str(Path("moved/slices").absolute())
    assert "from" in Path("fourth/plan.yaml").read_text().splitlines()[0]

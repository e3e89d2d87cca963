"""The command `lrpath`: its output, its exit statuses, its speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lrpath import cli
from megatron_lrpath.commands import COMMANDS
from megatron_lrpath.commands.lr import telling_steps
from megatron_lrpath.commands.plan_view import curve_points
from tests.support import ROOT
from tests.support.plan_text import SOUND, plan_with, versions
from tools import train_tokenizer

HEAVY = ("torch", "megatron", "numpy", "matplotlib", "transformers", "rich", "yaml")


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(SOUND)
    return path


@pytest.fixture
def paper_file(tmp_path: Path) -> Path:
    schedule = {"style": "cosine", "max_lr": 3e-4, "min_lr": 3e-5, "warmup_steps": 2000}
    return plan_with(tmp_path, schedule=schedule, versions=versions(4, 10_000)).path


def lrpath(*argv: object) -> subprocess.CompletedProcess[str]:
    """Run `lrpath` in a separate process, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "megatron_lrpath.cli", *map(str, argv)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_plan_json_is_the_designs(paper_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(paper_file), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["paradigms"]
    assert list(answer) == ["ours", "ptfs", "cpt"]
    assert (answer["ours"]["total_steps"], answer["ours"]["relative_cost"]) == (58_000, 0.58)
    assert (answer["ptfs"]["total_steps"], answer["cpt"]["total_steps"]) == (100_000, 40_000)
    branch = answer["ours"]["runs"][2]
    expected = {
        "name": "branch-v2",
        "kind": "branch",
        "version": "v2",
        "parent": {"run": "main", "step": 14_000},
        "first_step": 14_000,
        "last_step": 20_000,
        "steps": 6000,
    }
    assert {key: branch[key] for key in expected} == expected
    assert answer["ptfs"]["runs"][0]["parent"] is None


def test_one_paradigm_alone(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(plan_file), "--paradigm", "cpt", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["paradigms"]) == ["cpt"]


def test_the_table_shows_runs_costs_and_curves(paper_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(paper_file)]) == 0
    text = capsys.readouterr().out
    for part in (
        "branch-v4",
        "34,001",
        "58,000",
        "0.58",
        "0.40",
        "⠀",
        "40K steps",
    ):
        assert part in text


def test_the_runs_of_what_is_trained_and_the_costs_of_all(
    plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_file.write_text(SOUND + "paradigms: [ours, cpt]\n")
    assert cli.main(["plan", str(plan_file)]) == 0
    text = capsys.readouterr().out
    assert "PTFS: not trained by this plan, for comparison; --paradigm ptfs shows the runs" in text
    assert ("branch-v2" in text, "continual-v2" in text, "scratch-v2" in text) == (True, True, False)
    assert "cpt/continual-v1 and ptfs/scratch-v1 are the same training, which runs once" in text
    assert text.count("Learning rate, ") == 2
    assert cli.main(["plan", str(plan_file), "--paradigm", "ptfs"]) == 0
    text = capsys.readouterr().out
    assert ("scratch-v2" in text, "not trained" in text) == (True, False)


def test_curves_can_be_left_out(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(plan_file), "--no-curves"]) == 0
    assert "⠀" not in capsys.readouterr().out


def test_curves_as_a_picture(plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "new" / "curves.png"
    assert cli.main(["plan", str(plan_file), "--json", "--png", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    json.loads(capsys.readouterr().out)


def test_a_picture_that_cannot_be_written(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(plan_file), "--no-curves", "--png", str(plan_file / "x.png")]) == 2
    assert "lrpath: error: cannot write" in capsys.readouterr().err


def test_lr_gives_the_rate_of_every_step(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lr", str(plan_file), "--paradigm", "ours", "--run", "branch-v2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["steps"] == list(range(141, 201))
    assert answer["lr"][0] == 1e-3
    assert answer["lr"] == sorted(answer["lr"], reverse=True)
    assert 1e-4 < answer["lr"][-1] < 1.01e-4


def test_the_first_step_of_a_warm_up_has_the_rate_zero(
    plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["lr", str(plan_file), "--paradigm", "ours", "--run", "main", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["steps"][0], answer["lr"][0]) == (1, 0.0)
    assert (answer["lr"][19], answer["lr"][20]) == (1e-3 * 0.95, 1e-3)


def test_lr_as_a_table(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lr", str(plan_file), "--paradigm", "ptfs", "--run", "scratch-v2"]) == 0
    text = capsys.readouterr().out
    assert "ptfs/scratch-v2" in text
    assert "1.000000e-03" in text


def test_sampled_steps_and_points_have_the_ends_and_the_corner(tmp_path: Path) -> None:
    run = plan_with(tmp_path, versions=versions(1, 1000)).run("ptfs", "scratch-v1")
    steps = telling_steps(run, 24)
    assert {1, 21, 1000} <= set(steps)
    assert len(steps) <= 25
    assert telling_steps(run, 5000) == list(range(1, 1001))
    points = dict(curve_points(run, 50))
    assert points[0.0] == 0.0
    assert points[20.0] == 1e-3
    assert points[1000.0] == 1e-4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "nowhere.yaml"], "lrpath: error: nowhere.yaml: no such plan file"),
        (
            ["chat", "{plan}"],
            "no version is fine-tuned yet (the plan has no section `sft`: `lrpath docs sft`;",
        ),
        (["lr", "{plan}", "--paradigm", "ours", "--run", "brnch-v2"], "(did you mean 'branch-v2'?)"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    plan_file: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert cli.main([word.format(plan=plan_file) for word in argv]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_an_unknown_option_names_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", "--paradigmm", "ours"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: lrpath plan ")
    assert said.endswith("unrecognized arguments: --paradigmm (did you mean '--paradigm'?)\n")


def test_a_wrong_option_of_a_tool_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        (
            ["--input", "x", "--output-prefix", "y", "--json-key"],
            "--json-keys: expected at least one argument",
        ),
        (["--input", "x", "--output-prefix", "y", "--vocab-sise", "9"], "(did you mean '--vocab-size'?)"),
    ):
        with pytest.raises(SystemExit) as caught:
            train_tokenizer.main(argv)
        said = capsys.readouterr().err
        assert (caught.value.code, said.count("\n"), message in said) == (2, 1, True)
        assert said.startswith("error: ")
        assert "--help" in said


def test_an_interrupt_ends_quietly(
    plan_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(path: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_lrpath.plan.load_plan", interrupted)
    assert cli.main(["plan", str(plan_file)]) == 130
    assert capsys.readouterr().err == "lrpath: interrupted\n"


@pytest.mark.parametrize(("form", "status"), [("--json", 141), ("--no-curves", 1)])
def test_a_reader_that_goes_away_is_no_error(plan_file: Path, form: str, status: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "-m", "megatron_lrpath.cli", "plan", str(plan_file), form],
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=240,
        check=False,
    )
    os.close(writer)
    assert (process.returncode, process.stderr) == (status, b"")  # rich itself exits with 1


def test_without_a_command_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    text = capsys.readouterr().out
    assert all(f"\n    {name}" in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: lrpath {name}" in capsys.readouterr().out


def test_finding_the_commands_imports_nothing_heavy() -> None:
    code = "import sys; from megatron_lrpath.cli import build_parser; build_parser(); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=240
    ).stdout.split()
    assert [name for name in HEAVY if name in loaded] == []


def test_plan_imports_neither_torch_nor_megatron(paper_file: Path) -> None:
    code = "import sys; from megatron_lrpath.cli import main; main(sys.argv[1:]); print(*sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code, "plan", str(paper_file)],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=240,
    )  # fmt: skip
    loaded = process.stdout.splitlines()[-1].split()
    assert "megatron_lrpath.readiness.check" in loaded
    # the slices are read, the tables drawn, the plan read
    assert set(HEAVY) & set(loaded) == {"numpy", "rich", "yaml"}


def test_an_output_without_unicode_is_no_error(plan_file: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = subprocess.run(
        [sys.executable, "-m", "megatron_lrpath.cli", "plan", str(plan_file)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        timeout=240,
        check=False,
    )
    assert process.returncode == 0
    assert b"branch-v2" in process.stdout

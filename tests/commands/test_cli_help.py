"""Help for users: examples in every help text, completion in the shell, the plan's schema in an editor."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from megatron_lrpath import cli
from megatron_lrpath.commands import COMMANDS
from megatron_lrpath.experiment.load import is_experiment
from tests.commands.test_cli import HEAVY
from tests.support import ROOT
from tests.support.plan_text import SOUND

PLANS = sorted(path for path in (ROOT / "examples").rglob("*.yaml") if not is_experiment(path))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example_that_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    example = capsys.readouterr().out.partition("example:\n")[2]
    calls = re.findall(rf"lrpath {name}\b[^\n]*?(?=\s{{2,}}| && | >|\n|$)", example)
    assert calls
    for call in calls:
        argv = shlex.split(call)[1:]
        args = cli.build_parser().parse_args(argv[: argv.index("--")] if "--" in argv else argv)
        assert args.command == name


def completions(line: str, cwd: Path) -> set[str]:
    """Return the completions of `line` that `lrpath` returns to bash."""
    answer = cwd / "answer"
    environment = os.environ | {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    command = [sys.executable, "-m", "megatron_lrpath.cli"]
    subprocess.run(command, env=environment, cwd=cwd, check=False, timeout=240, capture_output=True)
    return {word.strip() for word in answer.read_text().split("\n")}


def test_the_shell_completes_commands_files_runs_and_versions(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(SOUND)
    (tmp_path / "notes.txt").touch()
    assert {"plan", "run", "report"} <= completions("lrpath ", tmp_path)
    assert completions("lrpath plan ", tmp_path) == {"plan.yaml"}
    assert completions("lrpath eval plan.yaml --para", tmp_path) == {"--paradigm"}
    assert completions("lrpath lr plan.yaml --paradigm cpt --run cont", tmp_path) == {
        "continual-v1",
        "continual-v2",
    }
    assert "v1" in completions("lrpath merge plan.yaml --version ", tmp_path)
    assert completions("lrpath lr missing.yaml --paradigm cpt --run c", tmp_path) == {""}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_code_for_a_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    code = capsys.readouterr().out
    assert "_ARGCOMPLETE" in code
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=code, text=True, check=True, timeout=240)


def test_completing_is_light(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(SOUND)
    code = f"""
import os, sys
from megatron_lrpath import cli
from megatron_lrpath.commands import completion
completion.complete = lambda parser: completion.run_names(parser.parse_args(["eval", "plan.yaml"])) and None
os.environ["_ARGCOMPLETE"] = "1"
cli.main(["plan", "--schema"])
print(*[name for name in {HEAVY!r} if name in sys.modules and name != "yaml"], file=sys.stderr)
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=240
    )
    assert answer.stderr.strip() == ""


@pytest.fixture(scope="module")
def schema() -> dict[str, object]:
    """Return the schema that a user gets."""
    answer = subprocess.run(
        [sys.executable, "-m", "megatron_lrpath.cli", "plan", "--schema"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        timeout=240,
    )
    schema: dict[str, object] = json.loads(answer.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    return schema


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_schema_accepts_the_example_plans(path: Path, schema: dict[str, object]) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text()), schema)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"alfa": 0.6}, []),
        ({"alpha": 1.5}, ["alpha"]),
        ({"model": "1.3b"}, ["model"]),
        ({"schedule": {"style": "cosin", "max_lr": 1e-3}}, ["schedule", "style"]),
        ({"versions": [{"name": "v1"}]}, ["versions", 0]),
    ],
)
def test_the_schema_refuses_what_a_plan_must_not_have(
    change: dict[str, object], where: list[object], schema: dict[str, object]
) -> None:
    errors = list(jsonschema.Draft202012Validator(schema).iter_errors(yaml.safe_load(SOUND) | change))
    assert [list(error.absolute_path) for error in errors] == [where]


def test_a_plan_is_needed_without_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan"]) == 2
    assert "which plan?" in capsys.readouterr().err

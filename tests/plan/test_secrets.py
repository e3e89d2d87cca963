"""Secrets are detected by their names: shown and stored as `***`, and on no child's command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lrpath.cli import main
from megatron_lrpath.errors import UserError
from megatron_lrpath.launch.slurm.settings import read_settings
from megatron_lrpath.plan.arguments import parser_facts
from megatron_lrpath.plan.secrets import hide_message, hide_values, hide_words, is_secret, secret_problem
from megatron_lrpath.runs import lineage
from tests.support.plan_text import plan_with

SECRETS = (
    "WANDB_API_KEY",
    "HF_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "--wandb-api-key",
    "--hf-token",
    "db_password",
    "NCCL_SECRET",
    "apiKey",
    "ApiToken",
    "MYSECRET",
    "--key",
)
HARMLESS = (
    "--tokenizer-model",
    "--json-keys",
    "NCCL_DEBUG",
    "--special-tokens",
    "monkey",
    "--keys",
    "--lr",
    "keyboard",
)


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_known_by_its_name(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", HARMLESS)
def test_other_names_are_no_secrets(name: str) -> None:
    assert not is_secret(name)


def test_no_argument_of_megatron_is_a_secret() -> None:
    options = [f"--{option}" for fact in parser_facts() for option in (fact["name"], *fact["options"])]
    assert [option for option in options if is_secret(option)] == []


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["--api-key", "hunter2", "--lr", "1"], ["--api-key", "***", "--lr", "1"]),
        (["--api-key=hunter2", "x"], ["--api-key=***", "x"]),
        (["--export=ALL,API_TOKEN=hunter2,B=1"], ["--export=ALL,API_TOKEN=***,B=1"]),
        (["API_TOKEN=hunter2", "prog"], ["API_TOKEN=***", "prog"]),
        (["--url", "https://me:hunter2@host/x"], ["--url", "https://me:***@host/x"]),
        (["--api-key", "-hunter2"], ["--api-key", "***"]),
        (["--plan", "a/key.yaml", "--fim-eod-token", "7"], ["--plan", "a/key.yaml", "--fim-eod-token", "7"]),
    ],
)
def test_a_command_line_is_shown_without_secrets(argv: list[str], shown: list[str]) -> None:
    assert hide_words(argv) == shown
    assert "hunter2" not in hide_message(f"unrecognized arguments: {' '.join(argv)}")


def test_variables_are_shown_without_secrets() -> None:
    found = hide_values(
        {"NCCL_TOKEN": "hunter2", "NCCL_DEBUG": "INFO", "EMPTY_KEY": "", "N_KEY": None, "U": "a://b:c@d"}
    )
    assert found == {
        "NCCL_TOKEN": "***",
        "NCCL_DEBUG": "INFO",
        "EMPTY_KEY": "",
        "N_KEY": None,
        "U": "a://b:***@d",
    }


def test_a_lineage_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = tmp_path / "launch.json"
    launch.write_text('{"variables": {"NCCL_SECRET_KEY": "hunter2", "NCCL_DEBUG": "INFO"}}')
    monkeypatch.setenv("LRPATH_LAUNCH", str(launch))
    monkeypatch.setattr("sys.argv", ["train.py", "--my-token", "hunter2", "--lr", "1"])
    lineage.write_lineage(tmp_path, {"seed": 1}, None, 0, 1, None)
    text = (tmp_path / "lineage.json").read_text()
    assert "hunter2" not in text
    start = (lineage.read_lineage(tmp_path) or {})["starts"][0]
    assert start["command"] == ["train.py", "--my-token", "***", "--lr", "1"]
    assert start["launch"]["variables"] == {"NCCL_SECRET_KEY": "***", "NCCL_DEBUG": "INFO"}


@pytest.mark.parametrize("command", ["run", "submit", "sft", "eval"])
def test_a_secret_is_put_on_no_childs_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    plan_with(tmp_path)
    assert main([command, str(tmp_path / "plan.yaml"), "--", "--my-api-key", "hunter2"]) == 2
    said = capsys.readouterr().err
    assert "--my-api-key" in said
    assert "looks like a secret" in said
    assert "environment variable" in said
    assert "hunter2" not in said


def test_a_wrong_command_line_is_refused_without_its_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["status", "plan.yaml", "--api-key", "hunter2"])
    assert "hunter2" not in capsys.readouterr().err


def test_a_batch_script_holds_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "settings.env"
    path.write_text("LRPATH_SRUN='--export=ALL,HF_TOKEN=hunter2'\n")
    with pytest.raises(UserError, match="looks like a secret") as caught:
        read_settings(path, {})
    assert "hunter2" not in str(caught.value)
    assert secret_problem(["--export=ALL,NCCL_DEBUG=INFO"]) is None

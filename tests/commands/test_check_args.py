"""`lrpath check-args` on a whole launch script: arguments are kept, replaced by plan keys, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lrpath.cli import main

WORDS = ["--num-layers", "24", "--lr", "3e-4", "--save-interval", "500", "--ours-of-theirs", "7"]


def checked(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, tuple[str, str]]]:
    """Return the exit status, and for each option its class and meaning."""
    status = main(["check-args", "--json", *argv])
    entries = json.loads(capsys.readouterr().out)
    return status, {one["argument"].split()[0]: (one["class"], one["meaning"]) for one in entries}


def test_every_argument_of_a_launch_line_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = checked(["--", "torchrun", "--nproc-per-node", "8", "pretrain_gpt.py", *WORDS], capsys)
    assert status == 0
    assert found["--num-layers"][0] == "identity"
    assert found["--lr"] == ("set", "`schedule.max_lr` of the plan")
    assert found["--save-interval"][0] == "neutral"
    assert found["--ours-of-theirs"][0] == "unknown"


def test_all_refusals_are_reported_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "train.sh"
    script.write_text(
        "#!/bin/bash\nARGS=(\n  --num-layers twelve\n  --seq-length many # ours\n)\n"
        'torchrun pretrain_gpt.py "${ARGS[@]}" --lr 3e-4\n'
    )
    status, found = checked(["--script", str(script)], capsys)
    assert status == 2
    assert {name for name, (kind, _) in found.items() if kind == "refused"} == {
        "--num-layers",
        "--seq-length",
    }
    assert found["--lr"][0] == "set"


@pytest.mark.parametrize("argv", [[], ["--script", "/nowhere/train.sh"]])
def test_without_arguments_there_is_nothing_to_check(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-args", *argv]) == 2
    assert "lrpath: error: " in capsys.readouterr().err


def test_arguments_without_effect_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "train.sh"
    script.write_text(
        "torchrun pretrain_gpt.py --num-query-groups 2 --position-embedding-type $POSITIONS "
        "--use-rope-scaling --moe-router-topk 2\n"
    )
    status, found = checked(["--script", str(script)], capsys)
    assert status == 2
    assert found["--num-query-groups"] == (
        "refused",
        "--num-query-groups has no effect without --group-query-attention",
    )
    assert found["--moe-router-topk"][0] == "refused"
    assert found["--use-rope-scaling"][0] == "identity"  # the variable can be `rope`

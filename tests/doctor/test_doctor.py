"""The doctor lists installed and missing software, with an exit status that scripts can use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lrpath import doctor
from megatron_lrpath.cli import main
from megatron_lrpath.doctor import gpu_check, megatron_check, plan_checks, within
from megatron_lrpath.plan import load_plan
from megatron_lrpath.readiness import Finding
from tests.support.training_fixtures import make_plan


def statuses(checks: list[Finding]) -> dict[str, str]:
    return {check.name: check.status for check in checks}


def test_a_correct_plan_passes_and_json_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(tmp_path)
    found = statuses(plan_checks(load_plan(plan)))
    assert (found["plan"], found["data"], found["tokens of v3"], found["disk"]) == ("ok", "ok", "ok", "ok")
    assert main(["doctor", str(plan)]) == 0
    assert capsys.readouterr().out.endswith(
        f"next: lrpath run {plan}   (on a cluster: lrpath submit {plan})\n"
    )
    assert main(["doctor", str(plan), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is True
    assert {check["name"]: check["status"] for check in answer["plan"]} == found
    assert {
        "Python",
        "megatron-core",
        "GPUs",
        "Transformer Engine",
        "Apex",
        "liger-kernel",
        "NCCL",
        "disk",
    } <= {check["name"] for check in answer["machine"]}


def test_what_a_plan_lacks_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(tmp_path, tokenizer={"type": "SentencePieceTokenizer", "model": str(tmp_path / "gone")})
    (tmp_path / "data/slices/v2.slice").unlink()
    found = {check.name: check for check in plan_checks(load_plan(plan))}
    assert found["tokenizer"].status == "failed"
    assert "gone" in found["tokenizer"].found
    assert found["data"].status == "failed"
    assert "v2.slice" in found["data"].found
    assert main(["doctor", str(plan)]) == 1
    said = capsys.readouterr().out
    assert "FAILED" in said
    assert said.endswith("next: fix the checks marked FAILED, then call this again\n")


def test_too_few_tokens_fail_for_that_version_alone(tmp_path: Path) -> None:
    make_plan(tmp_path, versions=(6, 6))
    content = (tmp_path / "plan.yaml").read_text()
    (tmp_path / "plan.yaml").write_text(content.replace("name: v2\n  steps: 6", "name: v2\n  steps: 60"))
    found = statuses(plan_checks(load_plan(tmp_path / "plan.yaml")))
    assert (found["tokens of v1"], found["tokens of v2"]) == ("ok", "failed")


def test_a_broken_plan_is_bad_input_as_for_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.yaml").write_text("name: [")
    assert main(["doctor", str(tmp_path / "plan.yaml")]) == 2
    assert "plan.yaml:1" in capsys.readouterr().err


def test_megatron_must_be_in_the_supported_range(monkeypatch: pytest.MonkeyPatch) -> None:
    assert within("0.19.2rc1", ">=0.19,<0.20")
    assert not within("0.20.0", ">=0.19,<0.20")
    assert not within("0.18.9", ">=0.19,<0.20")
    for found, status in ((None, "failed"), ("0.20.1", "failed"), ("0.19.0", "ok")):
        monkeypatch.setattr(doctor, "version", lambda name, found=found: found)
        assert megatron_check(">=0.19,<0.20").status == status


def test_gpus_that_torch_cannot_use_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "driver_gpus", lambda: 8)
    found = gpu_check([])
    assert (found.status, "8" in found.found) == ("failed", True)
    monkeypatch.setattr(doctor, "driver_gpus", lambda: 0)
    assert gpu_check([]).status == "info"
    assert gpu_check([("H100", 80 * 10**9)]).status == "ok"

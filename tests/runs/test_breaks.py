"""Breaks are printed at the start, recorded, and shown by status and report; a replaced start is no break."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_lrpath.cli import main
from megatron_lrpath.plan.file.edit import without_versions
from megatron_lrpath.runs.breaks import breaks, breaks_told, new_break
from megatron_lrpath.runs.lineage import read_lineage
from tests.support.training_fixtures import make_plan, run_words, train


def start(step: int, torch: str = "2.9.0", **others: Any) -> dict[str, Any]:
    return {"step": step, "packages": {"torch": torch, "megatron-core": "0.19.0"}, **others}


ONE = {"device": "NVIDIA H100", "world_size": 8, "layout": {"tensor_model_parallel_size": 1}}


@pytest.mark.parametrize(
    ("earlier", "now", "found"),
    [
        ([], start(0, **ONE), []),
        ([start(0, **ONE)], start(40, **ONE), []),
        ([start(0)], start(40, "2.10.0"), ["torch 2.10.0 (before: 2.9.0)"]),
        ([start(0, **ONE)], start(40, **ONE | {"device": "NVIDIA B200"}), ["device NVIDIA B200 (before: NVIDIA H100)"]),
        (
            [start(0, **ONE)],
            start(40, **ONE | {"world_size": 16, "layout": {"tensor_model_parallel_size": 2}}),
            ["processes 16 (before: 8)", "tensor_model_parallel_size 2 (before: 1)"],
        ),
        (
            [start(0, **ONE, kernels="adam rotary")],
            start(40, **ONE, kernels="none"),
            ["GPU kernels none (before: adam rotary)"],
        ),
        ([start(0)], start(40, **ONE, kernels="adam"), []),
        ([start(0)], start(40, **ONE), []),  # an older version recorded less
        ([start(0), start(40, "2.10.0")], start(40), []),  # nothing is left of the second start
        ([start(0), start(40, "2.10.0")], start(30), []),  # a rewind returned to an earlier step
        ([start(0, "2.10.0")], start(0), []),  # begun again
    ],
)  # fmt: skip
def test_a_start_is_compared_with_the_start_that_it_resumes_from(
    earlier: list[dict[str, Any]], now: dict[str, Any], found: list[str]
) -> None:
    assert new_break(earlier, now) == found


def test_a_break_whose_steps_were_replaced_is_none() -> None:
    starts = [start(0), start(40) | {"break": ["torch 3"]}, start(60) | {"break": ["torch 2"]}, start(50)]
    assert breaks({"starts": starts}) == {40: ["torch 3"]}
    assert breaks({"starts": [*starts, start(20)]}) == {}
    assert breaks({"starts": "damaged"}) == breaks({}) == {}
    assert breaks_told({"starts": starts}) == ["continues from step 40 with torch 3"]


def test_it_is_printed_recorded_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_plan(tmp_path, (6, 6))
    both = path.read_text()
    path.write_text(without_versions(path, both, ["v2"], []))
    said = train(run_words(path, "ours", "main")).ok().output
    assert "a break" not in said
    path.write_text(both)
    said = train(run_words(path, "ours", "main"), nproc=2).ok().output
    folder = tmp_path / "runs/ours/main"
    assert f"{folder}: a break at step 3: continues with processes 2 (before: 1); equal bits are" in said
    first, second = (read_lineage(folder) or {})["starts"]
    assert "break" not in first
    assert second["break"] == ["processes 2 (before: 1)"]
    assert (first["device"], first["layout"]["tensor_model_parallel_size"]) == ("cpu", 1)
    assert main(["status", str(path), "--json"]) == 0
    (row,) = (one for one in json.loads(capsys.readouterr().out)["runs"] if one["key"] == "ours/main")
    assert row["breaks"] == ["continues from step 3 with processes 2 (before: 1)"]
    assert main(["status", str(path)]) == 0
    assert "ours/main: continues from step 3 with processes 2 (before: 1)" in capsys.readouterr().out
    assert main(["report", str(path)]) == 0
    report = (tmp_path / "runs/report/report.md").read_text()
    assert "ours/main continues from step 3 with processes 2 (before: 1)." in report
    assert "dotted upright lines: breaks" in report

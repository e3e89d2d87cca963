"""A run's history is read as it is: torn lines, repeated steps, missing values."""

from __future__ import annotations

import json
import math
from pathlib import Path

from megatron_lrpath.runs.history import History, read_history


def history(folder: Path, text: str) -> History:
    (folder / "history.jsonl").write_text(text)
    return read_history(folder)


def test_no_file_is_an_empty_history(tmp_path):
    found = read_history(tmp_path)
    assert len(found) == 0
    assert found.steps.size == 0
    assert found.seconds is None


def test_a_torn_last_line_is_no_step_and_no_complaint(tmp_path):
    found = history(tmp_path, '{"step": 1, "lr": 0.5, "seconds": 2}\n{"step": 2, "lr": 0.2')
    assert found.steps.tolist() == [1]
    assert found.unreadable == 0


def test_a_torn_line_in_the_middle_is_counted(tmp_path):
    torn = '{"step": 2, "l{"step": 2, "lr": 0.2}'
    found = history(tmp_path, f'{{"step": 1, "lr": 0.5}}\n{torn}\n{{"step": 3, "lr": 1}}\n')
    assert found.steps.tolist() == [1, 3]
    assert found.unreadable == 1


def test_of_a_step_done_again_the_last_line_counts(tmp_path):
    pairs = ((1, 0.1), (2, 0.2), (3, 0.3), (2, 0.9))
    lines = [json.dumps({"step": step, "lr": rate, "seconds": 1}) for step, rate in pairs]
    found = history(tmp_path, "\n".join(lines) + "\n")
    assert found.steps.tolist() == [1, 2, 3]
    assert found["lr"].tolist() == [0.1, 0.9, 0.3]
    assert found.seconds == 3


def test_the_usual_time_of_a_step_is_the_median(tmp_path):
    lines = [json.dumps({"step": i, "seconds": s}) for i, s in enumerate((1e-6, 2, 2, 60, 2), start=1)]
    assert history(tmp_path, "\n".join(lines)).usual_seconds == 2


def test_a_value_missing_from_a_line_is_not_a_number(tmp_path):
    found = history(tmp_path, '{"step": 1, "loss": null, "valid_loss": 3.5}\n{"step": 2, "loss": NaN}\n')
    assert math.isnan(found["loss"][0])
    assert math.isnan(found["loss"][1])
    assert found["valid_loss"][0] == 3.5
    assert math.isnan(found["valid_loss"][1])


def test_lines_that_are_no_records_are_left_out(tmp_path):
    found = history(tmp_path, '[1]\n{"step": "1"}\n{"step": true}\n{"loss": 1}\n{"step": 4}\n')
    assert found.steps.tolist() == [4]
    assert found.unreadable == 4

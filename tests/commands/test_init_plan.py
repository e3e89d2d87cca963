"""`lrpath init --slices` writes a plan from the available tokens, once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_lrpath.cli import main
from megatron_lrpath.data.first_plan import fitting, natural
from megatron_lrpath.plan import load_plan
from tests.support import GOLDEN
from tests.support.data_fixtures import make_lengths_dataset, make_slice


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with slices, a dataset and a tokenizer `t.model`.

    The slices are v9 and v10, of 60,000 and 120,000 tokens, and a validation slice.
    """
    monkeypatch.chdir(tmp_path)
    prefix = make_lengths_dataset(tmp_path / "data" / "text", [100] * 2000)
    for name, documents in (("v9", range(600)), ("v10", range(600, 1800)), ("valid", range(1800, 2000))):
        make_slice(tmp_path / "slices" / f"{name}.slice", [(prefix, documents, "text")])
    shutil.copy(GOLDEN / "sp.model", tmp_path / "t.model")
    return tmp_path


def test_the_plan_follows_from_the_slices(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["init", "--slices", "slices", "--tokenizer", "t.model"]
    assert main(argv) == 0
    plan = load_plan("plan.yaml")
    assert [version.name for version in plan.versions] == ["v9", "v10"]
    first, second = (version.steps for version in plan.versions)
    assert (second, plan.batch.seq_length) == (120_000 // 128 // plan.batch.global_batch_size, 128)
    assert first == 60_000 // 128 // plan.batch.global_batch_size >= 50
    assert plan.data.valid == "slices/valid"
    assert plan.paradigms == ("ours",)
    assert plan.megatron["save_retain_interval"] % plan.megatron["save_interval"] == 0 != first % 4
    said = capsys.readouterr().out
    assert [f"lrpath {name} plan.yaml" in said for name in ("plan", "run", "report")] == [True] * 3
    written = Path("plan.yaml").read_text()
    assert main(argv) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert Path("plan.yaml").read_text() == written


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["init"], "name a folder"),
        (["init", "--slices", "slices"], "--tokenizer"),
        (["init", "--slices", "none", "--tokenizer", "t.model"], "no such folder"),
        (["init", "--slices", "data", "--tokenizer", "t.model"], "holds no slice"),
        (["init", "--slices", "slices", "--tokenizer", "gone.model"], "gone.model: there is no such file"),
        (["init", "--slices", "slices", "--tokenizer", "t.model", "--model", "1.2b"], None),
    ],
)
def test_missing_parts_are_reported(
    work: Path, argv: list[str], said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == (2 if said else 0)
    assert (said or "") in capsys.readouterr().err
    assert Path("plan.yaml").exists() == (said is None)


def test_a_second_plan_is_named_after_its_folder_and_misses_its_validation(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "slices/valid.slice").unlink()
    assert main(["init", "second", "--slices", "slices", "--tokenizer", "t.model"]) == 0
    plan = load_plan("second/plan.yaml")
    assert (plan.name, plan.output) == ("second", "runs/second")
    assert "slices has no validation slice" in capsys.readouterr().err


def test_the_recipe_grows_with_the_tokens() -> None:
    assert [fitting(tokens) for tokens in (10**6, 5 * 10**9, 30 * 10**9)] == ["tiny", "203m", "1.2b"]
    assert sorted(["valid-v10", "v10", "valid-v9", "v9", "valid"], key=natural) == [
        "v9", "v10", "valid", "valid-v9", "valid-v10",
    ]  # fmt: skip

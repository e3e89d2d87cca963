"""`lrpath update`: new data become the next version of a plan, also after an interrupted call."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_lrpath.cli import main
from megatron_lrpath.commands import update
from megatron_lrpath.data.record import write_record
from megatron_lrpath.data.slice import Slice, available_samples, check_disjoint
from megatron_lrpath.plan import load_plan
from megatron_lrpath.tokenizers.prints import TokenizerSpec
from tests.support.data_fixtures import make_indexed_dataset
from tests.support.training_fixtures import VOCABULARY, make_plan

COMMENT = "# what the text of a version is worth\n"


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = make_plan(tmp_path, (40, 40))
    path.write_text(COMMENT + path.read_text())
    return path


def deliver(folder: Path, vocabulary: int = VOCABULARY, documents: int = 400) -> Path:
    """Make a new dataset of 25 tokens a document; return its prefix."""
    generator = np.random.default_rng(99)
    texts = [generator.integers(1, VOCABULARY, size=25).tolist() for _ in range(documents)]
    prefix = make_indexed_dataset(folder / "data" / f"new{vocabulary}", texts)
    write_record(prefix, "tests", TokenizerSpec("NullTokenizer", vocab_size=vocabulary).facts, {})
    return Path(prefix)


def call(plan: Path, prefix: Path, *options: str) -> int:
    return main(["update", str(plan), "--source", str(prefix), "--valid-share", "0.02", *options])


def test_a_delivery_becomes_the_next_version(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = deliver(plan.parent)
    before = plan.read_text()
    assert call(plan, prefix, "--dry-run") == 0
    assert plan.read_text() == before
    assert call(plan, prefix) == 0
    said = capsys.readouterr().out
    made = load_plan(plan)
    folder = Path(made.data.slices)
    version, valid = (Slice.load(folder / f"{name}.slice") for name in ("v3", "valid-v3"))
    check_disjoint([version, valid])
    assert version.documents + valid.documents == 400
    assert made.versions[-1].steps == available_samples(version, 16) // 4
    assert made.data.more_valid == (str(folder / "valid-v3"),)
    assert plan.read_text().startswith(COMMENT)
    assert "to train: " in said
    assert f"next: lrpath run {plan}" in said
    assert "alpha: 0.5; no advice" in said


@pytest.mark.parametrize("place", ["first slice", "slices", "plan"])
def test_a_call_after_an_interrupted_one_does_no_more_than_one(
    plan: Path, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = deliver(plan.parent)
    assert call(plan, prefix, "--tokens", "6000") == 0
    whole = plan.read_text()
    folder = Path(load_plan(plan).data.slices)
    contents = {path.name: path.read_bytes() for path in folder.glob("*.slice")}
    if place != "plan":
        keys = yaml.safe_load(whole)
        del keys["versions"][-1]
        keys["data"]["valid"] = keys["data"]["valid"][0]
        plan.write_text(COMMENT + yaml.safe_dump(keys, sort_keys=False))
    if place == "first slice":
        (folder / "v3.slice").unlink()
    assert call(plan, prefix, "--tokens", "6000") == 0
    assert load_plan(plan).versions == load_plan(plan).versions[:3]
    assert yaml.safe_load(plan.read_text()) == yaml.safe_load(whole)
    assert {path.name: path.read_bytes() for path in folder.glob("*.slice")} == contents
    assert call(plan, prefix, "--tokens", "2000", "--name", "v4") == 0
    assert [version.name for version in load_plan(plan).versions] == ["v1", "v2", "v3", "v4"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--name", "v1"], "is an earlier version"),
        (["--name", "v2"], "drawn from other data"),
        (["--tokens", "1e9"], "asked for"),
        (["--tokens", "50"], "less than a step"),
        (["--", "--log-interval", "5"], "go with --run or --submit"),
    ],
)
def test_unsuitable_options_are_refused_and_nothing_is_written(
    plan: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix, before = deliver(plan.parent), plan.read_text()
    there = sorted(plan.parent.rglob("*.slice"))
    assert call(plan, prefix, *options) == 2
    assert said in capsys.readouterr().err
    assert (plan.read_text(), sorted(plan.parent.rglob("*.slice"))) == (before, there)


def test_data_of_another_tokenizer_are_refused(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(plan, deliver(plan.parent, VOCABULARY + 5)) == 2
    assert "NullTokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "following"), [("v4", "v5"), ("v09", "v10"), ("2025-09", "2025-10"), ("v9", "v10")]
)
def test_the_next_name(name: str, following: str) -> None:
    assert update.following(name) == following


def test_a_replay_makes_the_steps_longer_and_is_not_dropped_silently(
    plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = deliver(plan.parent)
    assert call(plan, prefix, "--tokens", "1600", "--replay", "0.25") == 0
    made = load_plan(plan)
    version, available = made.versions[-1], Slice.load(Path(made.data.slices) / "v3.slice")
    assert version.replay is not None
    assert (
        version.new_samples(4 * version.steps)
        <= available_samples(available, 16)
        < version.new_samples(4 * (version.steps + 1))
    )
    assert version.steps > available_samples(available, 16) // 4
    assert ", 25% replayed" in capsys.readouterr().out
    assert call(plan, prefix, "--tokens", "1600", "--replay", "0.5") == 2
    assert "write its replay there" in capsys.readouterr().err
    assert call(plan, prefix, "--tokens", "1600", "--name", "v4") == 0
    assert "nothing replayed (v3: 25% replayed; see --replay)" in capsys.readouterr().out
    assert load_plan(plan).versions[-1].replay is None

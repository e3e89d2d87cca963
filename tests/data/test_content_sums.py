"""A dataset's content is compared with the sums in its record: some blocks at a start, all with --full."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from megatron_lrpath.data import content_sums
from megatron_lrpath.data.record import record_path, verify_content, write_record
from megatron_lrpath.data.slice import Slice, verify_slices
from megatron_lrpath.errors import UserError
from megatron_lrpath.sealed import read_sealed, write_sealed
from megatron_lrpath.tokenizers.prints import TokenizerSpec
from tests.support.data_fixtures import make_random_dataset, make_slice
from tests.support.flips import flip
from tools.check_slices import check_files

BLOCK = 512


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slice:
    """Return a slice of a dataset of 400,000 tokens, whose record has many blocks."""
    monkeypatch.setattr(content_sums, "SMALLEST_BLOCK", BLOCK)
    prefix = make_random_dataset(tmp_path / "a", [1000] * 400)
    write_record(prefix, "tests", TokenizerSpec("NullTokenizer", vocab_size=65000).facts, {})
    return make_slice(tmp_path / "v1.slice", [(prefix, range(400), "prose")])


def data(one: Slice) -> Path:
    return Path(f"{one.sources[0].prefix}.bin")


def test_what_was_written_is_accepted(one: Slice) -> None:
    assert verify_content([one]) == []
    assert verify_content([one], whole=True) == []
    assert check_files([one.path or Path()], full=True).failures == []


def test_the_full_check_finds_every_flip(one: Slice) -> None:
    """This includes flips between the blocks of the fingerprint, where a start's samples may miss them."""
    path, generator = data(one), random.Random(3)
    unseen = 0
    for _ in range(60):
        byte, bit = generator.randrange(path.stat().st_size), generator.randrange(8)
        flip(path, byte, bit)
        failures = check_files([one.path or Path()], full=True).failures
        assert any("are not what was written" in failure and str(path) in failure for failure in failures)
        try:
            verify_slices([one])
            unseen += 1
        except UserError:
            pass
        flip(path, byte, bit)
    assert unseen > 10


def test_a_start_compares_other_blocks_each_time(one: Slice) -> None:
    path = data(one)
    flip(path, path.stat().st_size // 2 + 5 * BLOCK, 0)
    found = 0
    for _ in range(50_000):
        try:
            verify_content([one])
        except UserError as error:
            found += "are not what was written" in str(error)
            if found == 2:
                return
    pytest.fail("never found")


def test_a_file_of_another_time_is_looked_at_more_closely(one: Slice) -> None:
    sums = content_sums.content_sums(data(one))
    assert len(content_sums.sampled(data(one), sums)) == content_sums.AT_A_START
    os.utime(data(one), times=(1, 1))
    assert len(content_sums.sampled(data(one), sums)) == content_sums.AT_A_START_IF_NEWER
    assert verify_content([one]) == []  # a copy is no damage


def test_another_size_is_refused(one: Slice) -> None:
    with data(one).open("ab") as stream:
        stream.write(b"\0\0")
    with pytest.raises(UserError, match="bytes instead of"):
        verify_content([one])


def test_a_record_of_before_is_accepted_and_named(one: Slice, capsys: pytest.CaptureFixture[str]) -> None:
    path = record_path(one.sources[0].prefix)
    record, _ = read_sealed(path)
    del record[content_sums.KEY]
    write_sealed(path, record)
    flip(data(one), 1000 * BLOCK + 5000, 0)
    assert verify_content([one]) == [one.sources[0].prefix]
    check_files([one.path or Path()], full=True)
    assert "without checksums of the content" in capsys.readouterr().err


@pytest.mark.parametrize(
    "sums",
    [
        [],
        {},
        {"bytes": 10, "mtime_ns": 0, "block": 0, "xxh3_64": []},
        {"bytes": 10, "mtime_ns": 0, "block": 4, "xxh3_64": ["0"]},
        {"bytes": -1, "mtime_ns": 0, "block": 4, "xxh3_64": []},
        {"bytes": 10, "mtime_ns": 0, "block": True, "xxh3_64": ["0"] * 10},
    ],
)
def test_sums_of_another_form_are_refused(one: Slice, sums: object) -> None:
    path = record_path(one.sources[0].prefix)
    record, _ = read_sealed(path)
    write_sealed(path, record | {content_sums.KEY: sums})
    with pytest.raises(UserError, match="cannot be read"):
        verify_content([one])

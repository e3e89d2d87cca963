"""Output has the same bytes as that of Megatron-LM core_v0.19.0's tool, stored by tests/golden/make.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.make import CASES
from tests.support.preprocess_fixtures import GOLDEN, call, pair, preprocess

EXTRA = {"sp-lists": ["--sentence-lists"], "hf-specials": ["--parse-special-tokens"]}


def run_case(name: str, folder: Path, *more: str) -> dict[str, tuple[bytes, bytes]]:
    """Run a golden case; return the pairs it wrote, by the ends of their names."""
    source, arguments = CASES[name]
    model = {"sp.model", "nfkc.model", "hf"}
    arguments = [str(GOLDEN / word) if word in model else word for word in arguments]
    assert preprocess(GOLDEN / source, folder / name, *arguments, *EXTRA.get(name, []), *more) == 0
    return {path.stem: pair(path.with_suffix("")) for path in folder.glob("*.idx")}


def stored(name: str) -> dict[str, tuple[bytes, bytes]]:
    """Return the pairs that upstream wrote."""
    found = (GOLDEN / "pairs").glob(f"{name}_*.idx")
    return {path.stem: pair(path.with_suffix("")) for path in found}


@pytest.mark.parametrize("name", sorted(CASES))
def test_output_is_byte_identical_to_megatron_lm(name: str, tmp_path: Path) -> None:
    expected = stored(name)
    assert expected
    assert run_case(name, tmp_path) == expected


@pytest.mark.parametrize("name", ["sp", "nfkc", "hf"])
def test_the_exact_tokenizer_writes_the_same(name: str, tmp_path: Path) -> None:
    assert run_case(name, tmp_path, "--exact-tokenizer") == stored(name)


@pytest.mark.parametrize("name", ["sp", "sp-keys", "sp-parts", "null"])
def test_the_number_of_workers_changes_nothing(name: str, tmp_path: Path) -> None:
    assert run_case(name, tmp_path, "--workers", "3") == stored(name)


def test_as_a_command_from_another_folder(tmp_path: Path) -> None:
    source, arguments = CASES["sp"]
    model = [str(GOLDEN / word) if word == "sp.model" else word for word in arguments]
    answer = call(
        "preprocess_data", "--input", GOLDEN / source, "--workers", 2, *model, "--output-prefix", "sp",
        cwd=tmp_path,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert pair(tmp_path / "sp_text_document") == stored("sp")["sp_text_document"]
    assert "47 documents" in answer.stderr
    assert "bytes per token" in answer.stderr
    assert "MB/s" in answer.stderr


def test_keep_sequential_samples_keeps_the_order(tmp_path: Path) -> None:
    more = ["--partitions", "2", "--workers", "2", "--keep-sequential-samples"]
    assert run_case("sp", tmp_path, *more) == stored("sp")

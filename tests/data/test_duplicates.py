"""Duplicate texts: hashes of documents, the repeats in a delivery, and draws that leave them out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lrpath.cli import main as lrpath
from megatron_lrpath.data.document_hashes import DTYPE, hash_documents
from megatron_lrpath.data.duplicates import FIRST_COPY, IN_VALIDATION, IN_VERSION, LATER_COPY, find_duplicates
from megatron_lrpath.data.duplicates import NewDocuments as New
from megatron_lrpath.data.indexed import fingerprint_source
from megatron_lrpath.data.record import recorded_hashes
from megatron_lrpath.data.slice import Slice, SliceSource
from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import load_plan
from tests.support.data_fixtures import make_indexed_dataset
from tests.support.preprocess_fixtures import NULL, documents, preprocess, write_lines
from tests.support.training_fixtures import VOCABULARY, make_plan
from tools import check_dataset, merge_datasets, slice_versions

RECORD = ["--vocab-size", str(VOCABULARY), "--record"]


def dataset(prefix: Path, texts: list[list[int]], hashed: bool = True) -> Path:
    """Write an indexed dataset as Megatron's own tool does; record it with hashes; return its prefix."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    make_indexed_dataset(prefix, texts)
    if hashed:
        assert check_dataset.main([str(prefix), *RECORD]) == 0
    return prefix


def texts_of(count: int, seed: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(1, VOCABULARY - 1, size=25).tolist() for _ in range(count)]


def draw(*argv: Any) -> int:
    return slice_versions.slice_versions(
        slice_versions.build_parser().parse_args([str(word) for word in argv])
    )


def drawn_texts(one: Slice) -> list[tuple[int, ...]]:
    """Return the texts of a slice's documents."""
    return [tuple(documents(source.prefix)[number]) for source in one.sources for number in source.documents]


def hashes(prefix: Path) -> list[int]:
    found = recorded_hashes(prefix, fingerprint_source(prefix))
    assert found is not None
    found.verify()
    return [int(one) for _, block in found.blocks(3) for one in block]


def test_every_tool_writes_the_hash_of_the_text_alone(tmp_path: Path) -> None:
    """The type of the ids, an end-of-document token, partitions and a merge do not change it."""
    texts = ["1 2 3", "4 5", "1 2 3", "7"]
    lines = write_lines(tmp_path / "texts.jsonl", texts)
    expected = hash_documents(np.array([1, 2, 3, 4, 5, 1, 2, 3, 7]), np.array([3, 2, 3, 1]), None).tolist()
    assert expected[0] == expected[2]
    assert len(set(expected)) == 3
    assert preprocess(lines, tmp_path / "plain", *NULL) == 0
    assert preprocess(lines, tmp_path / "ended", "--append-eod", *NULL) == 0
    wide = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100000", "--null-tokenizer-eod-id", "999"]
    assert preprocess(lines, tmp_path / "wide", "--append-eod", *wide) == 0
    for name in ("plain", "ended", "wide"):
        assert hashes(tmp_path / f"{name}_text_document") == expected
    assert preprocess(lines, tmp_path / "parts", "--partitions", "2", *NULL) == 0
    assert hashes(tmp_path / "parts_text_document") == [expected[0], expected[2], expected[1], expected[3]]
    both = [str(tmp_path / f"{name}_text_document") for name in ("plain", "parts")]
    assert merge_datasets.main(["--input", *both, "--output-prefix", str(tmp_path / "all")]) == 0
    assert hashes(tmp_path / "all") == hashes(Path(both[0])) + hashes(Path(both[1]))
    (tmp_path / "plain_text_document.tokens.json").unlink()
    foreign = str(tmp_path / "plain_text_document")
    (tmp_path / "plain_text_document.hashes").write_bytes(b"of another dataset")
    options = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "1000", "--record"]
    assert check_dataset.main([foreign, *options]) == 0
    assert hashes(Path(foreign)) == expected


def test_a_comparison_finds_what_sets_of_texts_find(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    old = dataset(tmp_path / "old", [[int(n), 1, 2] for n in generator.integers(3, 90, 200)])
    new = [
        dataset(tmp_path / f"new{number}", [[int(n), 1, 2] for n in generator.integers(3, 119, 100)])
        for number in range(2)
    ]
    names = ("v1", "v2", "valid")
    chosen = dict(zip(names, np.split(np.arange(200, dtype=np.int32), [80, 150]), strict=True))
    earlier = [
        Slice(name, 1, (SliceSource(old, fingerprint_source(old), "d", chosen[name], 3),)) for name in names
    ]
    free = [np.arange(100) % 7 != 0, np.ones(100, dtype=bool)]
    wanted = [New(one, fingerprint_source(one), mask) for one, mask in zip(new, free, strict=True)]
    found = find_duplicates(wanted, earlier, ["valid"], block=16)
    before = {name: {documents(old)[number][0] for number in chosen[name]} for name in names}
    texts = [
        documents(one)[number][0]
        for one, mask in zip(new, free, strict=True)
        for number in np.flatnonzero(mask)
    ]
    flags = np.concatenate([found.flags[one.fingerprint][one.free] for one in wanted])
    count, seen = Counter(texts), set()
    for text, flag in zip(texts, flags.tolist(), strict=True):
        assert bool(flag & IN_VERSION) == (text in before["v1"] | before["v2"])
        assert bool(flag & IN_VALIDATION) == (text in before["valid"])
        assert bool(flag & LATER_COPY) == (text in seen)
        assert bool(flag & FIRST_COPY) == (text not in seen and count[text] > 1)
        seen.add(text)
    assert found.by_slice == {name: sum(text in before[name] for text in texts) for name in names}
    assert all(not found.flags[one.fingerprint][~one.free].any() for one in wanted)


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """Return a folder with v1 and valid, drawn from 100 documents.

    There is a delivery of 60 documents that repeats 20 of them and 10 of its own.
    """
    old = texts_of(100, 1)
    dataset(tmp_path / "old", old)
    folder = tmp_path / "slices"
    assert (
        draw(
            "--source",
            tmp_path / "old",
            "--tokens-per-version",
            2000,
            "--valid-tokens",
            500,
            "--output",
            folder,
        )
        == 0
    )
    own = texts_of(30, 2)
    dataset(tmp_path / "new", [*own, *old[:20], *own[:10]])
    return folder


def test_a_draw_names_duplicates_and_keeps_them_out_of_validation(
    drawn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--source", drawn.parent / "new", "--output", drawn]
    old = {name: set(drawn_texts(Slice.load(drawn / f"{name}.slice"))) for name in ("v1", "valid")}
    new = {tuple(text) for text in documents(drawn.parent / "new")}
    capsys.readouterr()
    options = ["--tokens-per-version", 200, "--valid-tokens", 450]
    with pytest.raises(UserError, match="exists already"):
        draw(*more, *options, "--names", "v1")
    assert draw(*more, "--names", "b", "--tokens-per-version", 1500, "--json") == 0
    said = capsys.readouterr()
    counts = json.loads(said.out)["duplicates"]
    assert counts["by_slice"] == {name: len(new & texts) for name, texts in old.items()}
    assert counts["repeats"] == 30
    assert f"{len(new & old['valid'])} in validation set valid" in said.err
    assert "10 repeat another document of this delivery" in said.err
    (drawn / "b.slice").unlink()
    (drawn / "valid.slice").rename(drawn.parent / "valid.slice")
    assert draw(*more, "--names", "b", *options) == 0
    held = drawn_texts(Slice.load(drawn / "valid.slice"))
    own = Counter(tuple(text) for text in documents(drawn.parent / "new"))
    assert len(held) == 18
    assert all(own[text] == 1 and text not in old["v1"] for text in held)


def test_duplicates_are_left_out_where_that_is_asked(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--source", drawn.parent / "new", "--output", drawn, "--append", "--drop-duplicates"]
    assert draw(*more) == 0
    assert "left out (--drop-duplicates)" in capsys.readouterr().err
    one = Slice.load(drawn / "v2.slice")
    assert sorted(drawn_texts(one)) == sorted(map(tuple, documents(drawn.parent / "new")[:30]))
    (drawn / "v2.slice").unlink()
    assert (
        draw("--documents", f"v2={drawn.parent / 'new'}:20-45", "--output", drawn, "--drop-duplicates") == 0
    )
    assert drawn_texts(Slice.load(drawn / "v2.slice")) == [
        tuple(t) for t in documents(drawn.parent / "new")[20:30]
    ]


def test_without_hashes_nothing_is_left_out_silently(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset(drawn.parent / "bare", texts_of(20, 3), hashed=False)
    more = ["--source", drawn.parent / "bare", "--output", drawn, "--append"]
    with pytest.raises(UserError, match=r"bare: no hashes .* tools/check_dataset.py"):
        draw(*more, "--drop-duplicates")
    assert draw(*more) == 0
    assert "bare: no hashes of the documents, so not compared" in capsys.readouterr().err
    assert check_dataset.main([str(drawn.parent / "bare"), *RECORD]) == 0
    (drawn / "v2.slice").unlink()
    assert draw(*more, "--drop-duplicates") == 0
    path = drawn.parent / "old.hashes"
    data = bytearray(path.read_bytes())
    data[DTYPE.itemsize * 3] ^= 1
    path.write_bytes(data)
    (drawn / "v2.slice").unlink()
    with pytest.raises(UserError, match=r"old.hashes: does not hold the hashes .* --record"):
        draw(*more)


def test_an_update_leaves_out_what_earlier_versions_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_plan(tmp_path, (40,))
    plan = load_plan(path)
    sources = Slice.load(Path(plan.data.slices) / "v1.slice").sources
    prefix = sources[0].prefix
    assert check_dataset.main([str(prefix), *RECORD]) == 0
    for one in (*sources[1:], *Slice.load(Path(plan.data.slices) / "valid.slice").sources):
        assert check_dataset.main([str(one.prefix), *RECORD]) == 0
    repeated = [documents(prefix)[number] for number in sources[0].documents[:50]]
    new = dataset(tmp_path / "data/new", [*texts_of(400, 9), *repeated])
    argv = ["update", str(path), "--source", str(new), "--valid-share", "0.02"]
    capsys.readouterr()
    assert lrpath([*argv, "--dry-run"]) == 0
    assert "duplicates: 50 of 450 documents (11.1%): 50 in v1; kept out of new" in capsys.readouterr().out
    argv.append("--drop-duplicates")
    assert lrpath(argv) == 0
    folder = Path(plan.data.slices)
    both = [Slice.load(folder / f"{name}.slice") for name in ("v2", "valid-v2")]
    assert sum(one.documents for one in both) == 400
    before = path.read_text()
    capsys.readouterr()
    assert lrpath(argv) == 0
    assert path.read_text() == before
    assert "v2: is in the plan already" in capsys.readouterr().out

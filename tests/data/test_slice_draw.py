"""Draws of versions: disjoint, complete, in proportion, unchanged when more is drawn, or refused."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lrpath.data.draw import Drawn, ShortageError, draw, existing_slices, write_slices
from megatron_lrpath.data.draw_request import (
    DrawRequest,
    RangeRequest,
    SourceRequest,
    parse_range,
    parse_source,
    parse_tokens,
    version_requests,
)
from megatron_lrpath.data.indexed import document_lengths
from megatron_lrpath.data.slice import Slice, available_samples, check_disjoint
from megatron_lrpath.errors import UserError
from tests.support.data_fixtures import make_lengths_dataset

LENGTHS = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=60), min_size=1, max_size=4)
LENGTHS = LENGTHS.filter(lambda sources: all(sum(lengths) for lengths in sources))


@contextmanager
def datasets(lengths: Sequence[Sequence[int]]) -> Iterator[list[Path]]:
    """Yield datasets with documents of these lengths, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        yield [
            make_lengths_dataset(Path(folder) / f"data/source{number}", sizes, mark=number + 1)
            for number, sizes in enumerate(lengths)
        ]


def request(
    prefixes: Sequence[Path],
    tokens: Sequence[int | None],
    weights: Sequence[Fraction | None] | None = None,
    valid: int | None = None,
    seed: int = 1,
    first: int = 1,
    **options: int,
) -> DrawRequest:
    """Return a request for versions v<first>, …, of these tokens."""
    weights = weights or [None] * len(prefixes)
    return DrawRequest(
        sources=tuple(SourceRequest(p, w, p.name) for p, w in zip(prefixes, weights, strict=True)),
        versions=tuple((f"v{first + i}", amount) for i, amount in enumerate(tokens)),
        valid_tokens=valid,
        ranges=(),
        seed=seed,
        **options,
    )


def chosen(drawn: Drawn | Sequence[Slice]) -> dict[str, dict[str, list[int]]]:
    """Return the documents of every slice, by name and source."""
    slices = drawn.slices if isinstance(drawn, Drawn) else drawn
    return {one.name: {s.prefix.name: s.documents.tolist() for s in one.sources} for one in slices}


def drawn_if_there_is_enough(wanted: DrawRequest, existing: Sequence[Slice]) -> Drawn | None:
    """Return the draw, or None if there are too few documents."""
    try:
        return draw(wanted, existing)
    except ShortageError:
        return None
    except UserError as error:
        if any(
            reason in str(error)
            for reason in ("nothing is left", "nothing to draw", "too few tokens were asked")
        ):
            return None
        raise


@given(LENGTHS, st.data())
@settings(max_examples=60, deadline=None)
def test_versions_are_disjoint_and_in_proportion_to_within_one_document(
    lengths: list[list[int]], data: st.DataObject
) -> None:
    total = sum(map(sum, lengths))
    count = data.draw(st.integers(1, 4))
    wanted = data.draw(st.integers(1, max(total // (count + 1), 1)))
    with datasets(lengths) as prefixes:
        drawn = drawn_if_there_is_enough(request(prefixes, [wanted] * count, valid=wanted), [])
        if drawn is None:
            return
        check_disjoint(drawn.slices)
        for one in drawn.slices:
            for number, (prefix, sizes) in enumerate(zip(prefixes, lengths, strict=True)):
                exact = Fraction(wanted * sum(sizes), total)
                mine = [source for source in one.sources if source.prefix == prefix]
                got = mine[0].tokens if mine else 0
                assert abs(got - exact) <= max(sizes) + 1, number
                assert got == sum(sizes[d] for d in (mine[0].documents.tolist() if mine else []))


@given(LENGTHS, st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_everything_that_is_new_is_everything(lengths: list[list[int]], seed: int) -> None:
    with datasets(lengths) as prefixes:
        drawn = drawn_if_there_is_enough(request(prefixes, [sum(map(sum, lengths)) // 3 + 1], seed=seed), [])
        first = drawn.slices if drawn else []
        rest = drawn_if_there_is_enough(request(prefixes, [None], seed=seed, first=2), first)
        if rest is None:
            return
        taken = chosen([*first, *rest.slices])
        for prefix, sizes in zip(prefixes, lengths, strict=True):
            held = sorted(d for one in taken.values() for d in one.get(prefix.name, []))
            assert held == [number for number, size in enumerate(sizes) if size]
        assert set(rest.left.values()) == {0}


@given(st.lists(st.integers(1, 30), min_size=30, max_size=80), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_more_versions_leave_the_first_ones_alone_and_appending_continues_at_their_end(
    lengths: list[int], seed: int
) -> None:
    wanted = sum(lengths) // 8
    with datasets([lengths, lengths[::-1]]) as prefixes:
        weights = [Fraction(2), Fraction(1)]
        all_at_once = draw(request(prefixes, [wanted] * 4, weights, seed=seed, valid=wanted), []).slices
        fewer = draw(request(prefixes, [wanted] * 2, weights, seed=seed, valid=wanted), []).slices
        assert chosen(fewer) == chosen(all_at_once[:3])
        later = draw(request(prefixes, [wanted] * 2, weights, seed=seed, first=3), fewer).slices
        assert chosen(later) == chosen(all_at_once[3:])


def test_what_is_there_can_be_used_up_to_the_last_token(tmp_path: Path) -> None:
    rng = np.random.RandomState(3)
    prefixes = [make_lengths_dataset(tmp_path / f"s{i}", rng.randint(1, 99, 200), i + 1) for i in range(3)]
    total = sum(int(document_lengths(p).sum()) for p in prefixes)
    drawn = draw(request(prefixes, [total // 4] * 4), [])
    assert sum(one.tokens for one in drawn.slices) >= total // 4 * 4 - 3
    assert all(abs(one.tokens - total / 4) < 3 * 99 for one in drawn.slices)
    with pytest.raises(ShortageError):
        draw(request(prefixes, [total // 4 + 1] * 4), [])


def test_a_version_has_what_was_asked_for_where_there_is_enough(tmp_path: Path) -> None:
    rng = np.random.RandomState(3)
    prefixes = [make_lengths_dataset(tmp_path / f"s{i}", rng.randint(1, 99, 200), i + 1) for i in range(3)]
    weights = [Fraction("0.5"), Fraction("0.3"), Fraction("0.2")]
    for one in draw(request(prefixes, [3000, 1000, 2000], weights), []).slices:
        wanted = {"v1": 3000, "v2": 1000, "v3": 2000}[one.name]
        assert wanted <= one.tokens < wanted + 3 * 99
        for source, weight in zip(one.sources, weights, strict=True):
            assert wanted * weight <= source.tokens < wanted * weight + 99


def test_with_a_sequence_length_the_samples_are_all_there(tmp_path: Path) -> None:
    rng = np.random.RandomState(3)
    prefixes = [make_lengths_dataset(tmp_path / f"s{i}", rng.randint(1, 9, 3000), i + 1) for i in range(5)]
    without = draw(request(prefixes, [64 * 100]), []).slices[0]
    (with_length,) = draw(request(prefixes, [64 * 100], seq_length=64), []).slices
    assert available_samples(without, 64) < 100 <= available_samples(with_length, 64)


def test_the_draw_is_random_and_decided_by_the_seed_and_the_data_alone(tmp_path: Path) -> None:
    prefix = make_lengths_dataset(tmp_path / "a/one", [10] * 100)
    one, same, other = (draw(request([prefix], [200], seed=seed), []).slices for seed in (1, 1, 2))
    assert chosen(one) == chosen(same) != chosen(other)
    documents = chosen(one)["v1"]["one"]
    assert max(documents) - min(documents) > 30
    moved = make_lengths_dataset(tmp_path / "b/else", [10] * 100)
    assert chosen(draw(request([moved], [200], seed=1), []))["v1"]["else"] == documents


def test_too_many_tokens_are_refused_with_a_row_for_every_source(tmp_path: Path) -> None:
    web = make_lengths_dataset(tmp_path / "web", [10] * 100, 1)
    books = make_lengths_dataset(tmp_path / "books", [10] * 10, 2)
    with pytest.raises(
        ShortageError, match=r"asked for 400 tokens, and 1,100.*books \(100 tokens\)"
    ) as caught:
        draw(request([web, books], [400], [Fraction(1), Fraction(1)]), [])
    assert [(row.domain, row.asked, row.free_tokens) for row in caught.value.table] == [
        ("web", 200, 1000),
        ("books", 200, 100),
    ]


def test_existing_slices_are_never_drawn_from_changed_or_overwritten(tmp_path: Path) -> None:
    prefix = make_lengths_dataset(tmp_path / "data/d", [10] * 100)
    folder = tmp_path / "slices"
    write_slices(draw(request([prefix], [300, 300]), []).slices, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"v1\.slice: exists already"):
        draw(request([prefix], [100]), existing_slices(folder))
    write_slices(draw(request([prefix], [300], seed=99, first=3), existing_slices(folder)).slices, folder)
    check_disjoint(existing_slices(folder))
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert len(existing_slices(folder)) == 3
    with pytest.raises(UserError, match="exists already"):
        write_slices(existing_slices(folder), folder)


def test_a_dataset_given_twice_or_copied_is_refused(tmp_path: Path) -> None:
    one = make_lengths_dataset(tmp_path / "one", [10] * 5)
    copy = make_lengths_dataset(tmp_path / "copy", [10] * 5)
    for other in (one, copy, tmp_path / "sub/../one"):
        (tmp_path / "sub").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="one and the same dataset"):
            draw(request([one, other], [10]), [])


def test_a_dataset_that_changed_since_it_was_drawn_from_is_refused(tmp_path: Path) -> None:
    prefix = make_lengths_dataset(tmp_path / "d", [10] * 5)
    made = draw(request([prefix], [20]), []).slices
    make_lengths_dataset(tmp_path / "d", [10] * 6)
    with pytest.raises(UserError, match="has changed since v1 was drawn"):
        draw(request([prefix], [20], first=2), made)


def test_named_documents_make_a_version_and_are_kept_out_of_the_others(tmp_path: Path) -> None:
    prefix = make_lengths_dataset(tmp_path / "d", [10, 0, *[10] * 98])
    base = request([prefix], [None])
    ranges = (RangeRequest("v9", prefix, 90, None), RangeRequest("v9", prefix, 0, 5))
    made = draw(DrawRequest(base.sources, base.versions, None, ranges, 1), [])
    assert chosen(made)["v9"]["d"] == [0, 2, 3, 4, *range(90, 100)]
    assert chosen(made)["v1"]["d"] == list(range(5, 90))
    assert [one.seed for one in made.slices] == [1, None]


@pytest.mark.parametrize(
    ("first", "end", "message"),
    [(3, 200, "has 100 documents"), (0, 50, "are in a slice already"), (40, 45, "are in a slice already")],
)
def test_named_documents_that_are_taken_or_not_there_are_refused(
    tmp_path: Path, first: int, end: int, message: str
) -> None:
    prefix = make_lengths_dataset(tmp_path / "d", [10] * 100)
    made = draw(DrawRequest((), (), None, (RangeRequest("v1", prefix, 40, 60),), 1), []).slices
    with pytest.raises(UserError, match=message):
        draw(DrawRequest((), (), None, (RangeRequest("v2", prefix, first, end),), 1), made)


def test_an_exhausted_supply_is_reported(tmp_path: Path) -> None:
    prefix = make_lengths_dataset(tmp_path / "d", [10] * 10)
    made = draw(request([prefix], [None]), []).slices
    with pytest.raises(UserError, match="every document is in a slice already"):
        draw(request([prefix], [None], first=2), made)


@pytest.mark.parametrize(
    ("text", "prefix", "weight", "domain"),
    [
        ("data/web_text_document", "data/web_text_document", None, "web"),
        ("data/web:0.25", "data/web", "0.25", "web"),
        ("data/web:2:code", "data/web", "2", "code"),
        ("data/web::code", "data/web", None, "code"),
        ("data/web:1:2024", "data/web", "1", "2024"),
        ("data/a:b:3", "data/a:b", "3", "a:b"),
        ("data/a:b:3:x", "data/a:b", "3", "x"),
        ("data/web.bin:1/3", "data/web", "1/3", "web"),
        ("there:7", "there:7", None, "there:7"),
        ("there:7:2", "there:7", "2", "there:7"),
    ],
)
def test_sources_are_read_from_the_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, prefix: str, weight: str | None, domain: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there:7.idx").touch()
    assert parse_source(text) == SourceRequest(Path(prefix), Fraction(weight) if weight else None, domain)


def test_ranges_are_read() -> None:
    assert parse_range("v2=data/a:b:100-2000") == RangeRequest("v2", Path("data/a:b"), 100, 2000)
    assert parse_range("v2=data/a:7-") == RangeRequest("v2", Path("data/a"), 7, None)
    for wrong in ("v2:data/a:1-2", "v2=data/a", "v2=data/a:5-5", "v2=data/a:-5"):
        with pytest.raises(UserError, match="--documents"):
            parse_range(wrong)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("10.5e9", 10_500_000_000), ("10.5B", 10_500_000_000), ("1_000", 1000), ("2k", 2000), ("1e3", 1000)],
)
def test_token_counts_are_read(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "-5", "1.5", "ten", "1e", "nan", "1.2.3", "5Q"])
def test_what_is_no_token_count_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not a number of tokens"):
        parse_tokens(text)


def test_names_continue_after_the_existing_versions() -> None:
    assert version_requests(["5"], 2, None, [], False) == (("v1", 5), ("v2", 5))
    assert version_requests(["5", "6"], None, None, [], False) == (("v1", 5), ("v2", 6))
    assert version_requests(["5"], None, None, ["valid", "v1", "v2"], True) == (("v3", 5),)
    assert version_requests([], None, None, ["valid", "spring", "v7"], True) == (("v8", None),)
    assert version_requests(["5"], None, None, ["valid", "valid-v1", "valid-v2", "v1", "v2"], True) == (
        ("v3", 5),
    )
    assert version_requests([], 2, ["a", "b"], [], True) == (("a", None), ("b", None))
    for tokens, count, names in ((["1", "2"], 3, None), (["1"], 2, ["a"]), ([], 2, None), (["1"], 0, None)):
        with pytest.raises(UserError, match=r"--tokens-per-version|--names"):
            version_requests(tokens, count, names, [], False)


@pytest.mark.parametrize("name", ["../v1", "a b", "", ".v", "a/b"])
def test_names_that_are_no_file_names_are_refused(tmp_path: Path, name: str) -> None:
    prefix = make_lengths_dataset(tmp_path / "d", [10] * 10)
    with pytest.raises(UserError, match="cannot be a slice's name"):
        draw(DrawRequest((SourceRequest(prefix, None, "d"),), ((name, 10),), None, (), 1), [])


def test_a_draw_of_no_token_is_not_an_exhausted_supply(tmp_path: Path) -> None:
    prefix = make_lengths_dataset(tmp_path / "d", [10] * 10)
    with pytest.raises(UserError, match="too few tokens were asked for"):
        draw(DrawRequest((SourceRequest(prefix, None, "d"),), (("v1", 0),), None, (), 1), [])


def test_names_that_differ_in_case_alone_are_refused(tmp_path: Path) -> None:
    prefix = make_lengths_dataset(tmp_path / "d", [10] * 40)

    def request(*names: str) -> DrawRequest:
        versions = tuple((name, 10) for name in names)
        return DrawRequest((SourceRequest(prefix, None, "d"),), versions, None, (), 1)

    with pytest.raises(UserError, match="asked for twice"):
        draw(request("v1", "V1"), [])
    with pytest.raises(UserError, match="v1: exists already"):
        draw(request("V1"), draw(request("v1"), []).slices)

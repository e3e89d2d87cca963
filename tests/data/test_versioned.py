"""Versioned datasets: which tokens a sample has, no token twice, no change of earlier samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType

from megatron_lrpath.data import versioned_index
from megatron_lrpath.data.preprocess.writer import optimal_dtype
from megatron_lrpath.data.slice import Slice, available_samples
from megatron_lrpath.data.versioned import build_chained, build_shuffled, build_validation
from megatron_lrpath.data.versioned_index import interleave, sample_bounds
from megatron_lrpath.errors import UserError
from tests.support.data_fixtures import (
    StubTokenizer,
    dataset_config,
    make_indexed_dataset,
    make_random_dataset,
    make_slice,
)

SEQ = 16
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> list[Slice]:
    """Return v1, v2, v3 and valid, of two sources whose tokens are all different (ids 1 to 24,000)."""
    folder = tmp_path_factory.mktemp("data")
    lengths = np.random.RandomState(0).randint(1, 60, size=400)
    web = make_random_dataset(folder / "web", lengths.tolist())
    books = make_random_dataset(folder / "books", lengths[:200].tolist(), first=1 + int(lengths.sum()))
    return [
        make_slice(
            folder / f"slices/{name}.slice",
            [(web, range(i, 400, 4), "web"), (books, range(i, 200, 4), "books")],
        )
        for i, name in enumerate(["v1", "v2", "v3", "valid"])
    ]


def rows(dataset: Any, positions: Sequence[int] | None = None) -> list[tuple[int, ...]]:
    """Return each sample's seq_length + 1 tokens: its input, then its last label."""
    found = []
    for position in range(len(dataset)) if positions is None else positions:
        item = dataset[position]
        assert torch.equal(item["tokens"][1:], item["labels"][:-1])
        found.append((*item["tokens"].tolist(), int(item["labels"][-1])))
    return found


def labels(samples: Sequence[tuple[int, ...]]) -> list[int]:
    """Return all tokens that are predicted."""
    return [token for sample in samples for token in sample[1:]]


def test_items_are_what_megatron_expects(slices: list[Slice], tmp_path: Path) -> None:
    dataset = build_chained(slices[:1], [8], dataset_config(SEQ, tmp_path, create_attention_mask=True), 7)
    item = dataset[3]
    assert {name: (tuple(value.shape), value.dtype) for name, value in item.items()} == {
        "tokens": ((SEQ,), torch.int64),
        "labels": ((SEQ,), torch.int64),
        "loss_mask": ((SEQ,), torch.float32),
        "position_ids": ((SEQ,), torch.int64),
        "attention_mask": ((1, SEQ, SEQ), torch.bool),
    }
    assert item["loss_mask"].tolist() == [1.0] * SEQ
    assert dataset.index_split.name == "train"
    assert dataset[None]["loss_mask"].tolist() == [0.0] * SEQ
    with pytest.raises(IndexError):
        dataset[8]


def test_no_token_is_predicted_twice_and_every_version_keeps_to_its_documents(
    slices: list[Slice], tmp_path: Path
) -> None:
    counts = [available_samples(one, SEQ) for one in slices[:3]]
    dataset = build_chained(slices[:3], counts, dataset_config(SEQ, tmp_path), 7)
    assert len(dataset) == sum(counts)
    predicted = labels(rows(dataset))
    assert len(set(predicted)) == len(predicted) == sum(counts) * SEQ
    for position in range(len(dataset)):
        name = dataset.version_of(position)
        place = next(i for i, one in enumerate(slices) if one.name == name)
        assert all(where.document % 4 == place for where in dataset.locate(position))


def test_versions_follow_each_other(slices: list[Slice], tmp_path: Path) -> None:
    dataset = build_chained(slices[:3], [20, 30, 10], dataset_config(SEQ, tmp_path), 7)
    assert [dataset.version_of(i) for i in range(60)] == ["v1"] * 20 + ["v2"] * 30 + ["v3"] * 10


def test_an_appended_version_and_a_longer_one_change_nothing_before(
    slices: list[Slice], tmp_path: Path
) -> None:
    config = dataset_config(SEQ, tmp_path)
    alone = rows(build_chained(slices[:1], [40], config, 7))
    both = rows(build_chained(slices[:2], [40, 50], config, 7))
    longer = rows(build_chained(slices[:3], [40, 60, 5], config, 7))
    assert both[:40] == alone
    assert longer[:90] == both
    assert rows(build_chained(slices[:1], [90], config, 7))[:40] == alone


def test_another_seed_is_another_order_and_the_order_is_shuffled(slices: list[Slice], tmp_path: Path) -> None:
    config = dataset_config(SEQ, tmp_path)
    one, other = (rows(build_chained(slices[:1], [100], config, seed)) for seed in (7, 8))
    assert one != other
    assert one != sorted(one)


def test_from_scratch_trains_on_the_same_samples_in_another_order(
    slices: list[Slice], tmp_path: Path
) -> None:
    config = dataset_config(SEQ, tmp_path)
    chained = build_chained(slices[:3], [40, 50, 60], config, 7)
    shuffled = build_shuffled(slices[:3], [40, 50, 60], config, 7)
    assert rows(shuffled) != rows(chained)
    assert sorted(rows(shuffled)) == sorted(rows(chained))
    firsts = [shuffled.version_of(i) for i in range(75)]
    assert {firsts.count(name) > 10 for name in ("v1", "v2", "v3")} == {True}


def test_two_slices_of_one_dataset_never_share_an_index(tmp_path: Path) -> None:
    prefix = make_random_dataset(tmp_path / "d", [20] * 40)
    config = dataset_config(SEQ, tmp_path / "cache")
    one = make_slice(tmp_path / "a/v1.slice", [(prefix, range(20), "d")])
    other = make_slice(tmp_path / "b/v1.slice", [(prefix, range(20, 40), "d")])
    first, second = (labels(rows(build_chained([which], [24], config, 7))) for which in (one, other))
    assert max(first) <= 400 < min(second)


def test_an_index_is_built_once_and_read_thereafter(
    slices: list[Slice], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataset_config(SEQ, tmp_path)
    before = rows(build_shuffled(slices[:2], [40, 50], config, 7))
    monkeypatch.setattr(versioned_index, "sample_bounds", lambda *_, **__: pytest.fail("built again"))
    assert rows(build_shuffled(slices[:2], [40, 50], config, 7)) == before
    with pytest.raises(pytest.fail.Exception):
        build_chained(slices[:2], [40, 50], config, 8)


def test_the_cache_is_next_to_the_slices_by_default(slices: list[Slice]) -> None:
    build_chained(slices[:1], [4], dataset_config(SEQ), 7)
    assert slices[0].path is not None
    assert list((slices[0].path.parent / ".cache").glob("*-samples.npy"))


def test_every_stretch_holds_each_domain_in_its_share(slices: list[Slice], tmp_path: Path) -> None:
    total = available_samples(slices[0], SEQ)
    dataset = build_chained(slices[:1], [total], dataset_config(SEQ, tmp_path), 7)
    web = [dataset.locate(i)[0].prefix.name == "web" for i in range(total)]
    share = slices[0].sources[0].tokens / slices[0].tokens
    for start in range(0, total - 32, 8):
        assert abs(sum(web[start : start + 32]) - 32 * share) <= 2


@given(st.lists(st.integers(0, 60), min_size=1, max_size=5), st.integers())
def test_interleaving_keeps_every_sample_once_in_order_and_every_share(counts: list[int], key: int) -> None:
    order = interleave(counts, key)
    total = sum(counts)
    assert len(order["source"]) == total
    for source, count in enumerate(counts):
        mine = order["source"] == source
        assert order["sample"][mine].tolist() == list(range(count))
        taken = np.cumsum(mine)
        assert (np.abs(taken - np.arange(1, total + 1) * count / max(total, 1)) <= len(counts)).all()


@settings(max_examples=60)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 12), st.integers(0, 1))
def test_samples_begin_where_megatrons_helper_puts_them(lengths: list[int], seq: int, extra: int) -> None:
    from megatron.core.datasets import helpers

    sizes = np.array(lengths, dtype=np.int32)
    order = np.random.RandomState(len(lengths)).permutation(len(sizes)).astype(np.int32)
    if (sizes.sum() - extra) // seq == 0:
        return
    theirs = helpers.build_sample_idx(sizes, order, seq, 1, int(sizes.sum()), True, bool(extra))
    ours = sample_bounds(sizes[order], seq, extra, keep_partial=False)
    flat = np.concatenate([[0], np.cumsum(sizes[order])])
    assert ours.dtype == np.int32
    assert (flat[ours[:, 0]] + ours[:, 1]).tolist() == (flat[theirs[:, 0]] + theirs[:, 1]).tolist()
    if extra:
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("size", [1, 2])
def test_data_parallel_ranks_share_out_the_same_batches(
    slices: list[Slice], tmp_path: Path, size: int
) -> None:
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    dataset = build_chained(slices[:2], [24, 24], dataset_config(SEQ, tmp_path), 7)
    branch_start, global_batch = 16, 8
    loaders = [
        torch.utils.data.DataLoader(
            dataset,
            batch_sampler=MegatronPretrainingSampler(48, branch_start, global_batch // size, rank, size),
        )
        for rank in range(size)
    ]
    steps = [torch.cat([part["tokens"] for part in parts]) for parts in zip(*loaders, strict=True)]
    assert len(steps) == 4
    main = [sample[:-1] for sample in rows(dataset, range(branch_start, 48))]
    assert [tuple(sample) for sample in torch.cat(steps).tolist()] == main


def test_located_documents_are_the_sample(slices: list[Slice], tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = build_shuffled(slices[:2], [40, 40], dataset_config(SEQ, tmp_path), 7)
    for position, sample in enumerate(rows(dataset)):
        found: list[int] = []
        for where in dataset.locate(position):
            assert where.version == dataset.version_of(position)
            indexed = IndexedDataset(str(where.prefix))
            found += indexed.get(where.document, offset=where.offset, length=where.length).tolist()
        assert tuple(found) == sample


def test_too_few_tokens_are_refused_before_anything_is_built(slices: list[Slice], tmp_path: Path) -> None:
    available = available_samples(slices[1], SEQ)
    with pytest.raises(UserError, match=rf"version v2.*need {available + 1:,} samples.*has {available:,} "):
        build_chained(slices[:2], [4, available + 1], dataset_config(SEQ, tmp_path / "cache"), 7)
    assert not (tmp_path / "cache").exists()


def test_real_tokens_that_share_the_padding_id_are_trained_on(tmp_path: Path) -> None:
    prefix = make_random_dataset(tmp_path / "d", [50, 50])
    one = make_slice(tmp_path / "v1.slice", [(prefix, [0, 1], "d")])
    config = dataset_config(SEQ, tokenizer=StubTokenizer(pad=33, eod=0))
    dataset = build_chained([one], [6], config, 7)
    assert 33 in labels(rows(dataset))
    assert all(dataset[i]["loss_mask"].min() == 1 for i in range(6))


@pytest.mark.parametrize("seq", [1, 5, SEQ, 100, 5000])
def test_validation_predicts_every_token_once(slices: list[Slice], tmp_path: Path, seq: int) -> None:
    dataset = build_validation(slices[3], dataset_config(seq, tmp_path))
    assert dataset.index_split.name == "valid"
    predicted: list[int] = []
    for position in range(len(dataset)):
        item = dataset[position]
        predicted += item["labels"][item["loss_mask"] > 0].tolist()
    everything, firsts = [], []
    for source in slices[3].sources:
        stream = [t for d in source.documents for t in tokens_of(source.prefix, int(d))]
        firsts.append(stream[0])
        everything += stream[1:]
    assert predicted == everything
    assert not set(firsts) & set(predicted)


def tokens_of(prefix: Path, document: int) -> list[int]:
    """Return the tokens of a document, by arithmetic: the fixture numbers them consecutively."""
    lengths = np.random.RandomState(0).randint(1, 60, size=400)
    base = 1 if prefix.name == "web" else 1 + int(lengths.sum())
    start = base + int(lengths[:document].sum())
    return list(range(start, start + int(lengths[document])))


def test_a_padded_sample_read_first_masks_nothing_of_the_others(slices: list[Slice], tmp_path: Path) -> None:
    dataset = build_validation(slices[3], dataset_config(SEQ, tmp_path))
    in_order = [dataset[i]["loss_mask"].tolist() for i in range(len(dataset))]
    again = build_validation(slices[3], dataset_config(SEQ, tmp_path))
    backwards = [again[i]["loss_mask"].tolist() for i in reversed(range(len(again)))]
    assert backwards[::-1] == in_order
    assert sum(min(mask) == 0 for mask in in_order) == 2


def test_validation_samples_belong_to_one_domain_each(slices: list[Slice], tmp_path: Path) -> None:
    dataset = build_validation(slices[3], dataset_config(SEQ, tmp_path), multiple_of=32)
    assert len(dataset) % 32 == 0
    assert dataset.domains == ["web", "books"]
    real = [i for i in range(len(dataset)) if dataset.locate(i)]
    for i in real:
        assert {where.prefix.name for where in dataset.locate(i)} == {dataset.domain_of(i)}
    assert len(real) < len(dataset)
    for i in range(len(real), len(dataset)):
        assert dataset[i]["loss_mask"].sum() == 0
        assert dataset.domain_of(i) == "books"
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_a_dataset_that_changed_under_its_slice_is_refused(tmp_path: Path) -> None:
    prefix = make_random_dataset(tmp_path / "d", [20] * 10)
    one = make_slice(tmp_path / "v1.slice", [(prefix, range(10), "d")])
    make_random_dataset(tmp_path / "d", [21] * 10)
    with pytest.raises(UserError, match="not the indexed dataset that the slice was drawn from"):
        build_chained([one], [4], dataset_config(SEQ), 7)


def test_the_type_of_ids_is_megatrons() -> None:
    for size in (1, 65_499, 65_500, 65_536, 200_000):
        assert optimal_dtype(size) == np.dtype(DType.optimal_dtype(size))


@pytest.mark.parametrize(("dtype", "largest"), [(np.uint16, 65_498), (np.int32, 65_499), (np.int32, 200_000)])
def test_large_ids_arrive_as_they_are(dtype: Any, largest: int, tmp_path: Path) -> None:
    ids = [largest - number for number in range(20)]
    prefix = make_indexed_dataset(tmp_path / "d", [ids, ids], dtype)
    one = make_slice(tmp_path / "v1.slice", [(prefix, range(2), "d")])
    dataset = build_chained([one], [2], dataset_config(SEQ, tmp_path / "cache"), 7)
    assert sorted(token for row in rows(dataset) for token in row[1:]) == sorted([*ids, *ids][1:33])

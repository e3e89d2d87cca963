"""Replay in training: the samples that reach the model on the main path and in branches, resumed, on two ranks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_lrpath.data.slice import Slice
from megatron_lrpath.data.versioned import build_chained, build_shuffled
from megatron_lrpath.data.versioned_index import replay_entries
from megatron_lrpath.plan import Plan, load_plan
from megatron_lrpath.runs.lineage import read_lineage
from tests.reliability.test_reliability_samples import printed
from tests.support.data_fixtures import dataset_config
from tests.support.plan_text import plan_with
from tests.support.states import states
from tests.support.training_fixtures import history, launch, make_plan, run_words, train
from tests.training.test_branch_mix import RECORD, extra_slice, steps_of

VERSIONS = [
    {"name": "v1", "steps": 6},
    {"name": "v2", "steps": 8, "replay": 0.3},
]
MIXED = {"slices": {"curated": 0.25}, "seed": 5}


def plan_of(folder: Path, versions: Sequence[dict[str, Any]], **changes: Any) -> Path:
    """Write a tiny plan of these versions with its data; return its path."""
    path = make_plan(folder, [version["steps"] for version in versions], **changes)
    keys = yaml.safe_load(path.read_text()) | {"versions": list(versions)}
    path.write_text(yaml.safe_dump(keys, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the main path to step 14 and its branch with a mix; tokens in `*.json`.

    The main path is trained with and without a stop at step 9.
    """
    folder = tmp_path_factory.mktemp("replay")
    path = plan_of(folder, VERSIONS, also_branch_at=[14])
    extra_slice(folder / "data", "curated", 1, 8)
    keys = yaml.safe_load(path.read_text())
    for name, changes in (("stopped", {"output": str(folder / "stopped")}), ("mixed", {"branch_mix": MIXED})):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(keys | changes, sort_keys=False))
    launch(RECORD, [str(folder / "main.json"), *run_words(path, "ours", "main")]).ok()
    launch(RECORD, [str(folder / "mixed.json"), *run_words(folder / "mixed.yaml", "ours", "branch-v2")]).ok()
    argv = run_words(folder / "stopped.yaml", "ours", "main")
    train([*argv, "--exit-interval", "9"]).ok()
    launch(RECORD, [str(folder / "rest.json"), *argv]).ok()
    return folder


def chained(plan: Plan, count: int, cache: Path) -> Any:
    """Return the main path's dataset of the first versions."""
    samples = [plan.samples_of(index) for index in range(count)]
    replays = replay_entries(plan, count)
    return build_chained(slices_of(plan, count), samples, dataset_config(16, cache), plan.seed, replays)


def slices_of(plan: Plan, count: int) -> list[Slice]:
    return [Slice.load(Path(plan.data.slices) / f"{version.name}.slice") for version in plan.versions[:count]]


def rows(dataset: Any, positions: Sequence[int] | None = None) -> list[tuple[int, ...]]:
    chosen = range(len(dataset)) if positions is None else positions
    return [tuple(dataset[position]["tokens"].tolist()) for position in chosen]


def test_each_step_of_the_main_path_holds_its_share_of_earlier_samples(trained: Path, tmp_path: Path) -> None:
    steps = steps_of(trained / "main.json")
    first = [sample for step in steps[:6] for sample in step]
    assert len(set(first)) == 24
    again = [[sample for sample in step if sample in set(first)] for step in steps[6:]]
    # 0.3 of 4, 8, 12, … samples, rounded down: 1, 2, 3, 4, 6, 7, 8, 9
    assert [len(step) for step in again] == [1, 1, 1, 1, 2, 1, 1, 1]
    replayed = [sample for step in again for sample in step]
    assert len(set(replayed)) == 9  # none twice
    own = [sample for step in steps[6:] for sample in step if sample not in set(first)]
    alone = build_chained(
        slices_of(load_plan(trained / "plan.yaml"), 2), [24, 23], dataset_config(16, tmp_path), 7
    )
    assert own == rows(alone, range(24, 47))  # the new samples, each once, in the order without replay


def test_a_stop_in_the_middle_of_the_version_and_a_branch_change_no_batch(trained: Path) -> None:
    steps = steps_of(trained / "main.json")
    assert steps_of(trained / "rest.json") == steps[9:]
    first, second = states(
        *(trained / root / "ours/main/checkpoints/iter_0000014" for root in ("runs", "stopped"))
    )
    assert first == second
    mixed = steps_of(trained / "mixed.json")
    assert len(mixed) == 4
    for step, now in zip(
        steps[10:], mixed, strict=True
    ):  # one sample of the mix in each step, no other change
        assert sum(one != other for one, other in zip(step, now, strict=True)) == 1


def test_two_ranks_train_on_the_same_samples(trained: Path) -> None:
    one = trained / "runs/ours/branch-v2"
    one.rename(one.with_name("one-rank"))
    train(run_words(trained / "mixed.yaml", "ours", "branch-v2"), nproc=2).ok()
    losses = [[line["loss"] for line in history(folder)] for folder in (one.with_name("one-rank"), one)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    lineage = read_lineage(one)
    assert lineage is not None
    assert lineage["identity"]["versions"][1]["replay"] == {"share": "3/10"}
    assert set(lineage["identity"]["slices"]) == {"v1", "v2"}


def test_samples_show_what_is_read_again(trained: Path) -> None:
    answer = printed(str(trained / "runs/ours/main"), "--step", "11", "--json")
    samples = json.loads(answer[answer.index('{"step"') :].splitlines()[0])["samples"]
    given = [list(tokens) for tokens in steps_of(trained / "main.json")[10]]
    assert [list(map(int, sample["text"].split())) for sample in samples] == given
    assert {(sample["version"], sample["replayed"]) for sample in samples} == {("v1", True), ("v2", False)}
    assert ", version v1, read again\n" in printed(str(trained / "runs/ours/main"), "--step", "11")


def test_ptfs_reads_no_sample_twice_and_ends_with_its_last_whole_step(trained: Path, tmp_path: Path) -> None:
    plan = load_plan(trained / "plan.yaml")
    run = plan.run("ptfs", "scratch-v2")
    assert run.last_step == 11  # 6 + 0.7 · 8 = 11.6
    shuffled = build_shuffled(slices_of(plan, 2), plan.scratch_samples(run), dataset_config(16, tmp_path), 7)
    found = rows(shuffled)
    assert len(found) == len(set(found)) == 44
    assert set(found) <= set(rows(chained(plan, 2, tmp_path)))


def test_weights_and_later_versions(tmp_path: Path) -> None:
    """Draws are uniform and weighted; a longer and an appended version change nothing before."""
    steps = (20, 40, 40, 30)
    weights = {"share": 0.4, "weights": {"v1": 1, "v2": 3}}
    versions = [
        {"name": "v1", "steps": 20},
        {"name": "v2", "steps": 40, "replay": 0.25},
        {"name": "v3", "steps": 40, "replay": weights},
        {"name": "v4", "steps": 30, "replay": 0.5},
    ]
    path = plan_of(tmp_path, versions)
    plan = load_plan(path)
    every = chained(plan, 4, tmp_path / "cache")
    assert len(every) == 4 * sum(steps)
    found = rows(every)
    for count in (2, 3):
        assert rows(chained(plan, count, tmp_path / "cache")) == found[: 4 * sum(steps[:count])]
    origins = [every.version_of(position) for position in range(len(every))]
    third = Counter(origins[240:400])
    assert third == {"v1": 16, "v2": 48, "v3": 96}  # 0.4 · 160, 1 : 3
    fourth = Counter(origins[400:])
    assert fourth["v4"] == 60
    assert all(fourth[name] > 5 for name in ("v1", "v2", "v3"))  # of 80, 120 and 96 samples
    for begin, end in ((80, 240), (240, 400), (400, 520)):
        assert len(set(found[begin:end])) == end - begin  # none twice within a version
    marks = [every.is_replayed(position) for position in range(len(every))]
    own = [sample for sample, again in zip(found, marks, strict=True) if not again]
    assert len(set(own)) == len(own) == 80 + 120 + 96 + 60
    longer = [*versions[:2], versions[2] | {"steps": 50}]
    grown = chained(load_plan(plan_of(tmp_path / "longer", longer)), 3, tmp_path / "cache")
    places = [(every.version_of(position), every.is_replayed(position)) for position in range(400)]
    assert [(grown.version_of(position), grown.is_replayed(position)) for position in range(400)] == places


def test_another_seed_replays_other_samples(tmp_path: Path) -> None:
    plan = plan_with(
        tmp_path, versions=[{"name": "v1", "steps": 60}, {"name": "v2", "steps": 60, "replay": 0.5}]
    )
    drawn = []
    for seed in (1, 2):
        entry = replay_entries(replace(plan, seed=seed), 2)[1]
        assert entry is not None
        drawn.append(entry.build()["sample"].tolist())
    assert drawn[0] != drawn[1]

"""Other data in a branch: exact shares, the main path's samples everywhere else, messages and refusals."""

from __future__ import annotations

import json
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_lrpath.data.slice import check_mixes
from megatron_lrpath.errors import PlanError, UserError
from megatron_lrpath.plan import load_plan, run_identity
from megatron_lrpath.plan.mix import quotas
from megatron_lrpath.plan.wording import mix_text
from megatron_lrpath.runs.lineage import read_lineage
from tests.reliability.test_reliability_samples import printed
from tests.support.data_fixtures import make_indexed_dataset, make_slice
from tests.support.plan_text import plan_with
from tests.support.states import states
from tests.support.training_fixtures import history, launch, make_plan, run_words, train

RECORD = "tests.reliability.test_reliability_samples:record_tokens"
MIX = {"slices": {"curated": 0.3, "fresh": 0.125}, "seed": 99}
BRANCH = ("ours", "branch-v2")  # 5 steps of 4 samples: steps 16 to 20


def extra_slice(folder: Path, name: str, first: int, samples: int) -> None:
    """Write a slice of its own dataset, whose samples of 16 tokens begin with distinct tokens."""
    tokens = np.random.default_rng(first).integers(1, 119, size=samples * 16 + 20).tolist()
    prefix = make_indexed_dataset(folder / f"{name}_text_document", [tokens])
    make_slice(folder / "slices" / f"{name}.slice", [(prefix, [0], name)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a trained main path, a branch without a mix, and one with a mix; their tokens in `*.json`."""
    folder = tmp_path_factory.mktemp("mix")
    plain = make_plan(folder, (10, 10))
    extra_slice(folder / "data", "curated", 1, 8)
    extra_slice(folder / "data", "fresh", 2, 8)
    keys = yaml.safe_load(plain.read_text())
    for name, changes in (("plain", {}), ("mixed", {"branch_mix": MIX})):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(keys | changes, sort_keys=False))
    launch(RECORD, [str(folder / "main.json"), *run_words(folder / "plain.yaml", "ours", "main")]).ok()
    launch(RECORD, [str(folder / "plain.json"), *run_words(folder / "plain.yaml", *BRANCH)]).ok()
    (folder / "runs/ours/branch-v2").rename(folder / "runs/ours/plain-branch-v2")
    launch(RECORD, [str(folder / "mixed.json"), *run_words(folder / "mixed.yaml", *BRANCH)]).ok()
    return folder


def steps_of(path: Path) -> list[list[tuple[int, ...]]]:
    """Return the samples of each step (tokens), from the recorded micro-batches of 2."""
    micro = [[tuple(tokens) for tokens in batch] for batch in json.loads(path.read_text())]
    return [one + other for one, other in zip(micro[::2], micro[1::2], strict=True)]


def test_every_prefix_holds_each_source_in_its_share_to_within_a_sample() -> None:
    generator = random.Random(5)
    for _ in range(300):
        weights = [generator.randint(1, 9) for _ in range(generator.randint(1, 5))]
        total = sum(weights) + generator.randint(1, 20)
        shares = [Fraction(weight, total) for weight in weights]
        batch, steps = generator.randint(1, 40), generator.randint(1, 40)
        had = [0] * len(shares)
        for step, counts in enumerate(quotas(shares, batch, steps), start=1):
            had = [done + count for done, count in zip(had, counts, strict=True)]
            exact = [share * batch * step for share in shares]
            assert all(abs(done - share) < 1 for done, share in zip(had, exact, strict=True))
            assert abs(batch * step - sum(had) - (batch * step - sum(exact))) < 1
            assert min(counts) >= 0
            assert sum(counts) <= batch


def test_the_mix_takes_its_share_and_leaves_the_rest_as_it_was(trained: Path) -> None:
    plain, mixed = steps_of(trained / "plain.json"), steps_of(trained / "mixed.json")
    shares = [Fraction(3, 10), Fraction(1, 8)]
    assert len(plain) == len(mixed) == 5
    foreign: list[tuple[int, ...]] = []
    for before, after, counts in zip(plain, mixed, quotas(shares, 4, 5), strict=True):
        replaced = [now for was, now in zip(before, after, strict=True) if was != now]
        assert len(replaced) == sum(counts)  # all others are unchanged
        foreign += replaced
    assert len(set(foreign)) == len(foreign)  # none twice
    curated, fresh = (tokens_of(trained, name) for name in ("curated", "fresh"))
    owners = Counter(("curated" if one in curated else "fresh" if one in fresh else "?") for one in foreign)
    assert owners == {"curated": 6, "fresh": 2}  # 0.3 · 20 exactly, 0.125 · 20 = 2.5 rounded down


def tokens_of(folder: Path, name: str) -> set[tuple[int, ...]]:
    """Return the samples of 16 tokens that a slice of one document yields."""
    data = np.fromfile(folder / f"data/{name}_text_document.bin", dtype=np.uint16).tolist()
    return {tuple(data[start : start + 16]) for start in range(0, len(data) - 16, 16)}


def test_without_a_mix_the_branch_reads_what_the_main_path_would(trained: Path) -> None:
    main = steps_of(trained / "main.json")  # steps 1 to 15
    assert len(main) == 15
    launch(RECORD, [str(trained / "longer.json"), *longer_main(trained)]).ok()
    assert steps_of(trained / "longer.json")[-5:] == steps_of(trained / "plain.json")


def longer_main(folder: Path) -> list[str]:
    """Return the command line of the same main path in another folder, up to the end of v2."""
    keys = yaml.safe_load((folder / "plain.yaml").read_text())
    keys |= {"also_branch_at": [20], "output": str(folder / "longer")}
    (folder / "longer.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    return run_words(folder / "longer.yaml", "ours", "main")


def test_the_lineage_records_the_mix_and_the_main_path_does_not_depend_on_it(trained: Path) -> None:
    lineage = read_lineage(trained / "runs/ours/branch-v2")
    assert lineage is not None
    assert lineage["identity"]["mix"] == {"seed": 99, "shares": {"curated": "3/10", "fresh": "1/8"}}
    assert set(lineage["identity"]["mix_slices"]) == {"curated", "fresh"}
    plain, mixed = (load_plan(trained / f"{name}.yaml") for name in ("plain", "mixed"))
    main = mixed.run("ours", "main")
    assert run_identity(mixed, main) == run_identity(plain, plain.run("ours", "main"))
    assert "mix" not in run_identity(plain, plain.run(*BRANCH))


def test_samples_show_the_slices_of_the_mix(trained: Path) -> None:
    answer = printed(str(trained / "runs/ours/branch-v2"), "--step", "16", "--json")
    samples = json.loads(answer[answer.index('{"step"') :].splitlines()[0])["samples"]
    given = [list(tokens) for tokens in steps_of(trained / "mixed.json")[0]]
    assert [list(map(int, sample["text"].split())) for sample in samples] == given
    assert {sample["version"] for sample in samples} == {"v2", "curated"}
    assert any("curated_text_document" in sample["documents"][0]["dataset"] for sample in samples)


@pytest.mark.slow
def test_two_ranks_read_the_same_steps_and_a_resumed_branch_ends_with_the_same_bytes(trained: Path) -> None:
    keys = yaml.safe_load((trained / "mixed.yaml").read_text()) | {"output": str(trained / "again")}
    (trained / "again.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    (trained / "again/ours").mkdir(parents=True)
    (trained / "again/ours/main").symlink_to(trained / "runs/ours/main")
    argv = run_words(trained / "again.yaml", *BRANCH)
    train([*argv, "--exit-interval", "17"]).ok()
    train(argv).ok()
    ends = [trained / root / "ours/branch-v2" for root in ("runs", "again")]
    first, second = states(*(end / "checkpoints/iter_0000020" for end in ends))
    assert first == second
    losses = [[(line["step"], line["loss"]) for line in history(end)] for end in ends]
    assert losses[0] == losses[1]
    ends[1].rename(trained / "again/ours/one-rank")
    train(argv, nproc=2).ok()
    two = [(line["step"], line["loss"]) for line in history(ends[1])]
    assert [step for step, _ in two] == [step for step, _ in losses[0]]
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in losses[0]], rel=1e-5)


def test_another_mix_is_another_run(trained: Path) -> None:
    for name, mix, said in (
        ("shares", {"slices": {"curated": 0.25}, "seed": 99}, "branch mix.shares: was"),
        ("seed", MIX | {"seed": 98}, "branch mix.seed: was 99, is 98"),
        ("none", None, "branch mix: was"),
    ):
        keys = yaml.safe_load((trained / "plain.yaml").read_text()) | ({"branch_mix": mix} if mix else {})
        (trained / f"{name}.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
        outcome = train(run_words(trained / f"{name}.yaml", *BRANCH))
        assert outcome.status == [2]
        assert said in outcome.output


def changed(folder: Path, mix: dict[str, Any]) -> Path:
    """Write the mixed plan with another mix; return its path."""
    path = folder / "changed.yaml"
    keys = yaml.safe_load((folder / "mixed.yaml").read_text()) | {"branch_mix": mix}
    path.write_text(yaml.safe_dump(keys, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("mix", "said"),
    [
        ({"slices": {"missing": 0.2}}, "branch_mix.slices.missing: "),
        ({"slices": {"curated": 0.5}}, "its share of 5 steps is 10 samples of 16 tokens"),
        ({"slices": {"valid": 0.2}}, "share"),
    ],
)
def test_what_only_the_data_show_is_refused_with_the_plans_line(
    trained: Path, mix: dict[str, Any], said: str
) -> None:
    plan = load_plan(changed(trained, mix))
    with pytest.raises(UserError, match=said):
        check_mixes(plan, plan.runs("ours"))


@pytest.mark.parametrize(
    ("mix", "said"),
    [
        ({"slices": {"a": 0}}, "branch_mix.slices.a: must be above 0 and below 1"),
        ({"slices": {"a": 1.0}}, "branch_mix.slices.a: must be above 0 and below 1"),
        ({"slices": {"a": 0.5, "b": 0.5}}, "branch_mix.slices: the shares add up to 1"),
        ({"slices": {}}, "branch_mix.slices: names no slice"),
        ({"slices": {"x/a": 0.1, "y/a": 0.1}}, "branch_mix.slices.y/a: 'y/a' has the name of 'x/a'"),
        ({"slices": {"a": 0.0001}}, "branch_mix.slices.a: 0.0001 of branch-v1's 60 steps of 32 samples"),
        ({"share": 0.1}, "branch_mix.share: unknown key"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(tmp_path: Path, mix: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan_with(tmp_path, branch_mix=mix)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/plan.yaml:")


def test_a_version_may_have_a_mix_of_its_own_or_none(tmp_path: Path) -> None:
    plan = plan_with(
        tmp_path,
        branch_mix={"slices": {"curated": 0.2}},
        versions=[
            {"name": "v1", "steps": 100, "branch_mix": {"slices": {}}},
            {"name": "v2", "steps": 100},
            {"name": "v3", "steps": 100, "branch_mix": {"slices": {"more/chat": 0.05}, "seed": 3}},
        ],
    )
    mixes = [run.mix for run in plan.runs("ours")]
    assert mixes[:2] == [None, None]
    assert [mix_text(mix) for mix in mixes[2:] if mix] == ["20% curated", "5% chat"]
    assert [mix.seed for mix in mixes[2:] if mix] == [1234, 3]
    assert all(run.mix is None for paradigm in ("ptfs", "cpt") for run in plan.runs(paradigm))

"""`lrpath trace`: the steps that read a document are those of the training's own order; slices without it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import yaml

from megatron_lrpath.cli import main
from megatron_lrpath.data.positions import sample_numbers
from megatron_lrpath.data.slice import Slice, held_out
from megatron_lrpath.paradigms import PARADIGMS
from megatron_lrpath.plan import Plan, load_plan
from megatron_lrpath.training.context import RunContext
from megatron_lrpath.upkeep.trace import PlanSlices, chained_positions, steps_of
from tests.support.data_fixtures import dataset_config, make_indexed_dataset, make_slice
from tests.support.killed_at import killed_at
from tests.support.training_fixtures import VOCABULARY, make_plan
from tests.support.years_tree import train
from tools import check_dataset

RECORD = ["--vocab-size", str(VOCABULARY), "--record"]


def make_team(folder: Path) -> Plan:
    """Make three versions of two sources each; all share one document, v2's branch mixes in a slice."""
    path = make_plan(folder, (6, 6, 6), alpha=0.5)
    data = folder / "data"
    again = [5, 4, 3] * 8 + [2]
    generator = np.random.default_rng(3)
    for number in (1, 2, 3):
        texts = [generator.integers(1, VOCABULARY, size=25).tolist() for _ in range(10)]
        make_indexed_dataset(data / f"extra{number}", [*texts, again])
        assert check_dataset.main([str(data / f"extra{number}"), *RECORD]) == 0
        assert check_dataset.main([str(data / f"v{number}_text_document"), *RECORD]) == 0
    assert check_dataset.main([str(data / "valid_text_document"), *RECORD]) == 0
    for number in (1, 2, 3):
        one = Slice.load(data / f"slices/v{number}.slice").sources[0]
        parts = [(data / f"extra{number}", range(11), "more"), (one.prefix, one.documents, "prose")]
        make_slice(data / f"slices/v{number}.slice", parts)
    make_slice(data / "slices/curated.slice", [(data / "extra1", range(5, 11), "more")])
    keys = yaml.safe_load(path.read_text())
    keys["versions"][1]["branch_mix"] = {"slices": {"curated": 0.25}}
    path.write_text("# ours\n" + yaml.safe_dump(keys, sort_keys=False))
    return load_plan(path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Return a plan that no test may change."""
    return make_team(tmp_path_factory.mktemp("team"))


def trained(plan: Plan) -> Plan:
    """Write all runs complete, as training does, the main path with a checkpoint every 3 steps."""
    for run in plan.runs("ours"):
        saves = range(run.first_step + 3, run.last_step + 1, 3)
        train(plan, run, [*saves], plan.parent_of(run) if run.parent else None)
    train(plan, plan.runs("ptfs")[1], [12])
    return plan


@pytest.mark.parametrize("last", [{}, {"steps": 6, "replay": 0.25, "global_batch_size": 8}])
def test_the_steps_are_those_at_which_training_reads_the_documents(
    shared: Plan, last: dict[str, Any], tmp_path: Path
) -> None:
    from megatron_lrpath.training.datasets import training_set

    keys = yaml.safe_load(shared.path.read_text())
    keys["versions"][2] |= last
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(keys, sort_keys=False))
    plan = load_plan(path)
    slices = PlanSlices.of(plan)
    wanted = {
        source.fingerprint: np.array([3, 9] if source.domain == "prose" else [10], dtype=np.int32)
        for source in slices.versions[1].sources
    }
    wanted |= {slices.versions[0].sources[0].fingerprint: np.array([7], dtype=np.int32)}
    numbers = [sample_numbers(one, wanted, plan.batch.seq_length, plan.seed) for one in slices.versions]
    positions = chained_positions(plan, numbers)
    pairs = {
        (str(slices.sources[key][0].prefix.resolve()), int(number))
        for key, numbers in wanted.items()
        for number in numbers
    }
    found = 0
    for run in (run for paradigm in PARADIGMS for run in plan.runs(paradigm)):
        mix = slices.mixes[run.mix] if run.mix else ()
        own = SimpleNamespace(plan=plan, run=run, slices=slices.versions[: run.version_index], mix=mix)
        dataset = training_set(cast(RunContext, own), dataset_config(16, tmp_path / "cache"))
        sizes = plan.sizes_of(run)
        read = {
            step
            for step in range(run.first_step + 1, run.last_step + 1)
            for position in range(sizes.samples_at(step - 1), sizes.samples_at(step))
            for place in dataset.locate(position)
            if (str(place.prefix.resolve()), place.document) in pairs
        }
        assert steps_of(plan, slices, run, positions, numbers, wanted) == tuple(sorted(read)), run.key
        found += bool(read)
    assert found >= 6


def test_a_document_and_its_copies_are_traced_to_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = trained(make_team(tmp_path))
    argv = ["trace", str(plan.path)]
    capsys.readouterr()
    assert main([*argv, "--document", "extra2:10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    data = tmp_path / "data"
    assert found["documents"] == {str(data / f"extra{number}"): [10] for number in (1, 2, 3)}
    assert found["slices"] == {"v1": 1, "v2": 1, "v3": 1, "curated": 1}
    runs = {row["run"]: row for row in found["runs"]}
    first = runs["ours/main"]["steps"][0]
    assert first <= 6
    assert runs["ours/main"]["checkpoints"] == [step for step in range(3, 16, 3) if step >= first]
    assert runs["ours/branch-v3"]["parent"] == "ours/main"
    assert runs["ours/branch-v3"]["has_read"]
    assert not runs["ptfs/scratch-v3"]["has_read"]
    text = tmp_path / "text.txt"
    text.write_text(" ".join(map(str, [5, 4, 3] * 8 + [2])) + "\n")
    assert main([*argv, "--text-file", str(text), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == found["documents"]
    assert main([*argv, "--document", "extra3:2"]) == 0
    told = capsys.readouterr().out
    assert "slices that hold them: v3 (1)" in told
    assert "ptfs/scratch-v3" in told
    assert "not trained yet; would" in told
    assert main([*argv, "--document", "extra9:2"]) == 2
    assert "no dataset of the plan's slices; name one of" in capsys.readouterr().err
    assert main([*argv, "--document", "extra3:11"]) == 2
    assert "has 11 documents" in capsys.readouterr().err
    assert main([*argv, "--without", str(text)]) == 2
    assert "--output FOLDER go together" in capsys.readouterr().err


def test_a_plan_that_was_edited_since_does_not_tell_what_was_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = trained(make_team(tmp_path))
    text = plan.path.read_text()
    plan.path.write_text(text.replace("seed: 7", "seed: 8"))
    words = ["trace", str(plan.path), "--document", "extra2:10"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "seed: was 7, is 8" in error
    assert "trace with the plan and the slices that it was trained with" in error
    plan.path.write_text(text)
    assert main(words) == 0


def test_slices_without_documents_and_what_to_train_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = trained(make_team(tmp_path))
    listed, output = tmp_path / "gone.txt", tmp_path / "data/clean"
    listed.write_text("# asked for by the author\nextra2:2\n\nextra2:3\n")
    argv = ["trace", str(plan.path), "--without", str(listed), "--output", str(output)]
    before = {path.name: path.read_bytes() for path in Path(plan.data.slices).glob("*.slice")}
    for number in range(1, 60):
        if not killed_at(number, argv):
            break
        assert not output.exists() or len([*output.glob("*.slice")]) == len(before)
        if output.exists():
            break
    assert number > 3
    if not output.exists():
        assert main([*argv, "--json"]) == 0
    capsys.readouterr()
    assert main(argv) == 2
    assert "exists already" in capsys.readouterr().err
    argv[-1] = str(tmp_path / "data/clean2")
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["takedown"]
    old, new = (Slice.load(Path(folder) / "v2.slice") for folder in (plan.data.slices, output))
    assert new.documents == old.documents - 2
    assert not {2, 3} & set(new.sources[0].documents.tolist())
    assert new.tokens == old.tokens - 50 == found["slices"]["v2"]["tokens"]
    assert {path.name: path.read_bytes() for path in Path(plan.data.slices).glob("*.slice")} == before
    assert (
        Slice.load(output / "v1.slice").fingerprint
        == Slice.load(Path(plan.data.slices) / "v1.slice").fingerprint
    )
    again = found["train_again"]
    assert again["rewind_to"] == 6
    assert {row["run"]: (row["from_step"], row["to_step"]) for row in again["runs"]} == {
        "ours/main": (6, 15),
        "ours/branch-v2": (9, 12),
        "ours/branch-v3": (15, 18),
        "ptfs/scratch-v2": (0, 12),
    }
    assert again["steps"] == 27
    # as the command prints: rewind, then the new slices
    assert main(["rewind", str(plan.path), "--to-step", "6"]) == 0
    plan.path.write_text(plan.path.read_text().replace(plan.data.slices + "\n", f"{output}\n"))
    changed = load_plan(plan.path)
    assert changed.data.slices == str(output)
    assert [one.name for one in held_out(changed.data)] == ["valid"]
    capsys.readouterr()
    answer: Any = main(["plan", str(plan.path)])
    assert answer == 0, capsys.readouterr().err


def test_too_few_documents_left_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_team(tmp_path)
    listed = tmp_path / "gone.txt"
    argv = ["trace", str(plan.path), "--without", str(listed), "--output", str(tmp_path / "clean")]
    listed.write_text("".join(f"v3_text_document:{number}\n" for number in range(18)))
    capsys.readouterr()
    assert main(argv) == 0
    told = capsys.readouterr().out
    assert "v3: 18 documents fewer" in told
    assert "suffices for 5 steps, set `steps` in the plan" in told
    assert "no run has to be trained again" in told

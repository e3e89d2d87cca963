"""Probes and auditions: their trainings, checkpoint and text, and that they change nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_lrpath.cli import main
from megatron_lrpath.commands import run as run_command
from megatron_lrpath.data.record import write_record
from megatron_lrpath.data.slice import Slice, check_disjoint
from megatron_lrpath.errors import UserError
from megatron_lrpath.experiment.load import load_experiment
from megatron_lrpath.experiment.run import experiment_tasks
from megatron_lrpath.experiment.trial import make_audition, make_probe, prepare, slice_part, write
from megatron_lrpath.plan import load_plan
from megatron_lrpath.readiness import Request, require_ready
from megatron_lrpath.runs.checkpoints import checkpoint_fingerprint
from megatron_lrpath.runs.lineage import read_lineage
from megatron_lrpath.tokenizers.prints import TokenizerSpec
from megatron_lrpath.trials.record import trials_of
from tests.support.data_fixtures import make_indexed_dataset, make_slice
from tests.support.training_fixtures import VOCABULARY, history, launch, make_plan, run_words, train
from tests.training.test_branch_mix import RECORD, steps_of

AUDITION = ["--slices", "v4", "v4-half", "--replay", "0", "0.25", "--steps", "4", "--repeats", "2"]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a plan of three versions of 8 steps, with new text.

    The main path is trained to step 20, with checkpoints at 4, 8, 12, 16 and 20.
    """
    folder = tmp_path_factory.mktemp("trial")
    path = make_plan(folder, (8, 8, 8), branch_mix={"slices": {"v4": 0.25}}, prompts=["1 2"])
    generator = np.random.default_rng(3)
    documents = [generator.integers(1, VOCABULARY, size=25).tolist() for _ in range(240)]
    prefix = make_indexed_dataset(folder / "data/new_text_document", documents)
    write_record(prefix, "tests", TokenizerSpec("NullTokenizer", vocab_size=VOCABULARY).facts, {})
    slices = folder / "data/slices"
    for name, chosen in (("v4", range(220)), ("v4-half", range(0, 220, 2)), ("valid-v4", range(220, 240))):
        make_slice(slices / f"{name}.slice", [(prefix, chosen, "new")])
    train(run_words(path, "ours", "main")).ok()
    return path


def kept(folder: Path) -> dict[str, int]:
    """Return the files below a folder and when they were written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_an_audition_branches_off_one_checkpoint_on_paired_batches(plan: Path) -> None:
    loaded = load_plan(plan)
    before = kept(Path(loaded.output) / "ours")
    trial = make_audition(loaded, ["v4", "v4-half"], [0.0, 0.25], None, 4, 2)
    assert (trial.begin, trial.decay) == (20, 4)
    assert [one.name for one in trial.candidates] == ["v4", "v4-replay0.25", "v4-half", "v4-half-replay0.25"]
    experiment = write(loaded, trial, prepare(loaded, trial))
    assert write(loaded, trial, prepare(loaded, trial)) == experiment  # a second call
    assert trials_of(loaded) == [trial]
    todo = [task for task in experiment_tasks(experiment) if not task.complete]
    assert len(todo) == trial.branches == 8
    assert {(task.run.name, task.run.first_step, task.run.last_step) for task in todo} == {
        ("branch-trial", 20, 24)
    }
    require_ready(
        [point.plan for point in experiment.points], Request(("ours",), ("branch-trial",), evaluate=True)
    )
    steps = {}
    for name in ("v4-r1", "v4-replay0.25-r1"):
        file = plan.parent / f"{name}.json"
        point = trial.folder(loaded) / "plans" / f"{name}.yaml"
        launch(RECORD, [str(file), *run_words(point, "ours", "branch-trial")]).ok()
        steps[name] = [sample for step in steps_of(file) for sample in step]
    plain, mixed = steps.values()
    again = [sample for sample in mixed if sample not in set(plain)]
    assert len(plain) == len(mixed) == 16
    assert len(again) == 4  # 0.25 of 16 samples
    assert [sample for sample in mixed if sample not in set(again)] == plain[:12]
    lineage = read_lineage(trial.folder(loaded) / "v4-r1/ours/branch-trial")
    assert lineage is not None
    root = loaded.folder(loaded.main) / "checkpoints"
    assert lineage["parent"]["fingerprint"] == checkpoint_fingerprint(root, 20)
    rates = [row["lr"] for row in history(trial.folder(loaded) / "v4-r1/ours/branch-trial")]
    assert rates[0] == 0.01
    assert rates == sorted(rates, reverse=True)
    assert kept(Path(loaded.output) / "ours") == before  # nothing of the plan's own runs has changed


def test_a_probe_continues_at_each_rate_and_then_decays(plan: Path) -> None:
    loaded = load_plan(plan)
    before = kept(Path(loaded.output) / "ours")
    trial = make_probe(loaded, [1.4], None, 6, 1, 0.5)
    assert (trial.begin, trial.decay, [one.rate for one in trial.candidates]) == (16, 3, [0.01, 0.014])
    write(loaded, trial, prepare(loaded, trial))
    folder = trial.folder(loaded)
    point = folder / "plans/rate1.4-r1.yaml"
    for name in ("main", "branch-trial"):
        train(run_words(point, "ours", name)).ok()
    held = [(row["step"], row["lr"]) for row in history(folder / "rate1.4-r1/ours/main")]
    assert held == [(17, 0.01), (18, 0.014), (19, 0.014)]  # the move lasts one step
    decayed = [(row["step"], row["lr"]) for row in history(folder / "rate1.4-r1/ours/branch-trial")]
    assert [step for step, _ in decayed] == [20, 21, 22]
    assert decayed[0][1] == 0.014
    assert decayed[2][1] < 0.007
    assert kept(Path(loaded.output) / "ours") == before


def test_parts_of_a_slice_are_disjoint_and_the_same_for_slices_that_share_documents(plan: Path) -> None:
    folder = plan.parent / "data/slices"
    whole, half = (Slice.load(folder / f"{name}.slice") for name in ("v4", "v4-half"))
    parts = [slice_part(whole, repeat, 3) for repeat in (1, 2, 3)]
    check_disjoint(parts)
    assert sum(part.tokens for part in parts) == whole.tokens
    assert min(part.documents for part in parts) > 220 / 3 * 0.7
    for part, other in zip(parts, (slice_part(half, repeat, 3) for repeat in (1, 2, 3)), strict=True):
        assert set(other.sources[0].documents) <= set(part.sources[0].documents)


@pytest.mark.parametrize("submit", [False, True])
def test_the_command_prints_the_cost_trains_the_experiment_and_prints_json(
    plan: Path, submit: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["audition", str(plan), *AUDITION, "--dry-run"]) == 0
    said = capfd.readouterr().out
    assert "8 branches of 4 steps" in said
    assert "  32 steps in all, " in said
    assert "400% of the steps of v3" in said
    assert "no validation slice measures the text of v4-half" in said
    called: list[Any] = []

    def carried_out(args: Any) -> int:
        print("training")
        called.append(args)
        return 0

    from megatron_lrpath.commands import submit as submit_command

    monkeypatch.setattr(submit_command if submit else run_command, "execute", carried_out)
    options = ["--submit", "--settings", "site.ini"] if submit else ["--json"]
    assert main(["audition", str(plan), *AUDITION, *options, "--", "--log-interval", "2"]) == 0
    [args] = called
    assert args.extra == ["--log-interval", "2"]
    assert len(load_experiment(args.plan).points) == 8
    assert not submit or args.settings == Path("site.ini")
    if not submit:
        out = capfd.readouterr()
        facts = json.loads(out.out)  # stdout has no other output
        assert "training" in out.err
        assert facts["missing"] == 8
        assert facts["total_steps"] == 32
        assert facts["texts"] == {}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["audition", "--slices", "v3"], "--slices v3: read by the main path before step 20"),
        (["audition", "--slices", "v9"], "v9.slice: there is no such slice"),
        (["audition", "--slices", "v4", "--from", "19"], "no complete checkpoint of that step"),
        (["audition", "--slices", "v4", "--steps", "60"], "3 repeats of 60 steps need 3,840 tokens each"),
        (["probe", "--from", "20"], "complete checkpoints there: 8 and 16"),
        (["probe", "--rates", "1", "2"], "1 is always tried"),
        (["probe", "--rates", "0.05"], "below min_lr"),
        (["probe", "--show", "--", "--seed", "3"], "need a training"),
    ],
)
def test_what_cannot_be_tried_is_refused_before_anything_is_written(
    plan: Path, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(Path(load_plan(plan).output).rglob("*"))
    assert main([argv[0], str(plan), *argv[1:]]) == 2
    assert said in capsys.readouterr().err
    assert sorted(Path(load_plan(plan).output).rglob("*")) == before


def test_a_plan_without_a_checkpoint_or_with_a_falling_rate_is_refused(tmp_path: Path) -> None:
    path = make_plan(tmp_path, (6, 6))
    with pytest.raises(UserError, match="no checkpoint yet"):
        make_audition(load_plan(path), ["v3"], [0.0], None, None, 3)
    with pytest.raises(UserError, match="none is complete at step 6"):
        make_probe(load_plan(path), [0.7], None, None, 3, 0.5)
    keys = yaml.safe_load(path.read_text())
    keys["schedule"]["main"] = {"power": 0.5, "from": 3}
    path.write_text(yaml.safe_dump(keys))
    with pytest.raises(UserError, match="falls by schedule"):
        make_probe(load_plan(path), [0.7], None, None, 3, 0.5)

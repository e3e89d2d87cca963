"""`lrpath adopt`: a checkpoint of plain Megatron begins a main path; positions, samples and rates continue."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from megatron_lrpath.cli import main
from megatron_lrpath.errors import PlanError, UserError
from megatron_lrpath.plan import Plan, load_plan, run_identity
from megatron_lrpath.plan.file.edit import with_key
from megatron_lrpath.plan.identity import differences
from megatron_lrpath.runs.checkpoints import complete_steps, sum_files
from megatron_lrpath.runs.lineage import read_lineage
from megatron_lrpath.training.adoption import Trained
from megatron_lrpath.upkeep.adopt import Adoption, carry_out, prepare, require_rate
from tests.support.adopting import call
from tests.support.killed_at import dies_at
from tests.support.training_fixtures import history, make_plan, run_words, train
from tests.training.test_training_branch import refusal, tensors
from tests.training.test_training_data import samples
from tests.training.test_training_rates import words_without_plan

STEP, SAMPLES = 5, 20  # steps of four samples each


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a plan of two versions and `old`: five steps of plain Megatron at one rate."""
    folder = tmp_path_factory.mktemp("adopt")
    plan = make_plan(folder, (6, 6))
    schedule = ["--lr", "0.01", "--lr-decay-style", "constant", "--lr-warmup-iters", "2"]
    argv = [
        *words_without_plan(plan, folder),
        *schedule,
        "--train-iters",
        str(STEP),
        "--save",
        str(folder / "old"),
    ]
    train(argv).ok()
    return folder


def fresh(trained: Path, folder: Path, **changes: object) -> Path:
    """Write a plan on the data of `trained` with its own output; return its path."""
    path = folder / "plan.yaml"
    content = yaml.safe_load((trained / "plan.yaml").read_text()) | {"output": str(folder / "runs")} | changes
    path.write_text("# ours\n" + yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.mark.slow
def test_the_main_path_continues_from_the_checkpoint(trained: Path, tmp_path: Path) -> None:
    before = sum_files(trained / "old/iter_0000005")
    path = fresh(trained, tmp_path)
    argv = ["adopt", str(path), "--checkpoint", str(trained / "old"), "--step", "5", "--data", "v1"]
    statuses, said = call(tmp_path, [*argv, "--dry-run"], argv, argv)
    assert statuses == [0, 0, 0], said
    assert "step 5, 20 samples, 320 tokens; data: v1" in said
    assert "continues from step 5 at 0.01 with v1; its costs count from there" in said
    assert "nothing to do" in said
    plan = load_plan(path)
    assert path.read_text().startswith("# ours\n")
    assert plan.adopted is not None
    assert (plan.adopted.step, plan.adopted.samples, plan.adopted.data) == (STEP, SAMPLES, ("v1",))
    root = tmp_path / "runs/ours/main/checkpoints"
    assert tensors(root / "iter_0000005") == tensors(trained / "old/iter_0000005"), "weights and moments"
    read = samples(path, "ours", "main")
    assert [
        (row["step"], row["consumed_samples"], row["lr"]) for row in history(tmp_path / "runs/ours/main")
    ] == [(step, 4 * step, 0.01) for step in range(6, 15)]
    assert complete_steps(root) == [5, 8, 11, 14]
    whole = fresh(trained, trained)  # its main path begins with random weights and reads the same versions
    assert read == samples(whole, "ours", "main")[:36]
    assert samples(path, "ours", "branch-v1", nproc=2) == read[12:24]
    lineage = read_lineage(tmp_path / "runs/ours/main") or {}
    assert lineage["parent"] == {
        "run": "adopted",
        "step": STEP,
        "checkpoints": str(trained / "old"),
        "fingerprint": plan.adopted.fingerprint,
    }
    assert sum_files(trained / "old/iter_0000005") == before
    shutil.rmtree(tmp_path / "runs")
    assert "the adopted checkpoint of step 5 is not there. Copy it: lrpath adopt" in refusal(
        run_words(path, "ours", "main")
    )


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_is_written(
    trained: Path, tmp_path: Path
) -> None:
    model = yaml.safe_load((trained / "plan.yaml").read_text())["model"]
    cases = {
        "model": ({"model": model | {"num_layers": 3}}, "num_layers is 2 there and 3 here"),
        "length": (
            {"batch": {"global_batch_size": 4, "micro_batch_size": 2, "seq_length": 8}},
            "seq_length is 16",
        ),
        "tokenizer": (
            {"tokenizer": {"type": "NullTokenizer", "vocab_size": 121}},
            "its tokenizer has 120 tokens, the plan's 121",
        ),
        "rate": (
            {"schedule": {"style": "cosine", "max_lr": 0.02, "warmup_steps": 2}},
            "its next step would have the learning rate 0.01, and the main path of",
        ),
        "optimizer": (
            {"megatron": {"use_distributed_optimizer": False}},
            "saved with --use-distributed-optimizer",
        ),
        "beta": ({"megatron": {"adam_beta2": 0.9}}, "differs: adam_beta2 was 0.999, is 0.9"),
    }
    calls = []
    for name, (changes, _) in cases.items():
        (tmp_path / name).mkdir()
        path = fresh(trained, tmp_path / name, **changes)
        calls.append(["adopt", str(path), "--checkpoint", str(trained / "old"), "--dry-run"])
    statuses, said = call(tmp_path, *calls)
    parts = said.split("== adopt")[1:]
    assert statuses == [2] * 5 + [0], said
    for part, (_, message) in zip(parts, cases.values(), strict=True):
        assert message in part
        assert "Traceback" not in part
    assert not [one for name in cases for one in (tmp_path / name).glob("runs/*")]


def adoption(trained: Path, path: Path) -> Adoption:
    """Return the adoption of the old checkpoint by the plan at `path`."""
    return prepare(load_plan(path), trained / "old", STEP, SAMPLES, [])


@pytest.mark.slow
def test_killed_anywhere_it_can_be_called_again(trained: Path, tmp_path: Path) -> None:
    before = sum_files(trained / "old/iter_0000005")
    for number in range(1, 40):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = fresh(trained, folder)
        one = adoption(trained, path)
        was_killed = dies_at(number, lambda: carry_out(one) or 0)  # noqa: B023
        if was_killed and complete_steps(one.root):
            assert load_plan(path).adopted is not None, "the plan names the checkpoint before it is one"
        again = adoption(trained, path)
        if not again.is_done:
            carry_out(again)
        assert adoption(trained, path).is_done
        assert complete_steps(one.root) == [STEP]
        plan = load_plan(path)
        stored = (read_lineage(plan.folder(plan.main)) or {})["identity"]
        assert (
            differences(stored | {"slices": {}}, run_identity(plan, plan.main) | {"tokenizer_model": None})
            == []
        )
        if not was_killed:
            break
    assert number > 6
    assert sum_files(trained / "old/iter_0000005") == before


def adopted(folder: Path, **changes: object) -> Plan:
    """Return a plan whose main path begins at step 50 after 1000 samples."""
    path = make_plan(folder, (6, 8))
    entry = {"checkpoint": "old/iter_0000050", "step": 50, "samples": 1000, "fingerprint": "0" * 64}
    path.write_text(path.read_text() + yaml.safe_dump({"adopted": entry} | changes))
    return load_plan(path)


def test_positions_and_costs_count_from_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = adopted(tmp_path)
    assert plan.timeline.ends == [56, 64]
    main_path, first, second = plan.runs("ours")
    assert (main_path.first_step, main_path.last_step) == (50, 60)
    assert [(run.first_step, run.last_step) for run in (first, second)] == [(53, 56), (60, 64)]
    assert main_path.path.lr_at(50) == 0.01, "no second warm-up"
    assert 50 in main_path.keep_steps
    assert plan.batch_sizes.samples_at(50) == 1000
    assert plan.cost("ours").steps == 10 + 3 + 4
    assert plan.runs("ptfs") == plan.runs("cpt") == []
    identity = run_identity(plan, first)
    assert identity["adopted"] == {"step": 50, "samples": 1000, "fingerprint": "0" * 64}
    for argv, wanted in (
        (["plan"], 0),
        (["plan", "--json"], 0),
        (["plan", "--paradigm", "ptfs"], 2),
        (["status"], 0),
    ):
        assert main([argv[0], str(plan.path), *argv[1:]]) == wanted, argv
    said = capsys.readouterr()
    assert "--paradigm ptfs:" in said.err
    assert "PTFS" not in said.out.replace("relative to PTFS", "")


def test_what_an_adopted_plan_cannot_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        PlanError, match="ptfs cannot be trained: the main path begins with an adopted checkpoint"
    ):
        adopted(tmp_path, paradigms=["ours", "ptfs"])
    with pytest.raises(PlanError, match="leave pretrained_checkpoint out"):
        adopted(tmp_path, megatron={"pretrained_checkpoint": "imported"})
    with pytest.raises(PlanError, match="step 40 lies before the adopted checkpoint, step 50"):
        adopted(tmp_path, also_branch_at=[40])


@pytest.mark.slow
def test_an_output_with_runs_and_a_checkpoint_without_a_rate_are_refused(
    trained: Path, tmp_path: Path
) -> None:
    path = fresh(trained, tmp_path)
    one = adoption(trained, path)
    assert Trained(SAMPLES, None, ()).rate is None
    with pytest.raises(UserError, match="has no learning rate"):
        require_rate(one, None)
    (tmp_path / "runs/ptfs/scratch-v1").mkdir(parents=True)
    with pytest.raises(UserError, match=r"ptfs/scratch-v1: trained already.*another `output`"):
        adoption(trained, path)
    with pytest.raises(UserError, match=r"no complete checkpoint of step 7; it has steps 5"):
        prepare(load_plan(path), trained / "old", 7, SAMPLES, [])
    with pytest.raises(UserError, match="v9"):
        prepare(load_plan(path), trained / "old", STEP, SAMPLES, ["v9"])


def test_a_key_is_added_at_the_end_and_the_rest_stays(tmp_path: Path) -> None:
    text = "name: a   # ours\nversions: [1]"
    assert with_key(tmp_path, text, "adopted", {"step": 5, "data": ["v1", "v2"]}) == (
        "name: a   # ours\nversions: [1]\nadopted:\n  step: 5\n  data: [v1, v2]\n"
    )
    with pytest.raises(PlanError, match="cannot be edited as it is written"):
        with_key(tmp_path, "{name: a}", "adopted", {"step": 5})

"""A branch starts with its parent's state at the branch point, never changes it, and checks its parent."""

from __future__ import annotations

import hashlib
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from megatron_lrpath.cli import main
from megatron_lrpath.models import ROPE_FACTOR
from megatron_lrpath.plan import load_plan
from megatron_lrpath.runs.checkpoints import complete_steps
from megatron_lrpath.training.checkpoints import parent
from tests.support.training_fixtures import history, make_plan, run_words, train

LONG = [
    {"name": "v1", "steps": 6},
    {"name": "v2", "steps": 6},
    {"name": "v3", "steps": 6, "alpha": 2},
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a plan and its main path trained (branch points at steps 3, 9, 15)."""
    folder = tmp_path_factory.mktemp("trained")
    train(run_words(make_plan(folder), "ours", "main")).ok()
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of the trained folder's plan and runs that a test may change; the data are not copied."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    plan = yaml.safe_load((trained / "plan.yaml").read_text())
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan | {"output": str(tmp_path / "runs")}))
    return tmp_path


def change(folder: Path, **keys: object) -> Path:
    """Change keys of the plan file in `folder`; return its path."""
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | keys, sort_keys=False))
    return path


def digests(folder: Path) -> dict[str, str]:
    """Return every file below `folder` with the digest of its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_branch_has_arguments_of_its_own(tmp_path: Path) -> None:
    """The branch's optimizer has them from its first step and after a resume; the main path's does not."""
    plan = make_plan(tmp_path, (6, 6), megatron={"adam_beta2": 0.95}, branch_megatron={"adam_beta2": 0.999})
    for name, beta, extra in (
        ("main", 0.95, []),
        ("branch-v2", 0.999, ["--exit-interval", "10"]),
        ("branch-v2", 0.999, []),
    ):
        outcome = train(run_words(plan, "ours", name, *extra), probe="betas").ok()
        assert set(outcome.probed[0]) == {(0.9, beta)}, name
    refused = train(run_words(plan, "ours", "branch-v1", "--adam-beta2", "0.95"))
    assert "whose `branch_megatron` makes it 0.999" in refused.output


def test_the_main_path_keeps_branch_points_and_version_ends_at_any_retention(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, megatron={"save_interval": 2, "save_retain_interval": 1000})
    train(run_words(plan, "ours", "main")).ok()
    kept = complete_steps(tmp_path / "runs/ours/main/checkpoints")
    assert set(kept) >= {3, 6, 9, 12, 15}
    assert not {2, 4, 8, 10} & set(kept)


def test_a_branch_starts_with_the_parents_state_bit_for_bit(copy: Path) -> None:
    """The main path, stopped at the branch point and started again, has exactly the branch's initial state."""
    plan = copy / "plan.yaml"
    branch = train(run_words(plan, "ours", "branch-v2"), probe="state_at_start").ok().probed[0]
    assert (branch["iteration"], branch["consumed_train_samples"]) == (9, 36)
    for folder in ("iter_0000012", "iter_0000015"):
        shutil.rmtree(copy / "runs/ours/main/checkpoints" / folder)
    (copy / "runs/ours/main/checkpoints/latest_checkpointed_iteration.txt").write_text("9")
    parent = train(run_words(plan, "ours", "main"), probe="state_at_start").ok().probed[0]
    assert branch == parent


def test_the_parent_is_never_written_to(copy: Path) -> None:
    before = digests(copy / "runs/ours/main")
    train(run_words(copy / "plan.yaml", "ours", "branch-v2")).ok()
    assert digests(copy / "runs/ours/main") == before


@pytest.mark.parametrize(
    ("nproc", "layout"),
    [
        (2, ["--tensor-model-parallel-size", "2"]),
        (2, ["--pipeline-model-parallel-size", "2"]),
        (2, ["--use-distributed-optimizer"]),
    ],
    ids=["tp2", "pp2", "dp2-distributed-optimizer"],
)
def test_a_branch_at_another_layout_holds_the_parents_tensors(
    copy: Path, nproc: int, layout: list[str]
) -> None:
    """After resharding on load and a save without a step, every gathered tensor equals the parent's."""
    argv = run_words(copy / "plan.yaml", "ours", "branch-v2", *layout)
    train(argv, nproc=nproc, probe="save_at_start").ok()
    parent = tensors(copy / "runs/ours/main/checkpoints/iter_0000009")
    branch = tensors(copy / "runs/ours/branch-v2/checkpoints/iter_0000009")
    assert parent
    assert branch == parent


def tensors(checkpoint: Path) -> dict[str, str]:
    """Return digests of the weights and Adam moments in a checkpoint, gathered to whole tensors, by name."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    from tests.support.probes import digest

    found: dict[str, object] = {}
    reader = dcp.FileSystemReader(checkpoint)
    _load_state_dict(found, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return dict(flat(found, digest))


def flat(value: object, digest: object, name: str = "") -> list[tuple[str, str]]:
    """Return the leaves that are weights or moments, their names joined with dots."""
    if isinstance(value, dict):
        return [
            leaf
            for key, item in value.items()
            for leaf in flat(item, digest, f"{name}.{key}" if name else key)
        ]
    wanted = (
        hasattr(value, "shape") and "rng" not in name and "rerun" not in name and "extra_state" not in name
    )
    return [(name, digest(value))] if wanted else []  # type: ignore[operator]


def test_a_second_start_resumes_the_branch(copy: Path) -> None:
    plan = copy / "plan.yaml"
    train(run_words(plan, "ours", "branch-v2", "--exit-interval", "10")).ok()
    assert [line["step"] for line in history(copy / "runs/ours/branch-v2")] == [10]
    train(run_words(plan, "ours", "branch-v2")).ok()
    assert [line["step"] for line in history(copy / "runs/ours/branch-v2")] == [10, 11, 12]
    third = train(run_words(plan, "ours", "branch-v2")).ok()
    assert "nothing to train" in third.output


def refusal(argv: list[str], nproc: int = 1) -> str:
    """Return the only message of a start that is refused with exit code 2 and without a stack trace."""
    outcome = train(argv, nproc)
    assert outcome.status == [2] * nproc, outcome.output[-3000:]
    assert "Traceback" not in outcome.output
    return outcome.output.partition("lrpath: error: ")[2]


def test_a_missing_branch_point_is_refused_with_the_steps_that_exist(copy: Path) -> None:
    shutil.rmtree(copy / "runs/ours/main/checkpoints/iter_0000009")
    message = refusal(run_words(copy / "plan.yaml", "ours", "branch-v2"))
    assert "no checkpoint of step 9" in message
    assert "3, 6, 12, 15" in message


def test_a_parent_of_another_model_is_refused(copy: Path, tmp_path: Path) -> None:
    model = yaml.safe_load((copy / "plan.yaml").read_text())["model"]
    plan = change(copy, model=model | {"num_layers": 3})
    message = refusal(run_words(plan, "ours", "branch-v2"))
    assert "num_layers" in message


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"seed": 8}, "seed: was 7, is 8"),
        ({"schedule": {"style": "cosine", "max_lr": 0.02, "min_lr": 0.001, "warmup_steps": 2}}, "max_lr"),
        ({"megatron": {"adam_beta2": 0.9}}, "adam_beta2"),
    ],
)
def test_a_parent_of_another_plan_is_refused(copy: Path, keys: dict[str, object], said: str) -> None:
    message = refusal(run_words(change(copy, **keys), "ours", "branch-v2"))
    assert said in message
    assert not (copy / "runs/ours/branch-v2").exists()


def test_a_parent_changed_after_the_branch_left_it_is_refused(copy: Path) -> None:
    plan = copy / "plan.yaml"
    train(run_words(plan, "ours", "branch-v2", "--exit-interval", "10")).ok()
    weights = next((copy / "runs/ours/main/checkpoints/iter_0000009").glob("*.distcp"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert "is not the parent that branch-v2 was started from" in refusal(
        run_words(plan, "ours", "branch-v2")
    )


def test_a_moved_slice_is_refused(copy: Path, trained: Path) -> None:
    shutil.copytree(trained / "data", copy / "data")
    data = {"slices": str(copy / "data/slices"), "valid": str(copy / "data/slices/valid")}
    (copy / "data/slices/v3.slice").rename(copy / "data/slices/v2.slice")
    assert "slice" in refusal(run_words(change(copy, data=data), "ours", "branch-v2"))


def test_an_argument_that_contradicts_the_plan_is_refused(copy: Path) -> None:
    plan = copy / "plan.yaml"
    for argv, said in (
        (["--lr", "0.5"], "--lr 0.5 contradicts"),
        (["--train-iters", "99"], "--train-iters 99 contradicts"),
        (["--num-layers", "7"], "--num-layers 7 contradicts"),
        (["--lr-warmup-iters", "3"], "schedule.warmup_steps"),
        (["--data-path", "elsewhere"], "--data-path"),
        (["--no-load-optim"], "--no-load-optim"),
        (["--lr-path", "main"], "the plan sets the path"),
    ):
        assert said in refusal(run_words(plan, "ours", "branch-v2", *argv))
    assert "has no run 'branch-v9'" in refusal(run_words(plan, "ours", "branch-v9"))


def test_what_leaves_the_result_alone_may_be_overridden(copy: Path) -> None:
    argv = run_words(
        copy / "plan.yaml", "ours", "branch-v2", "--micro-batch-size", "1", "--save-interval", "1"
    )
    train(argv).ok()
    assert complete_steps(copy / "runs/ours/branch-v2/checkpoints") == [10, 11, 12]


def test_a_branch_that_begins_before_its_data_reads_the_main_paths_batches(tmp_path: Path) -> None:
    """With alpha 2 off a version's end the branch reads the main path's batches, also over a restart."""
    make_plan(tmp_path, (6, 6, 6))
    plan = change(tmp_path, versions=LONG)
    main_path = train(run_words(plan, "ours", "main"), probe="tokens").ok().probed[0]
    read = []
    for extra in (["--exit-interval", "10"], []):
        read += train(run_words(plan, "ours", "branch-v3", *extra), probe="tokens").ok().probed[0]
    run = load_plan(plan).run("ours", "branch-v3")
    assert len(main_path) == 2 * 9  # micro batches
    assert len(read) == 2 * run.steps == 2 * 12
    assert read[:6] == main_path[12:]
    branch = history(tmp_path / "runs/ours/branch-v3")
    assert [line["lr"] for line in branch] == [run.path.lr_at(step - 1) for step in range(7, 19)]
    begin = next(line for line in history(tmp_path / "runs/ours/main") if line["step"] == 7)
    assert branch[0]["loss"] == begin["loss"]
    change(tmp_path, versions=[one | {"alpha": 0.5} for one in LONG], output=str(tmp_path / "whole"))
    whole = train(run_words(plan, "ours", "main"), probe="tokens").ok().probed[0]
    assert read[:18] == whole[12:]


def test_a_branch_point_that_the_main_path_has_passed_is_refused_with_the_steps_that_are_kept(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = [
        {"name": "v1", "steps": 6},
        {"name": "v2", "steps": 6},
        {"name": "v3", "steps": 6, "alpha": 1.3},
    ]
    plan = change(copy, versions=versions)
    assert main(["plan", str(plan)]) == 2
    said = capsys.readouterr().err
    assert "starts from the checkpoint of ours/main at step 10, which is not in" in said
    assert "5 checkpoints: 3, 6, 9, 12, 15" in said
    refused = train(run_words(plan, "ours", "branch-v3"))
    assert refused.status == [2]
    assert "10" in refused.output


def test_a_checkpoint_of_another_factor_of_stretched_positions_is_refused() -> None:
    sizes = {"group_query_attention": False, "num_attention_heads": 4, "num_query_groups": 1}
    stored = Namespace(**sizes, use_rope_scaling=True, rope_scaling_factor=32.0, consumed_train_samples=4)
    args = Namespace(**sizes, use_rope_scaling=True, rope_scaling_factor=32.0)
    (found,) = parent.differences(stored, args, ())
    assert found.startswith(
        "it was trained with a rope_scaling_factor of 8, this run has 32 (Megatron 0.19 ignores"
    )
    args.rope_scaling_factor = 8.0
    assert parent.differences(stored, args, ()) == []
    setattr(stored, ROPE_FACTOR, 32.0)
    assert parent.differences(stored, args, ()) == [
        "it was trained with a rope_scaling_factor of 32, this run has 8"
    ]

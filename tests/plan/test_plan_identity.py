"""Identity of a run: appended versions and neutral changes keep it, all other changes are reported."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_lrpath.plan import PARADIGMS, differences, load_plan, run_identity
from megatron_lrpath.plan.arguments import is_neutral
from megatron_lrpath.runs import lineage
from tests.support.plan_text import SOUND, plan_with, versions


def identities(folder: Path, **changes: Any) -> dict[str, dict[str, Any]]:
    """Return the identity of every run as it is read from a file, by paradigm/run."""
    plan = plan_with(folder, **changes)
    runs = [run for paradigm in PARADIGMS for run in plan.runs(paradigm)]
    return {f"{run.paradigm}/{run.name}": json.loads(json.dumps(run_identity(plan, run))) for run in runs}


def changed_keys(folder: Path, run: str, **changes: Any) -> list[str]:
    """Return the keys of a run's identity that differ after these changes to the plan."""
    return differences(identities(folder)[run], identities(folder, **changes)[run])


@pytest.mark.parametrize("variant", ["reset-max", "rewarm-max", "keep-min", "autoregressive"])
@pytest.mark.parametrize("style", ["cosine", "knee", "multi-step", "wsd", "inverse-square-root"])
def test_appending_a_version_keeps_every_identity(tmp_path: Path, style: str, variant: str) -> None:
    common = {"schedule": {"style": style}, "cpt_variant": variant}
    before = identities(tmp_path, **common)
    after = identities(tmp_path, versions=versions(3), **common)
    for name, identity in before.items():
        assert differences(identity, after[name]) == []
        if name == "ours/main":
            assert after[name]["versions"][:2] == identity["versions"]
            assert {k: v for k, v in after[name].items() if k != "versions"} == {
                k: v for k, v in identity.items() if k != "versions"
            }
        else:
            assert after[name] == identity


@pytest.mark.parametrize("rate", [1e-2, 3e-3, 6e-4, 3e-4, 8e-4, 1.5e-3])
def test_the_default_of_min_lr_is_what_would_be_written(tmp_path: Path, rate: float) -> None:
    """A tenth by division is a different number: 3e-4 / 10 is 2.9999999999999997e-05."""
    content = yaml.safe_load(SOUND)
    content["schedule"] |= {"max_lr": rate}
    del content["schedule"]["min_lr"]
    path = tmp_path / "without.yaml"
    path.write_text(yaml.safe_dump(content))
    assert load_plan(path).schedule.min_lr == float(f"{rate / 10:.3e}")


def test_the_last_versions_alpha_does_not_matter_to_the_main_path(tmp_path: Path) -> None:
    changed = [{"name": "v1", "steps": 100}, {"name": "v2", "steps": 100, "alpha": 0.3}]
    assert changed_keys(tmp_path, "ours/main", versions=changed) == []
    assert changed_keys(tmp_path, "ours/branch-v1", versions=changed) == []
    assert changed_keys(tmp_path, "ours/branch-v2", versions=changed) == [
        "learning rate of branch-v2.cycle: was 60, is 30",
        "learning rate of branch-v2.start: was 140, is 170",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": {"micro_batch_size": 4}},
        {"output": "elsewhere"},
        {"name": "renamed"},
        {"data": {"slices": "moved/slices", "valid": "moved/slices/valid"}},
        {
            "megatron": {
                "tensor-model-parallel-size": 2,
                "log_interval": 5,
                "save-interval": 7,
                "eval_iters": 3,
            }
        },
        {"megatron": {"use_pytorch_profiler": True, "tensorboard_queue_size": 5, "bf16": False}},
        {"schedule": {"knee_explore": 0.3, "wsd_decay_fraction": 0.3, "multi_step_fractions": [0.5, 0.6]}},
        {"model": {"recipe": "tiny"}},
    ],
)
def test_what_does_not_change_a_result_does_not_change_an_identity(tmp_path: Path, changes: dict) -> None:
    assert identities(tmp_path, **changes) == identities(tmp_path)


@pytest.mark.parametrize(
    ("changes", "run", "said"),
    [
        ({"seed": 7}, "ours/main", "seed: was 1234, is 7"),
        ({"model": {"recipe": "tiny", "num_layers": 6}}, "ours/main", "model.num_layers: was 4, is 6"),
        ({"batch": {"seq_length": 512}}, "ptfs/scratch-v2", "batch.seq_length: was 256, is 512"),
        ({"batch": {"global_batch_size": 64}}, "ours/main", "batch.global_batch_size: was 32, is 64"),
        (
            {"tokenizer": {"model": "other"}},
            "ours/main",
            "tokenizer.model: was data/tokenizer.model, is other",
        ),
        ({"megatron": {"bf16": True}}, "ours/main", "megatron.bf16: was not given, is True"),
        ({"schedule": {"max_lr": 2e-3}}, "ours/main", "learning rate of main.max_lr: was 0.001, is 0.002"),
        ({"schedule": {"warmup_steps": 10}}, "ours/branch-v2", "learning rate of main.warmup: was 20, is 10"),
        (
            {"schedule": {"style": "knee"}},
            "ours/branch-v2",
            "learning rate of branch-v2.style: was cosine, is knee",
        ),
        ({"schedule": {"min_lr": 0.0}}, "cpt/continual-v2", "continual-v1.min_lr: was 0.0001, is 0.0"),
        ({"cpt_variant": "rewarm-max"}, "cpt/continual-v2", "continual-v2.warmup: was 0, is 20"),
        ({"cpt_variant": "keep-min"}, "cpt/continual-v2", "continual-v2.shape: was whole, is floor"),
        ({"cpt_variant": "autoregressive"}, "cpt/continual-v2", "continual-v2.peak: was not given, is "),
        (
            {"versions": [{"name": "v1", "steps": 110}, {"name": "v2", "steps": 100}]},
            "ours/main",
            "version 1: was v1 with 100 steps, is v1 with 110 steps",
        ),
        ({"versions": versions(1)}, "ours/main", "v2 with 100 steps was there and is gone"),
        ({"schedule": {"cycle_steps": "inf"}}, "ptfs/scratch-v2", "scratch-v2.cycle: was 200, is inf"),
    ],
)
def test_changes_that_affect_a_result_are_reported(
    tmp_path: Path, changes: dict, run: str, said: str
) -> None:
    assert any(said in line for line in changed_keys(tmp_path, run, **changes))


def test_the_file_of_a_tokenizer_may_be_moved(tmp_path: Path) -> None:
    before = identities(tmp_path)["ours/main"]
    moved = identities(tmp_path, tokenizer={"model": "elsewhere/tokenizer.model"})["ours/main"]
    renamed = identities(tmp_path, tokenizer={"model": "data/other.model"})["ours/main"]
    digest = {"tokenizer_model": "0" * 64}
    assert differences(before | digest, moved) == []
    assert differences(before, moved)  # a folder, or a name on a hub
    assert differences(before | digest, renamed) == ["tokenizer.model: was tokenizer.model, is other.model"]
    changed = moved | {"tokenizer_model": "1" * 64, "slices": {}, "arguments": {}}
    stored = before | digest | {"slices": {}, "arguments": {}}
    assert lineage.differences(stored, changed) == ["the tokenizer's model file has changed"]


def test_knobs_matter_to_the_styles_that_read_them(tmp_path: Path) -> None:
    knee = {"schedule": {"style": "knee"}}
    other = {"schedule": {"style": "knee", "knee_explore": 0.3}}
    before, after = identities(tmp_path, **knee), identities(tmp_path, **other)
    changed = {name for name in before if differences(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(("ptfs/", "cpt/"))}


def test_the_main_path_does_not_depend_on_the_shape_of_the_decay(tmp_path: Path) -> None:
    assert changed_keys(tmp_path, "ours/main", schedule={"style": "wsd", "min_lr": 0.0}) == []


def test_a_run_that_is_carried_out_as_another_has_its_identity(tmp_path: Path) -> None:
    found = identities(tmp_path)
    assert found["cpt/continual-v1"] == found["ptfs/scratch-v1"]


def test_a_different_run_is_reported(tmp_path: Path) -> None:
    found = identities(tmp_path)
    lines = differences(found["ours/branch-v1"], found["ours/branch-v2"])
    assert "run: was branch-v1, is branch-v2" in lines
    assert "v2 with 100 steps was not there" in lines
    assert "chain of runs: was main → branch-v1, is main → branch-v2" in lines


def test_shuffled_and_chained_data_are_distinguished(tmp_path: Path) -> None:
    found = identities(tmp_path)
    assert found["ptfs/scratch-v2"]["order"] != found["ours/main"]["order"]


@pytest.mark.parametrize(
    "name", ["bf16", "adam_beta2", "weight_decay", "clip_grad", "loss_scale", "fp8_format"]
)
def test_what_trains_differently_is_not_neutral(name: str) -> None:
    assert not is_neutral(name)


def test_what_an_older_version_counted_and_this_one_does_not_is_no_difference(tmp_path: Path) -> None:
    """Lineages of earlier versions have arguments that are classified as neutral now."""
    now = identities(tmp_path)["ours/main"]
    stored = now | {"megatron": now["megatron"] | {"use_mcore_models": True}}
    assert differences(stored, now) == []
    assert differences(now | {"megatron": now["megatron"] | {"fp16": True}}, now) != []

"""Export: any layout gives the same folder, memory stays small, what cannot be exported is refused."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lrpath.errors import UserError
from megatron_lrpath.export import architecture
from megatron_lrpath.export.architecture import Architecture
from megatron_lrpath.export.card import Origin, evaluation, origin_of, training
from megatron_lrpath.export.checkpoint import CheckpointReader, CheckpointTensor, write_checkpoint
from megatron_lrpath.export.config import to_config
from megatron_lrpath.export.folder import refuse_target
from megatron_lrpath.export.weights import FileTensor, into_shards, tensor_mappings, write_weights
from megatron_lrpath.files import appearing_folder
from megatron_lrpath.plan import load_plan
from tests.support.export_worker import transformers_model, weights
from tests.support.training_fixtures import MODEL, launch, make_plan, run_words, train
from tests.support.years_tree import train as train_tree
from tools.import_hf import common_state, extra_states

SMALL = Architecture("llama", 2, 32, 48, 4, 2, 8, 101, 64, 10000.0, 1e-5, tied=False)


def run_commands(*commands: list[str]) -> Any:
    """Run `lrpath` commands in a forked process."""
    return launch("tests.support.export_worker:commands", [json.dumps(command) for command in commands])


def save_model(
    folder: Path, model: Architecture, dtype: torch.dtype = torch.float32, padding: int = 27
) -> Path:
    """Write a checkpoint of random values without Megatron; return its step's folder."""
    slots = []
    for source in tensor_mappings(model):
        padded = source.layer is None and len(source.shape) == 2
        shape = (source.shape[0] + padding, *source.shape[1:]) if padded else source.shape
        slots.append(CheckpointTensor(source.key, shape, dtype, source.layer, model.layers))

    def value(slot: CheckpointTensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(slot.key) * 100 + (slot.layer or 0))
        return torch.randn(slot.shape, generator=generator)

    step = folder / "iter_0000001"
    write_checkpoint(step, slots, value, common_state(model, dtype, None), extra_states(model.layers))
    return step


def test_every_parallel_layout_exports_to_the_same_bytes(tmp_path: Path) -> None:
    tied_qwen = MODEL | {"add_qkv_bias": True, "untie_embeddings_and_output_weights": False}
    plan = make_plan(tmp_path, versions=(4, 4), model=tied_qwen, license="apache-2.0")
    train(run_words(plan, "ours", "main")).ok()
    layouts = {"branch-v1": "--tensor-model-parallel-size", "branch-v2": "--pipeline-model-parallel-size"}
    for run, layout in layouts.items():  # the parent's weights, saved by two ranks
        train(run_words(plan, "ours", run, layout, "2"), nproc=2, probe="save_at_start")
    export = ["export", str(plan), "--output"]
    steps = {"branch-v1": "2", "branch-v2": "6"}
    wanted = [[*export, str(tmp_path / run), "--run", run, "--step", step] for run, step in steps.items()]
    wanted += [
        [*export, str(tmp_path / f"{run}-main"), "--run", "main", "--step", steps[run]] for run in steps
    ]
    run_commands(*wanted).ok()
    folders = {path: plan_folder(plan, path) for path in steps}
    assert [len(list(folder.glob("iter_*/__*_0.distcp"))) for folder in folders.values()] == [2, 2]
    for run in steps:
        one, other = tmp_path / run / "model.safetensors", tmp_path / f"{run}-main" / "model.safetensors"
        assert one.read_bytes() == other.read_bytes(), run
    assert (tmp_path / "branch-v1/model.safetensors").read_bytes() != (
        tmp_path / "branch-v2/model.safetensors"
    ).read_bytes()
    card = (tmp_path / "branch-v2/README.md").read_text()
    said = [
        "# tiny-test branch-v2",
        'license: "apache-2.0"',
        "tokens trained on | 384, ",
        "v2 (2 of 2)",
        "main, step 6",
        "| 0.5 |",
        "cosine, 0.01 to 0.001",
        "Qwen2ForCausalLM",
        "prose",
    ]
    assert [word for word in said if word not in card] == []
    assert "## Usage" not in card  # there is no tokenizer to use it with
    assert re.search(r"fingerprint of slice v2 \| [0-9a-f]{64}", card)


def plan_folder(path: Path, run: str) -> Path:
    """Return the folder of a run's checkpoints."""
    plan = load_plan(path)
    return plan.folder(plan.run("ours", run)) / "checkpoints"


def test_memory_stays_at_a_few_tensors(tmp_path: Path) -> None:
    big = Architecture("llama", 16, 512, 2048, 8, 4, 64, 999, 64, 10000.0, 1e-5, tied=False)
    step = save_model(tmp_path, big)
    total = sum(path.stat().st_size for path in step.iterdir())
    largest = 2 * 2048 * 512 * 4  # gate and up together
    argv = [str(step), str(tmp_path / "hf"), str(tmp_path / "back")]
    launch("tests.support.export_worker:peak_growth", argv).ok()
    for growth in json.loads((tmp_path / "growth.json").read_text()):
        assert growth < 6 * largest < total / 4, (growth, total)


def test_padded_rows_and_numbered_layers_are_read(tmp_path: Path) -> None:
    stacked = save_model(tmp_path / "stacked", SMALL)
    numbered = tmp_path / "numbered"
    reader = CheckpointReader(stacked)
    slots, values = [], {}
    for source in tensor_mappings(SMALL):
        key = source.key
        if source.layer is not None:
            key = key.replace("layers.", f"layers.{source.layer}.")
        slots.append(CheckpointTensor(key, source.shape, torch.float32, None, 0))
        values[key] = reader.read(source.key, source.layer, source.shape)
    write_checkpoint(
        numbered, slots, lambda slot: values[slot.key], common_state(SMALL, torch.float32, None), []
    )
    for name, step in (("a", stacked), ("b", numbered)):
        (tmp_path / name).mkdir()
        write_weights(CheckpointReader(step), SMALL, tmp_path / name, None, 10**9)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert reader.find("output_layer.weight", None)[1].size[0] == 128
    assert values["output_layer.weight"].shape == (101, 32)


def test_types_are_kept_or_converted_and_files_split_by_size(tmp_path: Path) -> None:
    step = save_model(tmp_path, SMALL, torch.bfloat16)
    for dtype, expected in ((None, torch.bfloat16), ("float16", torch.float16)):
        folder = tmp_path / str(dtype)
        folder.mkdir()
        names = write_weights(CheckpointReader(step), SMALL, folder, dtype, 8000)
        config = to_config(SMALL, str(expected).removeprefix("torch."), {})
        (folder / "config.json").write_text(json.dumps(config))
        model = transformers_model(folder)
        assert model.dtype == expected
        assert len(names) > 2
        assert all(path.stat().st_size < 8000 + 4000 for path in folder.glob("*.safetensors"))


def test_shards_hold_every_tensor_once_in_order() -> None:
    entries = [FileTensor(str(number), (number,), torch.float32) for number in (1, 2, 100, 3, 4)]
    shards = into_shards(entries, 12)
    assert [[entry.name for entry in shard] for shard in shards] == [["1", "2"], ["100"], ["3"], ["4"]]


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_experts", 8), ("qk_l2_norm", True), ("normalization", "LayerNorm"), ("swiglu", False),
     ("spec", ["my.layers", "layers"]), ("rotary_percent", 0.5), ("position_embedding_type", "learned_absolute"),
     ("window_size", (128, 0))],
)  # fmt: skip
def test_other_models_are_refused_by_name(name: str, value: Any) -> None:
    args = common_state(SMALL, torch.float32, None)["args"]
    assert architecture.from_megatron(args, SMALL.vocab_size) == SMALL
    setattr(args, name, value)
    with pytest.raises(UserError, match=name):
        architecture.from_megatron(args, SMALL.vocab_size)


READ_OF_ARGUMENTS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "max_position_embeddings",
    "rotary_base",
    "layernorm_epsilon",
    "init_method_std",
    "add_qkv_bias",
    "add_bias_linear",
    "untie_embeddings_and_output_weights",
    "group_query_attention",
    "num_query_groups",
    "use_rope_scaling",
    "rope_scaling_factor",
)


@pytest.mark.parametrize("name", READ_OF_ARGUMENTS)
def test_arguments_of_a_foreign_checkpoint_give_a_model_or_one_message(name: str) -> None:
    for value in (None, "x", 0, -1, 10**9, 10**5000, math.inf, math.nan, [], {}, True, "missing"):
        args = common_state(SMALL, torch.float32, None)["args"]
        setattr(args, name, value)
        if value == "missing" and hasattr(args, name):
            delattr(args, name)
        with contextlib.suppress(UserError):
            model = architecture.from_megatron(args, SMALL.vocab_size)
            assert model.layers <= architecture.MOST_LAYERS


@pytest.mark.parametrize("bias", ["add_bias_linear", "add_qkv_bias"])
def test_norms_of_queries_together_with_biases_have_no_class(bias: str) -> None:
    args = common_state(replace(SMALL, kind="qwen3"), torch.float32, None)["args"]
    setattr(args, bias, True)
    with pytest.raises(UserError, match=f"{bias} is True with qk_layernorm"):
        architecture.from_megatron(args, SMALL.vocab_size)


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    step = save_model(tmp_path, SMALL)
    tied = argparse.Namespace(**(vars(SMALL) | {"tied": True}))
    with pytest.raises(UserError, match=r"output_layer\.weight has no place"):
        write_weights(CheckpointReader(step), Architecture(**vars(tied)), tmp_path, None, 10**9)
    with pytest.raises(UserError, match=r"does not hold \[200, 32\]"):
        CheckpointReader(step).read("output_layer.weight", None, (200, 32))


def test_a_damaged_checkpoint_gives_one_message_and_leaves_nothing(tmp_path: Path) -> None:
    step = save_model(tmp_path / "checkpoints", SMALL)
    data = step / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    target = tmp_path / "out/model"
    with (
        pytest.raises(UserError, match="cannot be read"),
        appearing_folder(target) as folder,
    ):
        write_weights(CheckpointReader(step), SMALL, folder, None, 10**9)
    assert list((tmp_path / "out").iterdir()) == []
    (step / ".metadata").write_bytes(b"garbage")
    with pytest.raises(UserError, match="metadata"):
        CheckpointReader(step)
    with pytest.raises(UserError, match="not a whole torch_dist checkpoint"):
        CheckpointReader(tmp_path)


def test_only_an_earlier_export_is_replaced_and_only_by_force(tmp_path: Path) -> None:
    refuse_target(tmp_path / "new", force=False)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="not an exported model"):
        refuse_target(tmp_path, force=True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="--force"):
        refuse_target(tmp_path, force=False)
    refuse_target(tmp_path, force=True)


def test_the_card_shows_the_evaluation_of_that_step_only(tmp_path: Path) -> None:
    plan = load_plan(make_plan(tmp_path))
    run = plan.run("ours", "branch-v1")
    folder = plan.folder(run)
    folder.mkdir(parents=True)
    found = {"step": 6, "loss": 1.0, "perplexity": 2.5, "tokens": 10, "domains": {}}
    (folder / "eval.json").write_text(json.dumps(found))
    assert origin_of(plan, run, 6).evaluation == found
    assert origin_of(plan, run, 3).evaluation is None
    assert list(origin_of(plan, run, 6).tokens_by_domain) == ["v1"]


def test_the_card_lists_what_was_changed_in_the_plan_since(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_plan(tmp_path)
    plan = load_plan(path)
    for run in plan.runs("ours"):
        train_tree(plan, run, [run.last_step], plan.parent_of(run) if run.parent else None)
    path.write_text(path.read_text().replace("seed: 7", "seed: 8"))
    plan = load_plan(path)
    run = plan.run("ours", "branch-v1")
    origin = origin_of(plan, run, 6)
    assert "the plan was changed since this run was trained (seed: was 7, is 8)" in capsys.readouterr().err
    assert "\n- seed: was 7, is 8\n" in training(plan, run, origin)
    plan.folder(run).rename(tmp_path / "one")
    plan.folder(plan.run("ours", "branch-v2")).rename(plan.folder(run))
    with pytest.raises(UserError, match="holds the run branch-v2, not branch-v1"):
        origin_of(plan, run, 6)


def test_the_card_shows_perplexities_by_set_and_domain() -> None:
    domains = {"code": {"perplexity": 2.0, "tokens": 4}}
    further = {
        "valid-v2": {"perplexity": 3.0, "tokens": 5, "domains": {"prose": {"perplexity": 3.5, "tokens": 2}}}
    }
    text = evaluation(
        Origin(6, evaluation={"perplexity": 2.5, "tokens": 10, "domains": domains, "sets": further})
    )
    rows = [
        "all | 2.5000 | 10",
        "code | 2.0000 | 4",
        "valid-v2, all | 3.0000 | 5",
        "valid-v2, prose | 3.5000 | 2",
    ]
    assert [row for row in rows if f"| {row} |" not in text] == []

"""Import: the way back is bit-exact, real trainings start from it at any layout, only data are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_lrpath.errors import UserError
from megatron_lrpath.export.architecture import CLASSES
from megatron_lrpath.export.carried import Carried
from megatron_lrpath.export.config import ROPE_STRETCH, from_config
from tests.support.export_worker import transformers_model, weights
from tests.support.training_fixtures import launch, make_plan, run_words, train
from tools.import_hf import import_folder

VOCABULARY = 121  # odd; Megatron pads it to 128
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "eos_token_id": None,
}


def hugging_face_model(folder: Path, kind: str, **changes: Any) -> Path:
    """Save a model of transformers, with every parameter random, in several files; return its folder."""
    import torch
    import transformers

    torch.manual_seed(3)
    name = CLASSES[kind]
    config = getattr(transformers, name.replace("ForCausalLM", "Config"))
    made = getattr(transformers, name)(config(**(SIZES | changes)))
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    made.save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Qwen2 model with tied embeddings, as transformers saves it."""
    return hugging_face_model(tmp_path_factory.mktemp("qwen") / "hf", "qwen2", tie_word_embeddings=True)


def export(source: Path, target: Path, *argv: str) -> list[str]:
    """Return the arguments of `lrpath export`, as JSON for the forked process."""
    return [json.dumps(["export", str(source), "--output", str(target), *argv])]


def there_and_back(steps: dict[str, Path], tmp_path: Path, first: int) -> None:
    """Import each folder to NAME-`first` and export it to NAME-`first + 1`."""
    argv = []
    for name, source in steps.items():
        import_folder(source, tmp_path / f"{name}-{first}")
        argv += export(
            tmp_path / f"{name}-{first}", tmp_path / f"{name}-{first + 1}", "--max-shard-size", "20KB"
        )
    launch("tests.support.export_worker:commands", argv).ok()


def test_there_and_back_is_bit_exact(tmp_path: Path, qwen: Path) -> None:
    rope = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, **ROPE_STRETCH}
    sources = {"qwen": qwen} | {
        kind: hugging_face_model(tmp_path / kind, kind, **changes)
        for kind, changes in (
            ("llama", {"rope_parameters": rope, "head_dim": 12}),
            ("qwen3", {"head_dim": 12}),
            ("mistral", {"head_dim": 12, "sliding_window": None}),
        )
    }
    there_and_back(sources, tmp_path, 1)
    there_and_back({name: tmp_path / f"{name}-2" for name in sources}, tmp_path, 3)
    for name, source in sources.items():
        once, twice = tmp_path / f"{name}-2", tmp_path / f"{name}-4"
        assert weights(once) == weights(source)
        configs = [json.loads((folder / "config.json").read_text()) for folder in (source, once)]
        assert from_config(configs[0]) == from_config(configs[1])
        assert configs[0]["architectures"] == configs[1]["architectures"]
        files = sorted(path.name for path in once.iterdir() if path.name != "README.md")
        assert "model.safetensors.index.json" in files
        for file in files:
            assert (once / file).read_bytes() == (twice / file).read_bytes(), file


ENDS = [120, 118, 119]
GENERATION = {"do_sample": True, "temperature": 0.6, "eos_token_id": ENDS, "transformers_version": "4.44.0"}
OUTSIDE = {
    "bos_token_id": 117, "eos_token_id": ENDS, "pretraining_tp": 1, "future": {"of": [None, "transformers"]},
    "_name_or_path": "somewhere", "auto_map": {"AutoModel": "own.Own"},
}  # fmt: skip


def test_end_tokens_and_settings_go_through_trainings(tmp_path: Path) -> None:
    source = hugging_face_model(tmp_path / "mistral", "mistral", sliding_window=None)
    change_config(source, OUTSIDE)
    (source / "generation_config.json").write_text(json.dumps(GENERATION))
    import_folder(source, tmp_path / "imported")
    lines = yaml.safe_load((tmp_path / "imported/plan.yaml").read_text())
    tokenizer = {"type": "NullTokenizer", "vocab_size": VOCABULARY}
    plan = make_plan(tmp_path, (4, 4), model=lines["model"], megatron=lines["megatron"], tokenizer=tokenizer)
    train(run_words(plan, "ours", "main")).ok()
    shutil.rmtree(tmp_path / "imported")  # from here on only the checkpoints are needed
    train(run_words(plan, "ours", "branch-v1")).ok()
    argv = export(plan, tmp_path / "hf", "--run", "branch-v1")
    launch("tests.support.export_worker:commands", argv).ok()
    config = json.loads((tmp_path / "hf/config.json").read_text())
    kept = {name: config.get(name) for name in OUTSIDE}
    assert kept == OUTSIDE | {"_name_or_path": None, "auto_map": None}
    assert config["architectures"] == ["MistralForCausalLM"]
    generation = json.loads((tmp_path / "hf/generation_config.json").read_text())
    wanted = {"do_sample": True, "temperature": 0.6, "eos_token_id": ENDS, "bos_token_id": 117}
    assert generation == wanted
    assert transformers_model(tmp_path / "hf").generation_config.eos_token_id == ENDS


def test_the_end_of_an_answer_comes_before_the_ends_that_were_imported() -> None:
    carried = Carried("llama", {"eos_token_id": [5, 6]}, {"top_p": 0.9})
    assert carried.generation_config({"eos_token_id": 5, "pad_token_id": 0}, 9) == {
        "top_p": 0.9, "eos_token_id": [9, 5, 6], "pad_token_id": 0,
    }  # fmt: skip
    assert Carried().generation_config({"eos_token_id": 5}, None) == {
        "eos_token_id": 5, "pad_token_id": 5, "do_sample": False,
    }  # fmt: skip


def test_tokens_without_a_row_are_left_out_and_reported() -> None:
    carried = Carried(
        "llama", {"eos_token_id": [5, 90], "pad_token_id": 91}, {"eos_token_id": [90], "top_p": 0.9}
    )
    kept, notes = carried.within(90)
    assert (kept.config, kept.generation) == (
        {"eos_token_id": [5], "pad_token_id": None}, {"eos_token_id": None, "top_p": 0.9},
    )  # fmt: skip
    assert "tokens 90, 91" in " ".join(notes)
    assert kept.generation_config({"eos_token_id": 5}, None)["eos_token_id"] == [5]
    assert carried.within(92) == (carried, [])


def change_config(folder: Path, changes: dict[str, Any]) -> None:
    """Write the changes into the folder's `config.json`."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
    ("llama", {"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
    ("llama", {"hidden_size": 30, "head_dim": None}, "hidden_size 30 is no multiple"),
    ("llama", {"head_dim": 7}, "RoPE turns them in pairs"),
    ("llama", {"rms_norm_eps": -1}, "rms_norm_eps must be a number above 0"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", **ROPE_STRETCH}}, "llama3 without a factor"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "RoPE scaled as"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    ("qwen3", {"layer_types": 2}, "layer_types"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("mistral", {"sliding_window": 32}, "a sliding_window of 32 below max_position_embeddings"),
    ("mistral", {"max_position_embeddings": 32768}, "a sliding_window of 4,096 below"),  # the class's own
]


@pytest.mark.parametrize(("kind", "change", "message"), CONFIGS)
def test_what_the_model_does_not_have_is_refused(kind: str, change: dict[str, Any], message: str) -> None:
    config = SIZES | {"model_type": kind}
    assert from_config(config).kind == kind
    with pytest.raises(UserError, match=message):
        from_config(config | change)


@pytest.mark.parametrize("value", ["</s>", [], [1, "2"], 1.0, True, {"id": 1}])
def test_end_tokens_must_be_ids(value: Any) -> None:
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id must be"):
        Carried.of_folder(SIZES | {"model_type": "llama"}, {"eos_token_id": value})


LAYOUTS = [
    ("", "qwen2"),
    ("--tensor-model-parallel-size", "qwen3"),
    ("--pipeline-model-parallel-size", "qwen2"),
]


@pytest.mark.parametrize(("layout", "kind"), LAYOUTS)
def test_trainings_start_from_it_at_any_layout(layout: str, kind: str, tmp_path: Path, qwen: Path) -> None:
    source = qwen if kind == "qwen2" else hugging_face_model(tmp_path / "source", kind, head_dim=12)
    import_folder(source, tmp_path / "imported")
    lines = yaml.safe_load((tmp_path / "imported/plan.yaml").read_text())
    tokenizer = {"type": "NullTokenizer", "vocab_size": VOCABULARY}
    plan = make_plan(tmp_path, model=lines["model"], megatron=lines["megatron"], tokenizer=tokenizer)
    # The first step of a warm-up has the rate 0, so it saves the loaded state.
    once = ["--save-interval", "1", "--exit-interval", "1", *([layout, "2"] if layout else [])]
    train(run_words(plan, "ours", "main", *once), nproc=2 if layout else 1)
    argv = export(plan, tmp_path / "hf", "--run", "main", "--step", "1")
    launch("tests.support.export_worker:commands", argv).ok()
    assert weights(tmp_path / "hf") == weights(source)


def test_a_run_resumes_from_its_own_steps_and_not_from_the_import(tmp_path: Path, qwen: Path) -> None:
    import_folder(qwen, tmp_path / "imported")
    lines = yaml.safe_load((tmp_path / "imported/plan.yaml").read_text())
    tokenizer = {"type": "NullTokenizer", "vocab_size": VOCABULARY}
    plan = make_plan(tmp_path, (4, 4), model=lines["model"], megatron=lines["megatron"], tokenizer=tokenizer)
    train(run_words(plan, "ours", "main")).ok()
    branch = train(run_words(plan, "ours", "branch-v1"), probe="state_at_start").ok()
    assert (branch.probed[0]["iteration"], branch.probed[0]["consumed_train_samples"]) == (2, 8)


def test_weights_of_another_model_are_refused(tmp_path: Path, qwen: Path) -> None:
    import_folder(qwen, tmp_path / "imported")
    lines = yaml.safe_load((tmp_path / "imported/plan.yaml").read_text())
    plan = make_plan(tmp_path, model=lines["model"] | {"rotary_base": 500}, megatron=lines["megatron"])
    outcome = train(run_words(plan, "ours", "main"))
    assert outcome.status == [2]
    assert "rotary_base is 10000 there and 500 here" in outcome.output


def test_only_safetensors_and_json_are_read(tmp_path: Path, qwen: Path) -> None:
    marker = tmp_path / "ran"
    config = json.loads((qwen / "config.json").read_text())
    own = tmp_path / "own"
    own.mkdir()
    for path in qwen.glob("model*"):
        (own / path.name).write_bytes(path.read_bytes())
    (own / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')")
    auto = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    (own / "config.json").write_text(json.dumps(config | {"auto_map": auto}))
    import_folder(own, tmp_path / "imported")
    assert not marker.exists()
    assert not list((tmp_path / "imported").rglob("*.py"))
    for path in own.glob("model*"):
        path.unlink()
    (own / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="never loaded"):
        import_folder(own, tmp_path / "other")


def test_an_index_cannot_point_outside_of_its_folder(tmp_path: Path, qwen: Path) -> None:
    (tmp_path / "config.json").write_text((qwen / "config.json").read_text())
    index = json.loads((qwen / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: f"../qwen/{place}" for name, place in index["weight_map"].items()}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="not in the folder"):
        import_folder(tmp_path, tmp_path / "imported")


def test_damaged_or_foreign_folders_are_refused_and_leave_nothing(tmp_path: Path, qwen: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in qwen.iterdir():
        (bad / path.name).write_bytes(path.read_bytes())
    config = json.loads((qwen / "config.json").read_text())
    changes: list[tuple[dict[str, Any], str]] = [
        ({"model_type": "mixtral"}, "model_type 'mixtral'"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"vocab_size": 7}, "has the shape"),
        ({"num_hidden_layers": 3}, "is not there"),
        ({"num_hidden_layers": 1}, "is unknown"),
        ({"hidden_size": "32"}, "hidden_size"),
    ]
    for change, message in changes:
        (bad / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            import_folder(bad, tmp_path / "out/imported")
    (bad / "config.json").write_text(json.dumps(config))
    shard = max(bad.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        import_folder(bad, tmp_path / "out/imported")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

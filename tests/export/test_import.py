"""Import: the way back is bit-exact, real trainings start from it at any layout, only data is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_lrpath.errors import UserError
from megatron_lrpath.export import architecture
from tests.support.export_worker import weights
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
    """A random model of transformers' own, every parameter random, saved in several files."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(3)
    classes: dict[str, Any] = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }
    config, model = classes[kind]
    made = model(config(**(SIZES | changes)))
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    made.save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 model with tied embeddings, as transformers saves it."""
    return hugging_face_model(tmp_path_factory.mktemp("qwen") / "hf", "qwen2", tie_word_embeddings=True)


def export(source: Path, target: Path, *words: str) -> list[str]:
    """The words of `lrpath export`, as JSON for the forked process."""
    return [json.dumps(["export", str(source), "--output", str(target), *words])]


def test_there_and_back_is_bit_exact(tmp_path: Path, qwen: Path) -> None:
    rope = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, **architecture.ROPE_STRETCH}
    llama = hugging_face_model(tmp_path / "llama", "llama", rope_parameters=rope, head_dim=12)
    words = []
    for name, source in (("llama", llama), ("qwen", qwen)):
        import_folder(source, tmp_path / f"{name}-1")
        words += export(tmp_path / f"{name}-1", tmp_path / f"{name}-2", "--max-shard-size", "20KB")
    launch("tests.support.export_worker:commands", words).ok()
    words = []
    for name in ("llama", "qwen"):
        import_folder(tmp_path / f"{name}-2", tmp_path / f"{name}-3")
        words += export(tmp_path / f"{name}-3", tmp_path / f"{name}-4", "--max-shard-size", "20KB")
    launch("tests.support.export_worker:commands", words).ok()
    for name, source in (("llama", llama), ("qwen", qwen)):
        once, twice = tmp_path / f"{name}-2", tmp_path / f"{name}-4"
        assert weights(once) == weights(source)
        configs = [json.loads((folder / "config.json").read_text()) for folder in (source, once)]
        assert architecture.from_config(configs[0]) == architecture.from_config(configs[1])
        files = sorted(path.name for path in once.iterdir() if path.name != "README.md")
        assert "model.safetensors.index.json" in files
        for file in files:
            assert (once / file).read_bytes() == (twice / file).read_bytes(), file


@pytest.mark.parametrize("layout", ["", "--tensor-model-parallel-size", "--pipeline-model-parallel-size"])
def test_trainings_start_from_it_at_any_layout(layout: str, tmp_path: Path, qwen: Path) -> None:
    import_folder(qwen, tmp_path / "imported")
    lines = yaml.safe_load((tmp_path / "imported/plan.yaml").read_text())
    tokenizer = {"type": "NullTokenizer", "vocab_size": VOCABULARY}
    plan = make_plan(tmp_path, model=lines["model"], megatron=lines["megatron"], tokenizer=tokenizer)
    # The first step of a warm-up has the rate 0, so what it saves is what was loaded.
    once = ["--save-interval", "1", "--exit-interval", "1", *([layout, "2"] if layout else [])]
    train(run_words(plan, "ours", "main", *once), nproc=2 if layout else 1)
    words = export(plan, tmp_path / "hf", "--run", "main", "--step", "1")
    launch("tests.support.export_worker:commands", words).ok()
    assert weights(tmp_path / "hf") == weights(qwen)


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

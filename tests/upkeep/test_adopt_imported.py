"""`lrpath adopt` of a Hugging Face model: compared, recorded, trained, branched, evaluated and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_lrpath.errors import PlanError, UserError
from megatron_lrpath.export.card import trained_on
from megatron_lrpath.plan import load_plan
from megatron_lrpath.plan.file.edit import with_entry
from megatron_lrpath.training.checkpoints.parent import require_adopted_weights
from tests.export.test_import import SIZES, hugging_face_model
from tests.support import ROOT
from tests.support.adopting import call
from tests.support.export_worker import transformers_model
from tests.support.training_fixtures import history, launch, make_plan, run_words, train
from tools.import_hf import main as import_hf

TOKENIZER, PIECES = ROOT / "tests/golden/sp.model", 600


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an imported Llama of transformers with a SentencePiece tokenizer."""
    folder = tmp_path_factory.mktemp("hf")
    sizes = SIZES | {"vocab_size": PIECES, "bos_token_id": 1, "eos_token_id": 2}
    source = hugging_face_model(folder / "hf", "llama", **sizes)
    shutil.copyfile(TOKENIZER, source / "tokenizer.model")
    assert import_hf([str(source), "--output", str(folder / "base")]) == 0
    return folder / "base"


def plan_of(imported: Path, folder: Path, **changes: Any) -> Path:
    """Write a plan with the model of the imported folder's lines, and a copy of its tokenizer."""
    folder.mkdir(exist_ok=True)
    lines = yaml.safe_load((imported / "plan.yaml").read_text())
    tokenizer = {"type": "SentencePieceTokenizer", "model": str(TOKENIZER)}
    megatron = {"adam_beta2": 0.95}
    return make_plan(
        folder, (6, 6), **{"model": lines["model"], "tokenizer": tokenizer, "megatron": megatron} | changes
    )


@pytest.mark.slow
def test_an_imported_model_becomes_a_main_path_with_versions(imported: Path, tmp_path: Path) -> None:
    path = plan_of(imported, tmp_path)
    argv = ["adopt", str(path), "--checkpoint", str(imported)]
    statuses, said = call(
        tmp_path,
        [*argv, "--step", "5"],
        [*argv, "--data", "v9"],
        [*argv, "--data", "v1", "--dry-run"],
        [*argv, "--data", "v1"],
        [*argv, "--data", "v1"],
        argv,
        ["plan", str(path)],
    )
    assert statuses == [2, 2, 0, 0, 0, 2, 0], said
    asked, unknown, dry, done, again, other, shown = said.split("== ")[1:]
    assert "has no step and no optimizer state; leave --step out" in asked
    assert "v9" in unknown
    assert "nothing was written" in dry
    assert "an imported model, without optimizer state; data: v1" in done
    assert "at step 0, with 2 steps of warm-up to 0.01; costs count from there" in done
    assert "branch-v1 leaves the main path at step 3, 3 steps long" in done
    assert "not compared" not in done
    assert f"{path} has adopted {imported} already" in again
    assert "other data already" in other
    assert "begins with an imported model (data: v1)" in " ".join(shown.split())
    plan = load_plan(path)
    assert plan.adopted is not None
    assert (plan.adopted.step, plan.adopted.samples, plan.adopted.data) == (0, 0, ("v1",))
    assert plan.megatron == {"adam_beta2": 0.95, "pretrained_checkpoint": str(imported)}
    for run in ("main", "branch-v1"):
        train(run_words(path, "ours", run)).ok()
    rows = history(tmp_path / "runs/ours/main")
    assert [(row["step"], row["consumed_samples"], row["lr"]) for row in rows[:3]] == [
        (1, 4, 0.0), (2, 8, 0.005), (3, 12, 0.01),
    ]  # fmt: skip
    launch(
        "megatron_lrpath.evaluate.worker:main",
        ["--plan", str(path), "--runs", "ours/branch-v1", "--device", "cpu"],
    ).ok()
    statuses, said = call(
        tmp_path,
        ["status", str(path)],
        ["report", str(path)],
        ["export", str(path), "--run", "branch-v1"],
        ["generate", str(path), "--run", "branch-v1", "--max-tokens", "3", "The"],
    )
    assert statuses == [0, 0, 0, 0], said
    exported = tmp_path / "runs/ours/branch-v1/huggingface"
    card = (exported / "README.md").read_text()
    assert "those of the imported model are not counted (slices v1)" in card
    assert json.loads((tmp_path / "runs/ours/branch-v1/eval.json").read_text())["step"] == 6
    assert (exported / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()
    assert transformers_model(exported).config.vocab_size == PIECES
    page = (tmp_path / "runs/ours/../report/index.html").resolve()
    assert "branch-v1" in page.read_text()
    # the weights are the adopted ones
    require_adopted_weights(plan)
    moved = tmp_path / "moved"
    shutil.copytree(imported, moved)
    path.write_text(path.read_text().replace(str(imported), str(moved)))
    require_adopted_weights(load_plan(path))
    weights = moved / "release/__0_0.distcp"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(
        UserError, match=r"changed since .+plan.yaml adopted them; restore them, or remove `adopted`"
    ):
        require_adopted_weights(load_plan(path))


@pytest.mark.slow
def test_another_model_or_tokenizer_is_refused(imported: Path, tmp_path: Path) -> None:
    lines = yaml.safe_load((imported / "plan.yaml").read_text())
    without = tmp_path / "without"
    shutil.copytree(imported, without)
    shutil.rmtree(without / "tokenizer")
    other = {"type": "SentencePieceTokenizer", "model": str(ROOT / "tests/golden/nfkc.model")}
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (imported, {"model": lines["model"] | {"num_layers": 3}}, "num_layers is 2 there and 3 here"),
        (imported, {"model": lines["model"] | {"norm_epsilon": 1e-5}}, "layernorm_epsilon is 1e-06 there"),
        (
            imported,
            {"tokenizer": other},
            f" is not the plan's {other['model']}: both vocabularies have 600",
        ),
        (
            without,
            {"tokenizer": {"type": "NullTokenizer", "vocab_size": 700}},
            "rows, the plan's tokenizer 700",
        ),
        (without, {}, "the tokenizer was not compared: "),
        (
            imported,
            {"megatron": {"bf16": True}},
            "differs: the weights are stored in float32, trained in bfloat16",
        ),
    ]
    calls = [
        [
            "adopt",
            str(plan_of(imported, tmp_path / str(number), **changes)),
            "--checkpoint",
            str(folder),
            "--dry-run",
        ]
        for number, (folder, changes, _) in enumerate(cases)
    ]
    statuses, said = call(tmp_path, *calls)
    assert statuses == [2] * 4 + [0] * 2, said
    for part, (_, _, message) in zip(said.split("== ")[1:], cases, strict=True):
        assert message in part
        assert "Traceback" not in part


def test_an_imported_model_in_a_plan_starts_with_a_warm_up_and_unknown_data(tmp_path: Path) -> None:
    entry = {"checkpoint": "base", "step": 0, "samples": 0, "fingerprint": "0" * 64}
    path = make_plan(tmp_path, (6, 8), adopted=entry, megatron={"pretrained_checkpoint": "base"})
    plan = load_plan(path)
    assert plan.runs("ptfs")
    assert plan.main.path.lr_at(0) == 0.0, "with a warm-up"
    assert "not counted (unknown data)" in trained_on(plan, plan.main, 3)
    for changes, message in (
        (
            {"megatron": {"pretrained_checkpoint": "other"}},
            "pretrained_checkpoint in `megatron` is other; name",
        ),
        ({"megatron": {}}, "pretrained_checkpoint in `megatron` is missing"),
        ({"adopted": entry | {"samples": 4}}, "has consumed no samples; give 0"),
        (
            {"adopted": entry | {"step": 4}, "megatron": {}},
            "a checkpoint of a later step has consumed samples",
        ),
    ):
        content = yaml.safe_load(path.read_text()) | changes
        changed = tmp_path / "changed.yaml"
        changed.write_text(yaml.safe_dump(content))
        with pytest.raises(PlanError, match=message):
            load_plan(changed)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("name: a\n", "name: a\nmegatron:\n  x: base/1\n"),
        ("megatron: {bf16: true}  # old\nname: a\n", "megatron: {bf16: true, x: base/1}  # old\nname: a\n"),
        ("megatron: {}\n", "megatron: {x: base/1}\n"),
        (
            "megatron:\n    bf16: true   # as before\n    # more\nname: a\n",
            "megatron:\n    bf16: true   # as before\n    x: base/1\n    # more\nname: a\n",
        ),
    ],
)  # fmt: skip
def test_an_entry_is_added_to_a_section_and_the_rest_stays(before: str, after: str, tmp_path: Path) -> None:
    assert with_entry(tmp_path, before, "megatron", "x", "base/1") == after
    with pytest.raises(PlanError, match="add `x: base/1` to its `megatron`"):
        with_entry(tmp_path, "name: a\nmegatron:\n", "megatron", "x", "base/1")

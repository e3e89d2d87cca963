"""Perplexity equals a plain loop over the validation tokens, at every layout; `lrpath eval` prints it."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from megatron_lrpath.cli import main
from megatron_lrpath.data.slice import Slice
from megatron_lrpath.plan import load_plan
from megatron_lrpath.runs.checkpoints import complete_steps
from megatron_lrpath.runs.results import add_main_path_evaluation, main_path_evaluations, needs_evaluation
from megatron_lrpath.sealed import read_sealed
from tests.support import ROOT
from tests.support.data_fixtures import make_indexed_dataset, make_slice
from tests.support.training_fixtures import MODEL, Outcome, launch, lrpath, make_plan, run_words, train

SEQUENCE = 16
STEP = "checkpoints/iter_0000006"
LAYERS, HEADS, GROUPS = MODEL["num_layers"], MODEL["num_attention_heads"], MODEL["num_query_groups"]
WIDTH = MODEL["hidden_size"] // HEADS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a plan, its main path, and its first version trained in all three paradigms."""
    folder = tmp_path_factory.mktemp("evaluated")
    plan = make_plan(folder, (6,))
    for paradigm, run in (("ours", "main"), ("ours", "branch-v1"), ("ptfs", "scratch-v1")):
        train(run_words(plan, paradigm, run)).ok()
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of the trained folder's plan and runs, which a test may change."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    plan = yaml.safe_load((trained / "plan.yaml").read_text())
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan | {"output": str(tmp_path / "runs")}))
    return tmp_path


def evaluate(folder: Path, runs: list[str], *extra: str, nproc: int = 1) -> Outcome:
    """Run the worker that `lrpath eval` starts, in forked processes."""
    argv = ["--plan", str(folder / "plan.yaml"), "--device", "cpu", "--runs", *runs, *extra]
    return launch("megatron_lrpath.evaluate.worker:main", argv, nproc)


def evaluation(folder: Path, run: str) -> dict[str, Any]:
    """Return the result of an evaluation."""
    found: dict[str, Any] = json.loads((folder / "runs" / run / "eval.json").read_text())
    return found


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the model's tensors in a checkpoint, gathered to whole tensors."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(checkpoint)
    metadata = reader.read_metadata().state_dict_metadata
    wanted = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if name.endswith("weight") and not name.startswith(("optimizer", "chained"))
    }
    dcp.load(wanted, storage_reader=reader, no_dist=True)
    return wanted


def rotate(states: torch.Tensor) -> torch.Tensor:
    """Return the rotary embedding of [tokens, heads, width]."""
    positions = torch.arange(states.size(0))[:, None]
    angles = positions / 10000 ** (torch.arange(0, WIDTH, 2) / WIDTH)
    angles = torch.cat([angles, angles], -1)[:, None]
    first, second = states.chunk(2, -1)
    return states * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def logits(tokens: torch.Tensor, model: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits of a plain LLaMA over one sequence: [tokens] -> [tokens, vocabulary]."""

    def norm(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 1e-5) * weight

    states = model["embedding.word_embeddings.weight"][tokens]
    mask = torch.ones(len(tokens), len(tokens)).tril().log()
    for layer in range(LAYERS):
        part = {
            name.removeprefix("decoder.layers."): stacked[layer]
            for name, stacked in model.items()
            if name.startswith("decoder.layers.")
        }
        normed = norm(states, part["self_attention.linear_qkv.layer_norm_weight"])
        mixed = (normed @ part["self_attention.linear_qkv.weight"].T).view(len(tokens), GROUPS, -1, WIDTH)
        query, key, value = mixed.split([HEADS // GROUPS, 1, 1], 2)
        query, key = rotate(query.reshape(len(tokens), HEADS, WIDTH)), rotate(key.squeeze(2))
        key, value = (one.repeat_interleave(HEADS // GROUPS, 1) for one in (key, value.squeeze(2)))
        scores = torch.einsum("ihd,jhd->hij", query, key) / math.sqrt(WIDTH) + mask
        context = torch.einsum("hij,jhd->ihd", scores.softmax(-1), value).reshape(len(tokens), -1)
        states = states + context @ part["self_attention.linear_proj.weight"].T
        gate, up = (
            norm(states, part["mlp.linear_fc1.layer_norm_weight"]) @ part["mlp.linear_fc1.weight"].T
        ).chunk(2, -1)
        states = states + (F.silu(gate) * up) @ part["mlp.linear_fc2.weight"].T
    return norm(states, model["decoder.final_layernorm.weight"]) @ model["output_layer.weight"].T


def independent(folder: Path, run: str, step: int) -> dict[str, tuple[float, int]]:
    """Return (summed loss, tokens) of each domain, from the checkpoint's weights and the dataset's bytes."""
    import numpy as np

    model = weights(folder / "runs" / run / f"checkpoints/iter_{step:07}")
    found = {}
    plan = yaml.safe_load((folder / "plan.yaml").read_text())
    for source in Slice.load(Path(plan["data"]["valid"] + ".slice")).sources:
        # every document of the fixture has 25 tokens of two bytes
        content = np.fromfile(f"{source.prefix}.bin", dtype=np.uint16).reshape(-1, 25)
        stream = torch.from_numpy(content[source.documents].reshape(-1).astype(np.int64))
        total = 0.0
        for start in range(0, len(stream) - 1, SEQUENCE):
            labels = stream[start + 1 : start + 1 + SEQUENCE]
            output = logits(stream[start : start + len(labels)], model)
            total += float(F.cross_entropy(output, labels, reduction="sum"))
        found[source.domain] = (total, len(stream) - 1)
    return found


def assert_equal(found: dict[str, Any], expected: dict[str, tuple[float, int]]) -> None:
    """Assert that an evaluation equals the independent one, in total and by domain, over the same tokens."""
    assert set(found["domains"]) == set(expected) == {"prose", "code"}
    parts = {**found["domains"], "whole": found}
    sums = {**expected, "whole": tuple(sum(one) for one in zip(*expected.values(), strict=True))}
    for name, part in parts.items():
        loss, tokens = sums[name]
        assert part["tokens"] == tokens
        assert part["loss"] == pytest.approx(loss / tokens, rel=1e-6)
        assert part["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-5)
    assert parts["prose"]["loss"] != pytest.approx(parts["code"]["loss"], rel=1e-5)


def test_perplexity_is_the_plain_loops_over_every_token_once(copy: Path) -> None:
    evaluate(copy, ["ours/branch-v1", "ptfs/scratch-v1"]).ok()
    ours, scratch = (evaluation(copy, run) for run in ("ours/branch-v1", "ptfs/scratch-v1"))
    assert ours["step"] == 6
    assert_equal(ours, independent(copy, "ours/branch-v1", 6))
    assert_equal(scratch, independent(copy, "ptfs/scratch-v1", 6))
    assert ours["loss"] != scratch["loss"], "each run's own weights are loaded"


@pytest.mark.parametrize(
    ("nproc", "extra"),
    [
        (2, []),
        (2, ["--pipeline-model-parallel-size", "2"]),
        (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
        (1, ["--micro-batch-size", "1"]),
        (1, ["--micro-batch-size", "4"]),
    ],
    ids=["dp2", "pp2", "tp2", "micro-batch 1", "micro-batch 4"],
)
def test_layout_and_batch_do_not_matter(copy: Path, nproc: int, extra: list[str]) -> None:
    evaluate(copy, ["ours/branch-v1"], *extra, nproc=nproc).ok()
    assert_equal(evaluation(copy, "ours/branch-v1"), independent(copy, "ours/branch-v1", 6))


def test_many_batches_are_carried_in_several_calls(copy: Path) -> None:
    """There are more micro-batches than one call of the pipeline schedule takes."""
    argv = ["--plan", str(copy / "plan.yaml"), "--device", "cpu", "--runs", "ours/branch-v1"]
    launch("tests.evaluate.test_evaluate:in_chunks_of_three", [*argv, "--micro-batch-size", "1"]).ok()
    assert_equal(evaluation(copy, "ours/branch-v1"), independent(copy, "ours/branch-v1", 6))


def in_chunks_of_three(argv: list[str]) -> None:
    """Run the worker with three micro-batches a call, in a separate process."""
    from megatron_lrpath.evaluate import perplexity, worker

    perplexity.CHUNK = 3
    worker.main(argv)


def test_an_evaluation_changes_nothing_but_its_result(copy: Path) -> None:
    from tests.training.test_training_branch import digests

    before = digests(copy / "runs")
    evaluate(copy, ["ours/branch-v1"]).ok()
    after = digests(copy / "runs")
    assert after.pop("ours/branch-v1/eval.json")
    assert after == before


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: shutil.rmtree(run / "checkpoints"), "no checkpoint of step 6"),
        (lambda run: (run / STEP / "metadata.json").unlink(), "is damaged: metadata.json cannot be read"),
        (lambda run: flip(next((run / STEP).glob("*.distcp"))), "distcp holds other bytes than were written"),
    ],
    ids=["missing", "incomplete", "flipped bit"],
)
def test_an_incomplete_checkpoint_gives_one_message(copy: Path, damage: Any, said: str) -> None:
    damage(copy / "runs/ours/branch-v1")
    outcome = evaluate(copy, ["ours/branch-v1"], nproc=2)
    assert outcome.status == [2, 2], outcome.output
    assert not (copy / "runs/ours/branch-v1/eval.json").exists()
    assert outcome.output.count("lrpath: error: ") == 1
    assert said in outcome.output.partition("lrpath: error: ")[2]
    assert "Traceback" not in outcome.output


def test_the_command_prints_that_there_is_nothing_to_do(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = str(copy / "plan.yaml")
    for run in ("ours/branch-v1", "ptfs/scratch-v1"):
        result = json.loads((copy / "runs" / run / "result.json").read_text())
        evaluation = {"step": 6, "checkpoint": result["checkpoint"], "perplexity": 9.0}
        (copy / "runs" / run / "eval.json").write_text(json.dumps(evaluation))
    assert main(["eval", plan]) == 0
    assert (
        "nothing to evaluate: 2 of 2 versions are trained, all of them evaluated" in capsys.readouterr().out
    )
    shutil.rmtree(copy / "runs")
    assert main(["eval", plan]) == 2
    assert f"no version is trained yet. First: lrpath run {plan}" in capsys.readouterr().err
    assert main(["eval", plan, "--run", "branch-v9"]) == 2
    assert "branch-v9" in capsys.readouterr().err


def test_the_command_evaluates_and_prints_perplexities(copy: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "megatron_lrpath.cli", "eval", str(copy / "plan.yaml")]
    command += ["--paradigm", "ours", "--device", "cpu", "--nproc", "2"]
    answer = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=280, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    found = evaluation(copy, "ours/branch-v1")
    assert f"ours/branch-v1           perplexity {found['perplexity']:.3f}" in answer.stdout
    assert answer.stderr == ""
    assert_equal(found, independent(copy, "ours/branch-v1", 6))


def test_the_command_names_the_cause_and_the_log_of_a_failure(copy: Path) -> None:
    shutil.rmtree(copy / "runs/ours/branch-v1/checkpoints")
    answer = lrpath("eval", copy / "plan.yaml", "--paradigm", "ours", "--device", "cpu")
    assert answer.status == [2], answer.output
    assert "the evaluation failed: " in answer.output
    assert "no checkpoint of step 6" in answer.output
    assert f"log: {copy / 'runs/logs/eval.log'}" in answer.output
    assert "Traceback" not in answer.output


def test_the_main_paths_checkpoints_are_evaluated_each_once(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, folder = copy / "plan.yaml", copy / "runs/ours/main"
    steps = complete_steps(folder / "checkpoints")
    answer = lrpath("eval", plan, "--main-path", "--device", "cpu").ok()
    found, _ = read_sealed(folder / "evals.json")
    assert [int(step) for step in found] == steps
    for step in steps:
        assert_equal(found[str(step)], independent(copy, "ours/main", step))
        assert f"ours/main@{step}" in answer.output
    assert not (folder / "eval.json").exists()
    assert main(["eval", str(plan), "--main-path"]) == 0
    assert "all checkpoints of the main path are evaluated" in capsys.readouterr().out
    (folder / "evals.json").write_text(json.dumps({"1": found[str(steps[0])]}))
    outcome = evaluate(copy, ["ours/main@5", f"ours/main@{steps[-1]}"], nproc=2)  # step 5 has been removed
    outcome.ok()
    assert "evaluated ours/main@5" not in outcome.output
    assert read_sealed(folder / "evals.json")[0] == {
        "1": found[str(steps[0])],
        str(steps[-1]): found[str(steps[-1])],
    }


def test_evaluations_side_by_side_lose_nothing_of_each_other(tmp_path: Path) -> None:
    def add(step: int) -> None:
        add_main_path_evaluation(tmp_path, {"step": step, "loss": float(step)})

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(add, range(1, 65)))
    assert {step: one["loss"] for step, one in main_path_evaluations(tmp_path).items()} == {
        n: float(n) for n in range(1, 65)
    }


def test_a_checkpoint_that_vanishes_while_it_is_checked_is_skipped(copy: Path) -> None:
    step = complete_steps(copy / "runs/ours/main/checkpoints")[-1]
    argv = [
        "--plan",
        str(copy / "plan.yaml"),
        "--device",
        "cpu",
        "--runs",
        f"ours/main@{step}",
        "ours/branch-v1",
    ]
    outcome = launch("tests.evaluate.test_evaluate:main_path_removed_meanwhile", argv, 2)
    outcome.ok()
    assert "evaluated ours/main" not in outcome.output
    assert evaluation(copy, "ours/branch-v1")["step"] == 6


def main_path_removed_meanwhile(argv: list[str]) -> None:
    """Run the worker and remove the main path's checkpoint after it was found, in a separate process."""
    from megatron_lrpath.evaluate import perplexity, worker

    check = perplexity.damage

    def damage(folder: Path, step: int) -> list[str]:
        if "main" in folder.parts:
            shutil.rmtree(folder, ignore_errors=True)
        return check(folder, step)

    perplexity.damage = damage
    worker.main(argv)


def test_the_main_path_is_evaluated_alone_and_once_it_has_checkpoints(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = str(copy / "plan.yaml")
    for argv in (["--run", "main"], ["--paradigm", "ptfs"], ["--tasks", "paper"]):
        assert main(["eval", plan, "--main-path", *argv]) == 2
        assert "leave out --tasks, --run and --paradigm" in capsys.readouterr().err
    (copy / "runs/ours/main/evals.json").write_text('{"2":')
    assert main(["eval", plan, "--main-path"]) == 2
    assert "evals.json: cannot be read; restore it, or remove it" in capsys.readouterr().err
    shutil.rmtree(copy / "runs/ours/main/checkpoints")
    assert main(["eval", plan, "--main-path"]) == 2
    assert "the main path has no checkpoint yet" in capsys.readouterr().err


def test_of_a_later_set_only_what_is_missing_is_measured(copy: Path) -> None:
    evaluate(copy, ["ours/branch-v1"]).ok()
    path = copy / "runs/ours/branch-v1/eval.json"
    before = read_sealed(path)[0]
    generator = np.random.default_rng(8)
    texts = [generator.integers(1, 100, size=25).tolist() for _ in range(6)]
    prefix = make_indexed_dataset(copy / "late", texts)
    make_slice(copy / "valid-v2.slice", [(prefix, range(6), "news")])
    keys = yaml.safe_load((copy / "plan.yaml").read_text())
    keys["data"]["valid"] = [keys["data"]["valid"], str(copy / "valid-v2")]
    (copy / "plan.yaml").write_text(yaml.safe_dump(keys))
    plan = load_plan(copy / "plan.yaml")
    run = plan.run("ours", "branch-v1")
    assert needs_evaluation(plan, run)
    marked = before | {"perplexity": 2.0}  # kept: not measured again
    path.write_text(json.dumps(marked))
    evaluate(copy, ["ours/branch-v1"]).ok()
    after = read_sealed(path)[0]
    found = after.pop("sets")["valid-v2"]
    assert after == marked
    assert (found["tokens"], list(found["domains"])) == (149, ["news"])
    assert not needs_evaluation(plan, run)
    evaluate(copy, ["ours/branch-v1"], "--again").ok()
    assert read_sealed(path)[0]["perplexity"] == before["perplexity"]

"""Fine-tuning: from a version's weights, on answers only, examples apart, resumed, evaluated, exported."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_lrpath.cli import main
from megatron_lrpath.errors import UserError
from megatron_lrpath.export.card import Origin, training
from megatron_lrpath.launch.local import fine_tunings
from megatron_lrpath.launch.resources import check_fine_tuning
from megatron_lrpath.launch.slurm.jobs import plan_jobs
from megatron_lrpath.launch.slurm.ledger import SubmittedPlan
from megatron_lrpath.launch.slurm.settings import Settings
from megatron_lrpath.plan import load_plan
from megatron_lrpath.runs.lineage import read_lineage
from megatron_lrpath.runs.tasks import build_tasks, with_ancestors
from tests.support import benchmark_data
from tests.support.sft_fixtures import changed, conversations, sft_plan
from tests.support.states import states
from tests.support.training_fixtures import history, launch, make_plan, run_words, train
from tests.training.test_training_branch import digests

WORKER = "tests.support.sft_fixtures"
RUN = ("ours", "sft-v1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a trained and a fine-tuned version, the micro-batches (rows.json) and exports."""
    folder = tmp_path_factory.mktemp("sft")
    plan = sft_plan(folder)
    for run in ("main", "branch-v1"):
        train(run_words(plan, "ours", run)).ok()
    launch(f"{WORKER}:prepare", [str(plan)]).ok()
    launch(f"{WORKER}:record_rows", [str(folder / "rows.json"), *run_words(plan, *RUN)]).ok()
    for run, step in (("branch-v1", 4), ("sft-v1", last_step(folder))):
        checkpoint = folder / f"runs/ours/{run}/checkpoints/iter_{step:07d}"
        launch(f"{WORKER}:export", [str(checkpoint), str(folder / f"{run}-hf")]).ok()
    return folder


def last_step(folder: Path) -> int:
    """Return the last step of the fine-tuning."""
    return load_plan(folder / "plan.yaml").run(*RUN).last_step


def mean_answer_loss(model: Path, examples: list[tuple[list[int], list[int]]]) -> float:
    """Return the mean cross-entropy of the answers' tokens, computed per example with transformers."""
    from transformers import AutoModelForCausalLM

    llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    total, count = 0.0, 0
    for tokens, answers in examples:
        with torch.no_grad():
            scores = llama(torch.tensor([tokens])).logits[0].log_softmax(-1)
        for position in range(1, len(tokens)):
            if answers[position]:
                total -= float(scores[position - 1, tokens[position]])
                count += 1
    return total / count


def examples_of(rows: list[dict[str, Any]], folder: Path) -> list[tuple[list[int], list[int]]]:
    """Return the prepared examples in these micro-batches, identified by their tokens."""
    prepared = prepared_examples(folder)
    flat = [row for batch in rows for row in batch["tokens"]]
    text = ["," + ",".join(map(str, row)) + "," for row in flat]
    return [
        one for one in prepared if any("," + ",".join(map(str, one[0][:-1])) + "," in row for row in text)
    ]


def prepared_examples(folder: Path) -> list[tuple[list[int], list[int]]]:
    """Return tokens and mask of every prepared example."""
    base = folder / "runs/sft/data-1"
    lengths = np.frombuffer((base / "train_tokens.idx").read_bytes()[34:], dtype="<i4")[:40]
    cuts = np.cumsum(lengths)[:-1]
    tokens = np.split(np.fromfile(base / "train_tokens.bin", dtype=np.uint16), cuts)
    answers = np.split(np.fromfile(base / "train_answers.bin", dtype=np.uint8), cuts)
    return [(one.tolist(), other.tolist()) for one, other in zip(tokens, answers, strict=True)]


def test_the_loss_is_that_of_the_answers_of_each_example_alone(trained: Path) -> None:
    """The first step's loss equals that of transformers with the version's weights: masks, packing, start."""
    rows = json.loads((trained / "rows.json").read_text())[:2]
    step = examples_of(rows, trained)
    assert len(step) > 4  # several examples in a sample
    learned = sum(sum(mask[1:]) for _, mask in step)
    assert sum(sum(map(sum, row["loss_mask"])) for row in rows) == learned
    first = history(trained / "runs/ours/sft-v1")[0]
    assert first["loss"] == pytest.approx(mean_answer_loss(trained / "branch-v1-hf", step), rel=1e-5)


def test_every_example_is_seen_in_every_epoch(trained: Path) -> None:
    plan = load_plan(trained / "plan.yaml")
    batches = json.loads((trained / "rows.json").read_text())
    assert len(batches) == 2 * last_step(trained)
    samples = json.loads((trained / "runs/sft/prepared.json").read_text())["train"]["samples"]
    rows = [row for batch in batches for row in batch["tokens"]]
    assert plan.sft is not None
    for epoch in (rows[:samples], rows[samples : 2 * samples]):
        assert len(examples_of([{"tokens": epoch}], trained)) == 32  # of 40, with a fifth held out
    assert rows[:samples] != rows[samples : 2 * samples]


def test_examples_in_one_sample_do_not_see_each_other(trained: Path) -> None:
    answer = trained / "apart.json"
    launch(f"{WORKER}:packed_against_alone", [str(answer), str(trained / "plan.yaml")]).ok()
    found = json.loads(answer.read_text())
    assert found["examples"] > 1
    assert found["together"] < 1e-5 * found["largest"]
    assert found["disturbed"] == 0.0
    assert found["leaking"] > 1e-2 * found["largest"]


def test_the_run_is_one_like_all_others(trained: Path) -> None:
    folder = trained / "runs/ours/sft-v1"
    lineage = read_lineage(folder)
    assert lineage is not None
    assert (lineage["parent"]["run"], lineage["parent"]["step"]) == ("branch-v1", 4)
    assert set(lineage["identity"]["sft_data"]) == {"train"}
    rates = [line["lr"] for line in history(folder)]
    assert rates[0] == 0.0  # the warm-up of one step
    assert rates[1] == 0.02
    assert rates == sorted(rates[:1]) + sorted(rates[1:], reverse=True)
    assert json.loads((folder / "result.json").read_text())["step"] == last_step(trained)


def tuned_again(trained: Path, name: str, *extra: str, nproc: int = 1) -> tuple[Path, list[str]]:
    """Make a plan with another output, the trained version and the data; return folder and command line."""
    output = trained / name
    (output / "ours").mkdir(parents=True)
    for part in ("ours/main", "ours/branch-v1", "sft"):
        (output / part).symlink_to(trained / "runs" / part)
    plan = changed(trained / "plan.yaml", name, output=str(output))
    return output / "ours/sft-v1", run_words(plan, *RUN, *extra)


@pytest.mark.slow
def test_a_resumed_fine_tuning_ends_with_the_same_bytes(trained: Path) -> None:
    before = digests(trained / "runs/ours/branch-v1")
    folder, argv = tuned_again(trained, "again")
    for stop in (1, 3):
        train([*argv, "--exit-interval", str(stop)]).ok()
    train(argv).ok()
    step = f"checkpoints/iter_{last_step(trained):07d}"
    first, second = states(trained / "runs/ours/sft-v1" / step, folder / step)
    assert first == second
    assert digests(trained / "runs/ours/branch-v1") == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [(), ("--tensor-model-parallel-size", "2"), ("--pipeline-model-parallel-size", "2")],
    ids=["dp2", "tp2", "pp2"],
)
def test_every_layout_gives_the_same_losses(trained: Path, layout: tuple[str, ...]) -> None:
    """Micro-batches may have unequal numbers of answers: the loss is the mean over the whole batch."""
    folder, argv = tuned_again(trained, "-".join(["layout", *layout[:1]]), *layout)
    train([*argv, "--micro-batch-size", "1"], nproc=2).ok()
    steps = zip(history(folder), history(trained / "runs/ours/sft-v1"), strict=True)
    for here, there in steps:
        assert here["loss"] == pytest.approx(there["loss"], rel=2e-4)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=2e-3)


def test_evaluation_prints_both_perplexities(trained: Path) -> None:
    argv = ["--plan", str(trained / "plan.yaml"), "--device", "cpu", "--runs", "ours/sft-v1"]
    launch("megatron_lrpath.evaluate.worker:main", argv).ok()
    found = json.loads((trained / "runs/ours/sft-v1/eval.json").read_text())
    held = held_out(trained)
    assert len(held) == 8
    assert found["answers"]["tokens"] == sum(sum(mask[1:]) for _, mask in held)
    by_hand = mean_answer_loss(trained / "sft-v1-hf", held)
    assert found["answers"]["perplexity"] == pytest.approx(math.exp(by_hand), rel=1e-4)
    assert found["perplexity"] > 1
    assert set(found["domains"]) == {"prose", "code"}


def held_out(trained: Path) -> list[tuple[list[int], list[int]]]:
    """Return the examples that were not trained on."""
    seen = examples_of(json.loads((trained / "rows.json").read_text()), trained)
    return [one for one in prepared_examples(trained) if one not in seen]


def test_megatrons_own_evaluation_looks_at_the_held_out_answers(trained: Path) -> None:
    last = str(last_step(trained))
    _, argv = tuned_again(trained, "watched", "--eval-interval", last, "--eval-iters", "2")  # all
    output = train(argv).ok().output
    value = re.search(rf"validation loss at iteration {last} .*?lm loss value: (\S+)", output)
    assert value
    by_hand = mean_answer_loss(trained / "sft-v1-hf", held_out(trained))
    assert float(value[1]) == pytest.approx(by_hand, rel=1e-4)


def test_an_exported_model_can_be_talked_to(trained: Path) -> None:
    from transformers import AutoTokenizer

    folder = trained / "sft-v1-hf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prepared = prepared_examples(trained)
    for number, row in enumerate(conversations()):
        if "messages" in row:
            ids = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)["input_ids"]
            assert ids == prepared[number][0]
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    generation = json.loads((folder / "generation_config.json").read_text())
    assert tokenizer.convert_ids_to_tokens(generation["eos_token_id"]) == ["<|im_end|>", "</s>"]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=True)
    text = tokenizer.decode(ids["input_ids"] if isinstance(ids, dict) else ids, skip_special_tokens=True)
    assert "<|im_start|>" not in text


@pytest.mark.slow
def test_one_command_goes_from_the_plan_to_the_benchmarks_of_the_fine_tuned_model(
    trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    benchmark_data.write_own(trained / "tasks")
    argv = ["run", str(trained / "plan.yaml"), "--paradigm", "ours", "--run", "sft-v1", "--no-evaluate"]
    argv += ["--tasks", "GAOKAO", "--task-data", str(trained / "tasks"), "--device", "cpu", "--chat"]
    assert main(argv) == 0, (trained / "runs/logs/downstream.log").read_text()[-3000:]
    assert "ours/sft-v1 GAOKAO: " in capfd.readouterr().out
    stored = json.loads((trained / "runs/ours/sft-v1/downstream.json").read_text())
    assert stored["step"] == last_step(trained)
    assert stored["results"]["lrpath_gaokao"]["settings"]["chat"] is True
    assert main([*argv[: argv.index("--tasks") + 1], "no-such-task"]) == 2  # before anything is trained


def refusal(argv: list[str]) -> str:
    """Return the only message of a start that is refused."""
    outcome = train(argv)
    assert outcome.status == [2], outcome.output[-3000:]
    assert "Traceback" not in outcome.output
    return outcome.output.partition("lrpath: error: ")[2]


def test_changed_sft_settings_are_refused(trained: Path, tmp_path: Path) -> None:
    plan = trained / "plan.yaml"
    section = yaml.safe_load(plan.read_text())["sft"]
    for name, change, said in (
        ("rate", {"max_lr": 0.01}, "learning rate of sft-v1.max_lr: was 0.02, is 0.01"),
        ("length", {"seq_length": 64}, "was prepared with another seq_length"),
        ("seed", {"megatron": {"adam_beta2": 0.9}}, "sft.megatron.adam_beta2"),
    ):
        other = changed(plan, name, sft=section | change)
        assert said in refusal(run_words(other, *RUN))
    assert "packed samples are not split" in refusal(run_words(plan, *RUN, "--context-parallel-size", "2"))
    assert "--lr 1.0 contradicts" in refusal(run_words(plan, *RUN, "--lr", "1.0"))
    fresh = sft_plan(tmp_path)
    assert "--prepare" in refusal(run_words(fresh, *RUN))
    shutil.copytree(trained / "runs/sft", tmp_path / "runs/sft")
    assert "no checkpoint of step 4" in refusal(run_words(fresh, *RUN))
    tokens = tmp_path / "runs/sft/data-1/train_tokens.bin"
    content = bytearray(tokens.read_bytes())
    content[0] ^= 1
    tokens.write_bytes(content)
    assert "is not what was prepared" in refusal(run_words(fresh, *RUN))


def test_fine_tunings_are_tasks_behind_their_versions(tmp_path: Path) -> None:
    section = {"data": "chat.jsonl", "steps": 5, "max_lr": 1e-3, "versions": ["v2"]}
    plan = load_plan(make_plan(tmp_path, (4, 4), sft=section))
    tasks = {task.key: task for task in build_tasks(plan, ("ours", "ptfs", "cpt"))}
    tuned = [key for key in tasks if "/sft-" in key]
    assert tuned == ["ours/sft-v2", "ptfs/sft-v2", "cpt/sft-v2"]
    assert [(tasks[key].parent, tasks[key].parent_step) for key in tuned] == [
        ("ours/branch-v2", 8),
        ("ptfs/scratch-v2", 8),
        ("cpt/continual-v2", 8),
    ]
    with pytest.raises(UserError, match="ours/branch-v2 is not trained yet"):
        fine_tunings(plan, list(tasks.values()), None)
    done = plan.folder(plan.run("cpt", "continual-v2")) / "result.json"
    done.parent.mkdir(parents=True)
    done.write_text('{"step": 8}')
    assert [task.key for task in fine_tunings(plan, list(tasks.values()), None)] == ["cpt/sft-v2"]
    chain = with_ancestors(list(tasks.values()), plan, "sft-v2")
    assert [task.key for task in chain] == ["ours/main", "ours/branch-v2", "ours/sft-v2"]


def test_jobs_of_fine_tunings_run_on_as_many_nodes_as_share_out_their_batch(tmp_path: Path) -> None:
    section = {
        "data": "chat.jsonl",
        "steps": 5,
        "max_lr": 1e-3,
        "global_batch_size": 3,
        "micro_batch_size": 1,
    }
    path = make_plan(tmp_path, (4, 4), sft=section)
    settings = Settings(nodes=4, gpus_per_node=0)
    with pytest.raises(UserError, match=f"--prepare --output {tmp_path}/runs"):
        plan_jobs(SubmittedPlan.of(path), ("ours",), settings)
    (tmp_path / "runs/sft").mkdir(parents=True)
    (tmp_path / "runs/sft/prepared.json").write_text('{"train": {"samples": 9}}')
    jobs = {job.key: job for job in plan_jobs(SubmittedPlan.of(path), ("ours",), settings)}
    assert jobs["ours/main"].allocation.nodes == 4
    assert jobs["ours/sft-v2"].allocation.nodes == 3
    assert [wait.key for wait in jobs["ours/sft-v2"].waits] == ["ours/branch-v2"]
    assert "eval/ours/sft-v2" in jobs


def test_model_cards_describe_mix_and_fine_tuning(tmp_path: Path) -> None:
    section = {"data": "chat.jsonl", "steps": 5, "max_lr": 1e-3}
    plan = load_plan(make_plan(tmp_path, (4,), sft=section, branch_mix={"slices": {"curated": 0.25}}))
    evaluation = {"answers": {"perplexity": 2.5, "tokens": 10}}
    card = training(plan, plan.run("ours", "sft-v1"), Origin(5, evaluation=evaluation))
    for said in (
        "## Fine-tuning",
        "weights of branch-v1, step 4",
        "2.5000 (10 tokens)",
        "2 of curated (25% curated)",
    ):
        assert said in card


def test_processes_that_cannot_share_out_the_batch_are_refused_before_anything_is_trained(
    tmp_path: Path,
) -> None:
    section = {
        "data": "chat.jsonl",
        "steps": 5,
        "max_lr": 1e-3,
        "global_batch_size": 6,
        "micro_batch_size": 2,
    }
    plan = load_plan(make_plan(tmp_path, (4, 4), sft=section))
    check_fine_tuning(plan, 3)
    with pytest.raises(UserError, match="6 samples cannot be shared out among 2"):
        check_fine_tuning(plan, 2)
    check_fine_tuning(plan, 2, ["--tensor-model-parallel-size", "2"])


def test_what_packed_samples_cannot_have_is_left_out(tmp_path: Path) -> None:
    section = {"data": "chat.jsonl", "steps": 5, "max_lr": 1e-3, "megatron": {"adam_beta2": 0.9}}
    megatron = {
        "context_parallel_size": 2,
        "transformer_impl": "transformer_engine",
        "adam_beta2": 0.95,
        "bf16": True,
    }
    plan = load_plan(make_plan(tmp_path, (4,), sft=section, megatron=megatron))
    assert plan.sft_megatron == {"adam_beta2": 0.9, "bf16": True}

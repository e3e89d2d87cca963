"""Trained versions on downstream benchmarks: the real harness, on small made-up data in local folders."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_lrpath.cli import main
from megatron_lrpath.errors import UserError
from megatron_lrpath.evaluate import downstream, local_data
from megatron_lrpath.evaluate import downstream_worker as harness
from megatron_lrpath.evaluate.downstream import (
    PAPER,
    TaskSettings,
    add_result,
    benchmarks,
    folder_subject,
    in_order,
    missing,
    results_of,
)
from megatron_lrpath.plan import load_plan
from megatron_lrpath.runs.folder import RunFolder
from tests.support import GOLDEN, benchmark_data, probes
from tests.support.training_fixtures import Outcome, make_plan, receive, run_words, train

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded"
)  # each fork has one thread
OWN = ("lrpath_c3", "lrpath_csl", "lrpath_gaokao")


def run(target: Callable[[list[str]], None], argv: list[str], probe: str = "nothing") -> Outcome:
    """Call `target` in a fork of this process, which imports torch, transformers and the harness once."""
    import lm_eval.models.huggingface  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    harness.task_manager()
    context = mp.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryFile("w+") as log:
        process = context.Process(target=forked, args=(target, argv, probe, log, sender))
        process.start()
        sender.close()
        process.join(500)
        if process.is_alive():
            process.kill()
            process.join()
        probed = receive(receiver)
        log.seek(0)
        return Outcome([process.exitcode], log.read(), [probed])


def forked(target: Callable[[list[str]], None], argv: list[str], probe: str, log: Any, sender: Any) -> None:
    """Run the target under the probe in the fork, with all output in `log`."""
    for descriptor in (1, 2):
        os.dup2(log.fileno(), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    with getattr(probes, probe)() as seen:
        target(argv)
        sender.send(seen)


def make_model(folder: Path) -> None:
    """Write a tiny LLaMA with random weights and a tokenizer of bytes, as a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(1)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate(["</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>").save_pretrained(
        folder
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def worker(argv: list[str]) -> None:
    """Make the model and the data in the folder `argv[0]`, then evaluate it as the other arguments say."""
    from megatron_lrpath.evaluate import downstream_worker

    folder, *rest = argv
    model, data = Path(folder) / "model", Path(folder) / "data"
    if not model.exists():
        make_model(model)
        benchmark_data.write_own(data)
        names = [one.task for one in PAPER if one.task not in OWN]
        configs = harness_configs(harness.task_manager(), names)
        benchmark_data.write_harness(data, configs)
    downstream_worker.main([str(model), "--task-data", str(data), "--device", "cpu", *rest])


def harness_configs(manager: Any, names: list[str]) -> list[dict[str, Any]]:
    """Return the configurations of all tasks below some groups, read from their files without any data."""
    from lm_eval.tasks._yaml_loader import load_yaml

    found = []
    for name in names:
        entry = manager._index[name]
        if entry.yaml_path is None:  # a tag
            found += harness_configs(manager, sorted(entry.tags))
            continue
        config = load_yaml(entry.yaml_path, resolve_func=False)
        if "dataset_path" in config:
            found.append(config)
        else:
            children = [child if isinstance(child, str) else child["task"] for child in config["task"]]
            found += harness_configs(manager, children)
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model that was evaluated on the nine benchmarks of the paper."""
    folder = tmp_path_factory.mktemp("downstream")
    outcome = run(worker, [str(folder), "--tasks", "paper"]).ok()
    assert outcome.output.count("samples, ") == 9
    return folder


def test_all_nine_are_measured_and_recorded(measured: Path) -> None:
    results = json.loads(RunFolder(measured / "model").downstream.read_text())["results"]
    assert set(results) == {one.task for one in PAPER}
    for benchmark in PAPER:
        result = results[benchmark.task]
        assert 0 <= result["score"] <= 1
        assert result["metric"] == benchmark.metric
        assert result["settings"] == {"limit": None, "num_fewshot": None, "chat": False}
        assert result["lm_eval"]
    samples = {task: result["samples"] for task, result in results.items()}
    assert (samples["lrpath_c3"], samples["lrpath_csl"], samples["lrpath_gaokao"]) == (6, 3, 2)
    assert (samples["gsm8k"], samples["mmlu"], samples["ceval-valid"]) == (2, 2 * 57, 2 * 52)
    assert (samples["cmmlu"], samples["bbh_fewshot"], samples["agieval"]) == (2 * 67, 2 * 27, 2 * 21)
    assert results["gsm8k"]["fewshot"] == [5]
    assert not (measured / "model/downstream").exists(), "the cache is gone once all is measured"


def test_a_score_is_the_models_own_choice(measured: Path) -> None:
    """CSL's accuracy equals a direct computation: the category of highest log-probability a character."""
    outcome = run(by_hand, [str(measured)]).ok()
    accuracy = json.loads(outcome.output.strip().splitlines()[-1])
    results = json.loads(RunFolder(measured / "model").downstream.read_text())["results"]
    assert accuracy == pytest.approx(results["lrpath_csl"]["score"])


def by_hand(argv: list[str]) -> None:
    """Print the accuracy of the model in a folder on its CSL data, without the harness."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(argv[0])
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    right = 0
    rows = local_data.read_csl(folder / "data/csl")
    for row in rows:
        scores = []
        for choice in row["choices"]:
            prompt = tokenizer(f"论文标题：{row['title']}\n学科门类：", return_tensors="pt").input_ids
            answer = tokenizer(choice, return_tensors="pt").input_ids
            with torch.no_grad():
                logits = model(torch.cat([prompt, answer], dim=1)).logits.log_softmax(-1)
            inner = logits[0, prompt.shape[1] - 1 : -1].gather(1, answer[0][:, None])
            scores.append(inner.sum().item() / len(choice))
        right += scores.index(max(scores)) == row["gold"]
    print(json.dumps(right / len(rows)))


def test_nothing_is_measured_twice_and_what_is_new_is(measured: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(measured, copy)
    argv = [str(copy), "--tasks", "CSL", "C3"]
    assert "samples, " not in run(worker, argv).ok().output
    again = run(worker, [*argv, "--limit", "1"]).ok().output
    assert again.count("(1 samples, ") == 2
    results = json.loads(RunFolder(copy / "model").downstream.read_text())["results"]
    assert results["lrpath_csl"]["settings"]["limit"] == 1
    assert len(results) == 9, "the others stay"


def test_what_was_answered_before_a_kill_is_not_asked_again(measured: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(measured, copy)
    RunFolder(copy / "model").downstream.unlink()
    argv = [str(copy), "--tasks", "CSL"]
    killed = run(worker, argv, probe="killed_after_answers")
    assert killed.status == [9], killed.output[-2000:]
    assert not RunFolder(copy / "model").downstream.exists()
    assert list((copy / "model/downstream").glob("answers-*"))
    outcome = run(worker, argv, probe="asked").ok()
    assert outcome.probed[0] == [], "every answer came from the cache"
    ours, theirs = (
        json.loads(RunFolder(place / "model").downstream.read_text())["results"]["lrpath_csl"]
        for place in (copy, measured)
    )
    assert ours["score"] == theirs["score"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", "no_such_task"], "has no task no_such_task"),
        (["--tasks", "hellaswag"], "no data of "),
        (["--tasks", "CSL", "--chat"], "has no chat template"),
    ],
)
def test_unmeasurable_input_gives_one_message(measured: Path, argv: list[str], message: str) -> None:
    outcome = run(worker, [str(measured), *argv])
    assert outcome.status == [2], outcome.output[-2000:]
    assert message in outcome.output
    assert "Traceback" not in outcome.output


def test_names_of_benchmarks() -> None:
    assert benchmarks(["paper"]) == list(PAPER)
    assert [one.task for one in benchmarks(["c-eval", "GSM8K", "gsm8k", "arc_easy"])] == [
        "ceval-valid",
        "gsm8k",
        "arc_easy",
    ]
    assert [one.label for one in in_order(["zz", "agieval", "aa", "lrpath_c3"])] == [
        "C3",
        "AGIEval",
        "aa",
        "zz",
    ]


def test_own_data_are_read_as_their_authors_wrote_them(tmp_path: Path) -> None:
    benchmark_data.write_own(tmp_path)
    c3 = local_data.read_c3(tmp_path / "c3")
    assert len(c3) == 6
    assert (c3[0]["context"], c3[0]["choices"][c3[0]["gold"]]) == ("男：你好。\n女：你好。", "家")
    csl = local_data.read_csl(tmp_path / "csl")
    assert {row["choices"][row["gold"]] for row in csl} == {"工学", "医学", "历史学"}
    assert [row["gold"] for row in local_data.read_gaokao(tmp_path / "gaokao")] == [0, 3]


@pytest.mark.parametrize(
    ("files", "config"),
    [
        (["set/name/one/test-00000-of-00002.jsonl", "set/name/one/test-00001-of-00002.jsonl"], "one"),
        (["set/name/data/test.jsonl"], None),
        (["set/name/test.json"], None),
        (["set/name/test/one.csv"], "one"),
        (["set/name/test/one_test.csv"], "one"),
        (["set/name/one/test.parquet"], "one"),
    ],
)
def test_places_of_data(tmp_path: Path, files: list[str], config: str | None) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pa.table({"question": ["why"]}), path)
        else:
            path.write_text("question\nwhy\n" if path.suffix == ".csv" else '{"question": "why"}\n')
    found = local_data.find(tmp_path, "set/name", config)
    assert list(found) == ["test"]
    (tmp_path / "set/name/test").mkdir(parents=True, exist_ok=True)
    (tmp_path / "set/name/test/one_more.csv").touch()  # another configuration
    assert local_data.find(tmp_path, "set/name", config) == found
    rows = [row for path in found["test"] for row in local_data.read_file(path)]
    assert rows == [{"question": "why"}] * len(files)
    with pytest.raises(UserError, match="no data of set/name"):
        local_data.find(tmp_path, "set/name", "two")


def test_results_belong_to_weights_and_settings(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"one")
    wanted = benchmarks(["GSM8K", "C3"])
    subject = folder_subject(tmp_path)
    assert missing(subject, wanted, TaskSettings()) == wanted
    add_result(
        subject, wanted[0], {"score": 0.5, "settings": {"limit": None, "num_fewshot": None, "chat": False}}
    )
    assert missing(subject, wanted, TaskSettings()) == wanted[1:]
    assert missing(subject, wanted, TaskSettings(limit=3)) == wanted
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert results_of(folder_subject(tmp_path)) == {}
    RunFolder(tmp_path).downstream.write_text("{broken")
    assert missing(subject, wanted, TaskSettings()) == wanted


def test_models_of_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sft = {"data": "chat.jsonl", "steps": 3, "max_lr": 0.001, "paradigms": ["ours"]}
    plan = load_plan(make_plan(tmp_path, (4, 4), sft=sft))
    monkeypatch.setattr(downstream, "is_complete", lambda folder, run: True)
    monkeypatch.setattr(downstream, "run_subject", lambda plan, run: run.name)
    bare, tuned = ["branch-v1", "branch-v2"], ["sft-v1", "sft-v2"]
    assert downstream.plan_subjects(plan, ["ours"]) == [*bare, *tuned]
    assert downstream.plan_subjects(plan, ["ours"], models="versions") == bare
    assert downstream.plan_subjects(plan, ["ours"], models="fine-tuned") == tuned
    assert downstream.plan_subjects(plan, ["ours"], "sft-v2") == tuned[1:]
    for name, models in (("sft-v2", "versions"), ("main", "all")):
        with pytest.raises(UserError, match=f"has no run '{name}'"):
            downstream.plan_subjects(plan, ["ours"], name, models)


def test_what_belongs_to_perplexities_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--nproc", "2"], ["--", "--bf16"]):
        assert main(["eval", str(tmp_path), "--tasks", "paper", *argv]) == 2
        assert "--tasks asks the exported model" in capsys.readouterr().err


def test_a_folder_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tmp_path), "--tasks", "paper"]) == 2
    assert "neither a plan nor a Hugging Face folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_plans_versions_are_exported_measured_and_reported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = {"type": "SentencePieceTokenizer", "model": str(GOLDEN / "sp.model")}
    plan = make_plan(tmp_path, (4,), tokenizer=tokenizer, megatron={"max_position_embeddings": 256})
    train(run_words(plan, "ours", "main")).ok()
    train(run_words(plan, "ours", "branch-v1")).ok()
    benchmark_data.write_own(tmp_path / "tasks")
    argv = ["eval", str(plan), "--tasks", "CSL", "GAOKAO", "--task-data", str(tmp_path / "tasks")]
    assert main([*argv, "--device", "cpu"]) == 0, (tmp_path / "runs/logs/downstream.log").read_text()[-3000:]
    shown = capfd.readouterr().out
    assert "ours/branch-v1 CSL: " in shown
    folder = tmp_path / "runs/ours/branch-v1"
    stored = json.loads(RunFolder(folder).downstream.read_text())
    assert (stored["step"], set(stored["results"])) == (4, {"lrpath_csl", "lrpath_gaokao"})
    assert not (folder / "downstream").exists()
    assert main([*argv, "--device", "cpu"]) == 0
    assert "nothing to measure" in capfd.readouterr().out
    assert main(["report", str(plan)]) == 0
    assert "GAOKAO" in (tmp_path / "runs/report/index.html").read_text()

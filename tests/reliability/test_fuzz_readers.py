"""Every JSON file that is read, with depth, long numbers, infinities, lone surrogates and wrong types.

The result is a clear error or a correct load; no other exception reaches a user as a stack trace.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_lrpath import locks
from megatron_lrpath.commands.status import collect as status_of
from megatron_lrpath.data.record import read_record, recorded_content
from megatron_lrpath.data.token_sample import Samples
from megatron_lrpath.errors import UserError
from megatron_lrpath.evaluate import local_data
from megatron_lrpath.export import architecture
from megatron_lrpath.export.config import from_config
from megatron_lrpath.launch.slurm.jobs import Spec
from megatron_lrpath.launch.slurm.ledger import Ledger, read_attempts
from megatron_lrpath.plan import load_plan
from megatron_lrpath.reading import required_object
from megatron_lrpath.report.collect import collect, gaps
from megatron_lrpath.report.evaluations import downstream_table
from megatron_lrpath.report.facts import facts
from megatron_lrpath.report.style import read_advice
from megatron_lrpath.report.tables import main_table, run_table
from megatron_lrpath.runs import failure, history, lineage, results
from megatron_lrpath.runs.checkpoints import ManifestError, read_manifest
from megatron_lrpath.tokenizers.prints import special_tokens
from tests.reliability.test_fuzz_files import JSON, LINEAGE, PLAN
from tools.import_hf import SafetensorsFolder

RAW = {
    "deep": "[" * 200_000,
    "deep, closed": "[" * 5_000 + "]" * 5_000,
    "digits": "9" * 5_000,
    "large": "1" + "0" * 30,
    "overflow": "1e400",
    "infinity": "-Infinity",
    "nan": "NaN",
    "half": '"\\ud800x"',
    "nul": '"a\\u0000b"',
    "long": '"' + "n" * 300 + '"',
}
MARK = "<here>"


@dataclass(frozen=True)
class Reader:
    """A file: its place in the folder, valid content, and the function that reads it."""

    file: str
    content: Any
    read: Callable[[Path], object]


def plan_of(folder: Path) -> Any:
    path = folder / "plan.yaml"
    if not path.is_file():
        path.write_text(PLAN.replace("output: runs", f"output: {folder}/runs"))
    return load_plan(path)


def ours(*_: object) -> tuple[str, ...]:
    """Return the paradigms of every plan here."""
    return ("ours",)


def report(folder: Path) -> None:
    """Produce everything that the report and the status show of a plan's runs."""
    plan = plan_of(folder)
    tree = collect(plan)
    gaps(tree), run_table(tree), facts(tree), main_table(tree), downstream_table(tree)
    json.dumps(status_of(folder / "plan.yaml", ours), allow_nan=False).encode()
    for run in plan.runs("ours"):
        results.is_complete(plan.folder(run), run), results.needs_evaluation(plan, run)
    results.main_path_evaluations(plan.folder(plan.main))
    results.report_is_fresh(folder / "runs/report", [plan.folder(plan.main)])
    read_advice(plan)


RUN = "runs/ours/branch-v1"
EVALUATION = {
    "step": 100,
    "checkpoint": "a",
    "loss": 3.5,
    "perplexity": 33.1,
    "tokens": 9,
    "domains": {"prose": {"loss": 3.5, "perplexity": 33.1, "tokens": 9}},
    "validation": "b",
    "answers": {"loss": 1.5, "perplexity": 4.4, "tokens": 2},
}
SUMS = {"bytes": 3, "mtime_ns": 1, "block": 1048576, "xxh3_64": ["0" * 16]}
RECORD = {
    "format": 1,
    "fingerprint": "f",
    "tokenizer": {"type": "NullTokenizer", "vocab_size": 9, "eod": None},
    "content": SUMS,
}
JOB = {"key": "ours/main", "number": 7, "script": "x", "depends": [3], "parent": None, "parent_step": 0}
SPEC = {
    "key": "ours/main",
    "kind": "train",
    "plan": "p",
    "paradigm": "ours",
    "run": "main",
    "folder": "f",
    "device": "cpu",
    "arguments": ["--lr"],
    "srun": [],
    "python": ["python3"],
    "preflight": False,
}
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    "head_dim": 4,
    "hidden_act": "silu",
}


def prepared(folder: Path) -> object:
    return plan_of(folder).prepared_record()


def import_config(folder: Path) -> object:
    return architecture.to_megatron(from_config(required_object(folder / "config.json")))


READERS = {
    "lineage": Reader("lineage.json", LINEAGE, lineage.read_lineage),
    "lineage, reported": Reader(f"{RUN}/lineage.json", LINEAGE, report),
    "result": Reader(f"{RUN}/result.json", {"step": 100, "loss": 3.5, "checkpoint": "a"}, report),
    "error": Reader(f"{RUN}/error.json", {"kind": "user", "message": "m", "rank": 0, "status": 2}, report),
    "a failure": Reader(
        "error.json", {"kind": "user", "message": "m", "step": 1}, lambda at: failure.read(at / "error.json")
    ),
    "evaluation": Reader(f"{RUN}/eval.json", EVALUATION, report),
    "evaluations": Reader("runs/ours/main/evals.json", {"3": EVALUATION}, report),
    "downstream": Reader(
        f"{RUN}/downstream.json",
        {"step": 100, "checkpoint": "a", "results": {"t": {"score": 0.5, "stderr": 0.1, "metric": "m"}}},
        report,
    ),
    "made from": Reader("runs/report/made-from.json", {"evaluations": {"ours/main": "a"}}, report),
    "advice": Reader(
        "runs/advice/advice.json", {"written": "x", "title": "t", "caption": "c", "sentences": ["s"]}, report
    ),
    "history": Reader(
        f"{RUN}/history.jsonl", {"step": 3, "loss": 3.5, "lr": 0.1, "seconds": 1.0, "skipped": True}, report
    ),
    "a line": Reader(
        "line",
        {"step": 3, "loss": 3.5, "spike": {}},
        lambda at: history.parse_line((at / "line").read_bytes()),
    ),
    "manifest": Reader(
        "iter_0000003/manifest.json",
        {"format": 1, "step": 3, "files": {"a.distcp": {"bytes": 1, "xxh3_128": "0" * 32}}},
        lambda at: read_manifest(at / "iter_0000003"),
    ),
    "jobs": Reader(
        "slurm/jobs.json",
        {"jobs": [JOB]},
        lambda at: [f"{e.key}{e.number:d}" for e in Ledger(at / "slurm").entries()],
    ),
    "attempts": Reader(
        "attempts.jsonl",
        {"start": 0, "step": 1, "checkpoint": 1, "ending": "failed", "cause": None},
        lambda at: [f"{one.start:d}{one.step:d}" for one in read_attempts(at / "attempts.jsonl")],
    ),
    "spec": Reader("spec.json", SPEC, lambda at: Spec.read(at / "spec.json")),
    "record": Reader(
        "a.tokens.json", RECORD, lambda at: (read_record(at / "a", "f"), recorded_content(at / "a", "f"))
    ),
    "sample": Reader("cache/token_samples.json", {"x": [1, 2, 3]}, lambda at: Samples(at / "cache")),
    "prepared": Reader("runs/sft/prepared.json", {"train": {"samples": 3}, "settings": {}}, prepared),
    "lock": Reader(".lock", {"pid": 3, "host": "h"}, locks.describe_owner),
    "config": Reader("config.json", CONFIG, import_config),
    "index": Reader(
        "model.safetensors.index.json", {"weight_map": {"a": "b.safetensors"}}, SafetensorsFolder
    ),
    "tokenizer config": Reader("tokenizer_config.json", {"eos_token": {"content": "x"}}, special_tokens),
    "c3": Reader(
        "c3-d-test.json",
        [[["a"], [{"question": "q", "choice": ["a"], "answer": "a"}], "1"]],
        local_data.OWN["lrpath/c3"],
    ),
    "gaokao": Reader(
        "2020.json", {"example": [{"answer": ["A"], "question": "q"}]}, local_data.OWN["lrpath/gaokao"]
    ),
    "benchmark": Reader("test.jsonl", {"a": 1}, lambda at: local_data.read_file(at / "test.jsonl")),
}


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path to every place in a JSON value, itself included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(one for key, child in inner for one in places(child, (*way, key)))]


def replaced(value: Any, way: tuple[Any, ...], new: Any) -> Any:
    """Return the value with another value at a place."""
    if not way:
        return new
    changed = copy.deepcopy(value)
    owner = changed
    for key in way[:-1]:
        owner = owner[key]
    owner[way[-1]] = new
    return changed


def check(reader: Reader, folder: Path, text: str) -> None:
    """Check that reading gives a user's error or loads; the command line has a message for system errors."""
    path = folder / reader.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    with contextlib.suppress(UserError, ManifestError, OSError):
        reader.read(folder)


@pytest.mark.parametrize("name", READERS)
def test_readers_handle_unexpected_values_in_every_place(tmp_path: Path, name: str) -> None:
    reader = READERS[name]
    check(reader, tmp_path, json.dumps(reader.content))
    for way in places(reader.content):
        for raw in RAW.values():
            check(
                reader,
                tmp_path,
                json.dumps(replaced(reader.content, way, MARK)).replace(json.dumps(MARK), raw),
            )
        for other in (None, True, -1, 2.5, "", [[]], {"a": {}}):
            check(reader, tmp_path, json.dumps(replaced(reader.content, way, other)))


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_in_any_place(tmp_path: Path, name: str, data: st.DataObject) -> None:
    reader = READERS[name]
    way = data.draw(st.sampled_from(places(reader.content)))
    check(reader, tmp_path, json.dumps(replaced(reader.content, way, data.draw(JSON))))


@pytest.mark.parametrize(
    "text", ["name: " + "1" * 20_000 + "x", "name: " + "1" * 250_000, "alpha: " + "1_" * 9_000 + "e"]
)
def test_a_plan_of_digits_takes_no_time(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text + "\n" + PLAN.split("\n", 1)[1])
    begun = time.process_time()
    with contextlib.suppress(UserError):
        load_plan(path)
    assert time.process_time() - begun < 1.5


@pytest.mark.parametrize(
    "value", ['"a\\0b"', '"\\ud800x"', "1e400", "-1e400", ".inf", "1" * 399, "1" * 5000, "n" * 300]
)
@pytest.mark.parametrize(
    "key", ["name", "seed", "alpha", "output", "slices", "steps", "max_lr", "vocab_size", "model"]
)
def test_odd_values_in_a_plan(tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(re.sub(rf"\b{key}: [^,}}\n]+", lambda _: f"{key}: {value}", PLAN, count=1))
    with contextlib.suppress(
        UserError, OSError
    ):  # a name of 300 letters; the command line has a message for each
        plan = load_plan(path)
        status_of(path, ours)
        collect(plan)

"""Real trainings for tests: a tiny plan on real indexed datasets, the real entry point in forked processes.

A fork server imports torch and Megatron once, so that a training costs its own time and not eight seconds of
imports a process. What a process does is what `pretrain_gpt.py` does.
"""

from __future__ import annotations

import io
import json
import multiprocessing as mp
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_lrpath.launch.warm import PRELOADED
from megatron_lrpath.runs.history import CHECK
from tests.support.ports import free_ports

CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload([PRELOADED])

MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "swiglu": True,
    "normalization": "RMSNorm",
    "disable_bias_linear": True,
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
VOCABULARY = 120


@dataclass
class Outcome:
    """How a training ended: each rank's exit status, all output, and what its probe returned on each rank."""

    status: list[int | None]
    output: str
    probed: list[Any]

    def ok(self) -> Outcome:
        """Itself, or the output as the failure."""
        assert self.status == [0] * len(self.status), self.output[-6000:]
        return self


def make_plan(folder: Path, versions: Sequence[int] = (6, 6, 6), **changes: Any) -> Path:
    """A plan of tiny versions (steps each) with its data in `folder`; `changes` replace keys of the file."""
    plan: dict[str, Any] = {
        "name": "tiny-test",
        "seed": 7,
        "model": MODEL,
        "schedule": {"style": "cosine", "max_lr": 0.01, "min_lr": 0.001, "warmup_steps": 2},
        "alpha": 0.5,
        "batch": {"global_batch_size": 4, "micro_batch_size": 2, "seq_length": 16},
        "tokenizer": {"type": "NullTokenizer", "vocab_size": VOCABULARY},
        "data": {"slices": str(folder / "data/slices"), "valid": str(folder / "data/slices/valid")},
        "versions": [{"name": f"v{i}", "steps": steps} for i, steps in enumerate(versions, start=1)],
        "output": str(folder / "runs"),
    }
    plan.update(changes)
    step_tokens = plan["batch"]["global_batch_size"] * plan["batch"]["seq_length"]
    make_data(folder / "data", versions, step_tokens, plan["tokenizer"].get("vocab_size"))
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    return path


def make_data(folder: Path, versions: Sequence[int], step_tokens: int, vocab_size: int | None) -> None:
    """Random documents in an indexed dataset and a slice a version, with some more than its steps need."""
    from megatron_lrpath.data.record import write_record
    from megatron_lrpath.tokenizers.prints import TokenizerSpec
    from tests.support.data_fixtures import make_indexed_dataset, make_slice

    for number, steps in enumerate([*versions, 2], start=1):
        name = f"v{number}" if number <= len(versions) else "valid"
        slice_path = folder / "slices" / f"{name}.slice"
        if slice_path.exists():
            continue
        generator = np.random.default_rng(number if name != "valid" else 0)
        wanted = steps * step_tokens + 100
        documents = [generator.integers(1, VOCABULARY, size=25).tolist() for _ in range(wanted // 25 + 1)]
        prefix = make_indexed_dataset(folder / f"{name}_text_document", documents)
        if vocab_size is not None:
            write_record(prefix, "tests", TokenizerSpec("NullTokenizer", vocab_size=vocab_size).facts, {})
        slice_path.parent.mkdir(parents=True, exist_ok=True)
        half = len(documents) // 2
        domains = [(prefix, range(half), "prose"), (prefix, range(half, len(documents)), "code")]
        make_slice(slice_path, domains if name == "valid" else [(prefix, range(len(documents)), "prose")])


def run_words(plan: Path, paradigm: str, run: str, *extra: str) -> list[str]:
    """The command line of a run."""
    return ["--plan", str(plan), "--paradigm", paradigm, "--run", run, "--device", "cpu", *extra]


def train(words: Sequence[str], nproc: int = 1, probe: str | None = None, timeout: float = 240) -> Outcome:
    """Run the entry point with `words` on `nproc` ranks.

    `probe` names a context manager of `tests.support.probes` that watches the training and returns what it saw.
    """
    return launch("megatron_lrpath.training.pretrain:main", words, nproc, probe, timeout)


def launch(
    entry: str, words: Sequence[str], nproc: int = 1, probe: str | None = None, timeout: float = 240
) -> Outcome:
    """Call `module:function` with `words` on `nproc` ranks, each in a forked process of its own."""
    return Ranks.start(entry, words, nproc, probe).outcome(timeout)


def lrpath(*words: object, stdin: str = "") -> Outcome:
    """`lrpath` with this standard input, in a forked process; the processes that it starts are forked too."""
    return launch("tests.support.training_fixtures:command", [stdin, *map(str, words)])


def command(words: list[str]) -> None:
    """Call `lrpath` with the words after the first, which is its standard input."""
    from megatron_lrpath.cli import main

    sys.stdin = io.StringIO(words[0])
    raise SystemExit(main(words[1:]))


@dataclass
class Ranks:
    """The processes of a training that was started, what receives their probes' answers, and their output."""

    processes: list[Any]
    receivers: list[Any]
    log: Path

    @classmethod
    def start(cls, entry: str, words: Sequence[str], nproc: int = 1, probe: str | None = None) -> Ranks:
        """Start `nproc` ranks."""
        port = free_ports(1)[0]
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(nproc)]
        log = Path(os.environ.get("TMPDIR", "/tmp")) / f"lrpath-test-{os.getpid()}-{port}.log"
        processes = [
            CONTEXT.Process(
                target=rank_main, args=(entry, list(words), rank, nproc, port, probe, log, pipes[rank][1])
            )
            for rank in range(nproc)
        ]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        return cls(processes, [receiver for receiver, _ in pipes], log)

    def outcome(self, timeout: float) -> Outcome:
        """Wait for their end; a rank that takes longer than `timeout` seconds is killed."""
        probed = [receive(receiver) for receiver in self.receivers]
        for process in self.processes:
            process.join(timeout)
            if process.is_alive():
                process.kill()
                process.join()
        output = self.log.read_text(errors="replace") if self.log.exists() else ""
        self.log.unlink(missing_ok=True)
        return Outcome([process.exitcode for process in self.processes], output, probed)


def receive(receiver: Any) -> Any:
    """What a rank's probe sent, None where the rank ended without sending."""
    try:
        return receiver.recv()
    except EOFError:
        return None


def rank_main(
    entry: str, words: list[str], rank: int, world: int, port: int, probe: str | None, log: Path, sender: Any
) -> None:
    """One rank: environment as a launcher sets it, output into `log`, the entry under the probe."""
    import importlib

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    if world > 1:  # one alone needs no port, and takes none
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    module, name = entry.split(":")
    main: Callable[[list[str]], None] = getattr(importlib.import_module(module), name)
    from tests.support import probes

    with getattr(probes, probe or "nothing")() as seen:
        try:
            main(words)
        finally:  # Megatron leaves through sys.exit when it stops early
            sender.send(seen)
            sys.stdout.flush()


def begin_process_group() -> None:
    """Join the other ranks of a `launch`, for an entry that does not do so itself."""
    import torch

    from megatron_lrpath.training.guards.peers import own_store

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world, store=own_store())


def history(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's history, without their checksums."""
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != CHECK} for row in rows]

"""Real trainings for tests: a tiny plan on real indexed datasets, the real entry point in forked processes.

A fork server imports torch and Megatron once, which saves eight seconds of imports per process. A process
does the same as `pretrain_gpt.py`.
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
    """Result of a training: each rank's exit status, all output, and what its probe returned on each rank."""

    status: list[int | None]
    output: str
    probed: list[Any]

    def ok(self) -> Outcome:
        """Return this outcome; fail with the output if a status is not 0."""
        assert self.status == [0] * len(self.status), self.output[-6000:]
        return self


def make_plan(folder: Path, versions: Sequence[int] = (6, 6, 6), **changes: Any) -> Path:
    """Write a plan of tiny versions (steps each) with its data in `folder`; `changes` replace its keys."""
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
    """Write an indexed dataset of random documents and a slice per version, larger than its steps need."""
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
    """Return the command line of a run."""
    return ["--plan", str(plan), "--paradigm", paradigm, "--run", run, "--device", "cpu", *extra]


def train(argv: Sequence[str], nproc: int = 1, probe: str | None = None, timeout: float = 240) -> Outcome:
    """Run the entry point with `argv` on `nproc` ranks.

    `probe` names a context manager of `tests.support.probes` that watches the training and records data.
    """
    return launch("megatron_lrpath.training.pretrain:main", argv, nproc, probe, timeout)


def launch(
    entry: str, argv: Sequence[str], nproc: int = 1, probe: str | None = None, timeout: float = 240
) -> Outcome:
    """Call `module:function` with `argv` on `nproc` ranks, each in a forked process of its own."""
    return Ranks.start(entry, argv, nproc, probe).outcome(timeout)


def lrpath(*argv: object, stdin: str = "") -> Outcome:
    """Run `lrpath` with this standard input in a forked process, whose child processes are forked as well."""
    return launch("tests.support.training_fixtures:command", [stdin, *map(str, argv)])


def command(argv: list[str]) -> None:
    """Call `lrpath` with `argv[1:]`; `argv[0]` is its standard input."""
    from megatron_lrpath.cli import main

    sys.stdin = io.StringIO(argv[0])
    raise SystemExit(main(argv[1:]))


@dataclass
class Ranks:
    """Processes of a started training, the pipes that receive their probes' records, and their output."""

    processes: list[Any]
    receivers: list[Any]
    log: Path

    @classmethod
    def start(cls, entry: str, argv: Sequence[str], nproc: int = 1, probe: str | None = None) -> Ranks:
        """Start `nproc` ranks."""
        port = free_ports(1)[0]
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(nproc)]
        log = Path(os.environ.get("TMPDIR", "/tmp")) / f"lrpath-test-{os.getpid()}-{port}.log"
        processes = [
            CONTEXT.Process(
                target=rank_main, args=(entry, list(argv), rank, nproc, port, probe, log, pipes[rank][1])
            )
            for rank in range(nproc)
        ]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        return cls(processes, [receiver for receiver, _ in pipes], log)

    def outcome(self, timeout: float) -> Outcome:
        """Wait for the ranks to end; kill a rank that takes longer than `timeout` seconds."""
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
    """Return the records of a rank's probe, None if the rank ended without sending."""
    try:
        return receiver.recv()
    except EOFError:
        return None


def rank_main(
    entry: str, argv: list[str], rank: int, world: int, port: int, probe: str | None, log: Path, sender: Any
) -> None:
    """Run a rank: set the launcher's environment, send output to `log`, call the entry under the probe."""
    import importlib

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    if world > 1:  # a single rank needs no port
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
            main(argv)
        finally:  # Megatron exits through sys.exit when it stops early
            sender.send(seen)
            sys.stdout.flush()


def begin_process_group() -> None:
    """Join the other ranks of a `launch`, for an entry that does not do so itself."""
    import torch

    from megatron_lrpath.training.guards.peers import own_store

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world, store=own_store())


def history(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's history, without their checksums."""
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != CHECK} for row in rows]

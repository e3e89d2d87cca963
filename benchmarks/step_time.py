#!/usr/bin/env python3
"""A training step on the CPU: this project's (Megatron's whole loop) and Hugging Face's `LlamaForCausalLM`.

Each contender has a process of its own; they take turns in short blocks of steps, never at the same time, and every
block is compared with the other's neighbour: what else the machine does then falls on both alike.

  python benchmarks/step_time.py            # a 10M-parameter model, fp32 and bf16
  python benchmarks/step_time.py --quick    # the same with fewer blocks

Ours is `pretrain_gpt.py --plan …` as it is, with its data loading, gradient clipping, logging and history. Hugging
Face's is the bare loop: `model(input_ids, labels=…)` (sdpa), backward, `clip_grad_norm_`, fused AdamW, `loss.item()`.
In bf16 Megatron keeps fp32 master weights, moments and gradient sums. Hugging Face's is measured in two ways:
`bf16`, everything in bf16, weights, gradients and moments (less work, and another optimizer result); and `autocast`,
fp32 weights and moments with the matrix products in bf16 (what Hugging Face's Trainer does for bf16=True).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.contenders import Shape, llama, run_argv, write_plan  # noqa: E402

CONTENDERS = {"fp32": ("hf-fp32",), "bf16": ("hf-bf16", "hf-autocast")}
LR = 1e-3
WARMUP_BLOCKS = 2


def clocks() -> tuple[float, float]:
    """Return the seconds of the wall clock, and of processor time of all threads."""
    return time.perf_counter(), time.process_time()


def turns(connection: Connection, steps: int) -> Callable[[], None]:
    """Return a function to call at the beginning of every step.

    It ends a block every `steps` steps, reports the block's duration (by both clocks), and waits for the next
    turn.
    """
    state: dict[str, Any] = {"step": 0}

    def step_begins() -> None:
        if state["step"] % steps == 0:
            if state["step"]:
                connection.send([end - start for end, start in zip(clocks(), state["start"], strict=True)])
            if connection.recv() != "go":
                os._exit(0)
            state["start"] = clocks()
        state["step"] += 1

    return step_begins


def contender(name: str, shape: Shape, folder: Path, steps: int, total: int, connection: Connection) -> None:
    """Run as the process of a contender: output goes to a file, and the parent starts each of its turns."""
    log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    begins = turns(connection, steps)
    if name.startswith("ours"):
        ours(shape, folder, name.removeprefix("ours-"), total, begins)
    else:
        hugging_face(shape, name.removeprefix("hf-"), begins)


def ours(shape: Shape, folder: Path, precision: str, total: int, begins: Callable[[], None]) -> None:
    """Train the plan's run by the real entry."""
    from megatron_lrpath.training.machine import activate

    activate("cpu")
    plan = write_plan(shape, folder, precision, total, max_lr=LR, bf16=precision == "bf16")
    from megatron_lrpath.training import forward, pretrain

    original = forward.ForwardStep.__call__

    def forward_step(*args: Any) -> Any:
        begins()
        return original(*args)

    forward.ForwardStep.__call__ = forward_step  # type: ignore[method-assign,assignment]
    pretrain.main(run_argv(plan, "cpu"))


def hugging_face(shape: Shape, precision: str, begins: Callable[[], None]) -> None:
    """Train `LlamaForCausalLM` on random tokens, in an eager loop that does nothing else."""
    import torch

    model = llama(shape).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, fused=True
    )
    batches = torch.randint(1, shape.vocabulary - 1, (16, shape.batch, shape.sequence))
    number = 0
    while True:
        begins()
        tokens = batches[number % len(batches)]
        number += 1
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()


def compare(precision: str, shape: Shape, blocks: int, steps: int) -> list[dict[str, Any]]:
    """Let ours and Hugging Face's take turns; return a row for each of Hugging Face's precisions."""
    names = [f"ours-{precision}", *CONTENDERS[precision]]
    context = mp.get_context("spawn")
    total = (blocks + WARMUP_BLOCKS + 1) * steps
    with tempfile.TemporaryDirectory() as folder:
        pipes = {name: context.Pipe() for name in names}
        processes = [
            context.Process(
                target=contender, args=(name, shape, Path(folder), steps, total, pipes[name][1]), daemon=True
            )
            for name in names
        ]
        for process in processes:
            process.start()
        for _, child in pipes.values():
            child.close()
        try:
            seconds = take_turns({name: pipe for name, (pipe, _) in pipes.items()}, blocks)
        except (EOFError, BrokenPipeError):
            logs = "\n".join(path.read_text()[-3000:] for path in Path(folder).glob("*.log"))
            raise SystemExit(f"a contender ended early:\n{logs}") from None
        for (pipe, _), process in zip(pipes.values(), processes, strict=True):
            pipe.send("stop")
            process.join()
    return [row(precision, name, seconds[names[0]], seconds[name], steps) for name in names[1:]]


def take_turns(pipes: dict[str, Connection], blocks: int) -> dict[str, list[list[float]]]:
    """Return (wall, processor) seconds of each contender's blocks; reverse the order in every block."""
    seconds: dict[str, list[list[float]]] = {name: [] for name in pipes}
    names = list(pipes)
    for block in range(WARMUP_BLOCKS + blocks):
        for name in names if block % 2 else reversed(names):
            pipes[name].send("go")
            seconds[name].append(pipes[name].recv())
    return {name: values[WARMUP_BLOCKS:] for name, values in seconds.items()}


def row(
    precision: str, name: str, mine: list[list[float]], theirs: list[list[float]], steps: int
) -> dict[str, Any]:
    """Return medians (seconds a step), median and quartiles of the blocks' ratios, processor ratio."""
    ratios, processor = (
        statistics.quantiles([ours[clock] / other[clock] for ours, other in zip(mine, theirs, strict=True)])
        for clock in (0, 1)
    )
    return {
        "precision": precision,
        "against": name,
        "ours_s": statistics.median(wall for wall, _ in mine) / steps,
        "theirs_s": statistics.median(wall for wall, _ in theirs) / steps,
        "ratio": ratios[1],
        "quartiles": [ratios[0], ratios[2]],
        "processor_ratio": processor[1],
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", nargs="+", choices=tuple(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--blocks", type=int, default=24, help="turns of each contender (default: 24)")
    parser.add_argument("--steps", type=int, default=4, help="steps a turn (default: 4)")
    parser.add_argument("--quick", action="store_true", help="8 turns of 3 steps")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="OpenMP threads of a contender")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    shape = Shape(**{name: getattr(args, name) for name in asdict(Shape())})
    blocks, steps = (8, 3) if args.quick else (args.blocks, args.steps)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    load = os.getloadavg()[0]
    rows = [row for precision in args.precision for row in compare(precision, shape, blocks, steps)]
    if args.json:
        return print(json.dumps({"shape": asdict(shape), "load_before": load, "rows": rows}, indent=1))
    print(
        f"{shape.parameters / 1e6:.1f}M parameters, {shape.batch} × {shape.sequence} tokens a step;", end=" "
    )
    print(f"{args.threads} threads on {os.cpu_count()} cores, load average before: {load:.1f}")
    print(f"{'against':12} {'ours':>9} {'theirs':>9} {'ratio':>7}  {'quartiles':13}  processor time")
    for one in rows:
        print(f"{one['against']:12} {one['ours_s'] * 1e3:7.1f}ms {one['theirs_s'] * 1e3:7.1f}ms ", end="")
        print(
            f"{one['ratio']:7.3f}  {one['quartiles'][0]:.3f} … {one['quartiles'][1]:.3f}  {one['processor_ratio']:.3f}"
        )


if __name__ == "__main__":
    main()

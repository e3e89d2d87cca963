#!/usr/bin/env python3
"""A training step on a GPU: this project's with each of its kernels and without, Hugging Face's, and the ceiling.

  python benchmarks/gpu.py                        # the 1.2B model on one GPU, all contenders
  python benchmarks/gpu.py --model 203m --micro 8
  python benchmarks/gpu.py --device cpu           # every contender at a tiny size, to try the script

Each contender has a process of its own, one after the other. Ours is `pretrain_gpt.py --plan …` as it is, in bf16 with
fp32 master weights, moments and gradient sums:

  plain    --gpu-kernels none: Megatron's functions
  fusion   the same with Megatron's fused cross-entropy (--cross-entropy-loss-fusion)
  ours     all kernels that can be used, which is the default
  no-adam  all but the fused AdamW
  toggled  one process in which single kernels are turned off for blocks of steps, in turns (not the AdamW)
  hf       LlamaForCausalLM, all in bf16 (less work, and another optimizer result), eager, fused AdamW
  hf-compile  the same under torch.compile
  ceiling  the step's matrix products and attention alone, and a copy: what no implementation exceeds

Printed: tokens/s, the share of the GPU's peak (MFU, by Megatron's count of operations), peak memory, the last loss, and
with --profile the kernels that take most time. With --output the same as files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.contenders import VOCABULARY_UNIT, Shape, llama, run_argv, write_plan  # noqa: E402

OURS: dict[str, list[str]] = {
    "plain": ["--gpu-kernels", "none"],
    "fusion": ["--gpu-kernels", "none", "--cross-entropy-loss-fusion"],
    "ours": [],
    "no-adam": ["--gpu-kernels", "cross_entropy", "rotary", "grad_norm"],
    "toggled": [],
}
CONTENDERS = (*OURS, "hf", "hf-compile", "ceiling")
WARMUP = 4  # steps that are not counted: compilation, allocation
BLOCK = 3  # steps of a block in `toggled`
CPU_SHAPE = Shape(hidden=64, ffn=128, layers=2, heads=4, vocabulary=512, sequence=32, batch=4)
ROW = "ROW "


def shape_of(model: str, sequence: int, batch: int, vocabulary: int = 100_000) -> Shape:
    """Return a recipe's shape."""
    from megatron_lrpath.models import RECIPES

    given = RECIPES[model].arguments
    padded = -(-vocabulary // VOCABULARY_UNIT) * VOCABULARY_UNIT
    return Shape(
        hidden=given["hidden_size"],
        ffn=given["ffn_hidden_size"],
        layers=given["num_layers"],
        heads=given["num_attention_heads"],
        vocabulary=padded,
        sequence=sequence,
        batch=batch,
    )


# ---------------------------------------------------------------- one contender, in its own process


def wait_for_device(device: str) -> None:
    """Wait until the GPU has finished all its work."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def peak_of(device: str) -> float | None:
    """Return the peak FLOP/s of the device; None if unknown, as for a CPU."""
    import torch

    from megatron_lrpath.devices import peak_flops

    return peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None


def report(name: str, options: argparse.Namespace, seconds: list[float], **more: Any) -> None:
    """Print a contender's row for the parent; `seconds` are those of each counted step."""
    import torch

    shape: Shape = options.shape
    tokens = shape.batch * shape.sequence / statistics.median(seconds)
    peak, is_gpu = peak_of(options.device), options.device == "cuda"
    row = {
        "name": name,
        "micro": options.micro,
        "tokens_s": tokens,
        "mfu": tokens * shape.flops_per_token / peak if peak else None,
        "seconds": [min(seconds), statistics.median(seconds), max(seconds)],
        "gib": torch.cuda.max_memory_allocated() / 2**30 if is_gpu else None,
        **more,
    }
    print(ROW + json.dumps(row), flush=True)


class Profile:
    """Profiler of a single step that prints the kernels with the most time."""

    def __init__(self, device: str, rows: int = 20) -> None:
        import torch

        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
        self.device, self.rows = device, rows
        self.profiler = torch.profiler.profile(activities=kinds)

    def begin(self) -> None:
        """Start profiling, at the beginning of the step."""
        self.profiler.__enter__()

    def end(self) -> None:
        """Stop profiling at the end of the step, and print the table."""
        wait_for_device(self.device)
        self.profiler.__exit__(None, None, None)
        key = "self_device_time_total" if self.device == "cuda" else "self_cpu_time_total"
        table = self.profiler.key_averages().table(sort_by=key, row_limit=self.rows, max_name_column_width=70)
        print(table, flush=True)


def ours(name: str, options: argparse.Namespace) -> None:
    """Train the plan's run by the real entry; exit before its last step, whose checkpoint takes minutes."""
    from megatron_lrpath.training.machine import activate

    activate(options.device)
    shape, per_step = options.shape, options.shape.batch // options.micro
    folder: Path = options.folder
    plan = write_plan(shape, folder, name, options.steps + 2, options.micro, 1e-4, bf16=True, adam_beta2=0.95)
    from megatron_lrpath.training import forward, pretrain

    original = forward.ForwardStep.__call__
    profile = Profile(options.device) if options.profile else None
    begun: list[float] = []
    calls = 0
    turns = Turns(options.device) if name == "toggled" else None

    def forward_step(self: Any, *args: Any) -> Any:
        nonlocal calls
        if calls % per_step == 0:
            wait_for_device(options.device)
            begun.append(time.perf_counter())
            if turns is not None:
                turns.step_begins(len(begun) - 1)
            if profile is not None and len(begun) == options.steps + 1:
                profile.begin()
            if len(begun) == options.steps + 2:
                leave(self)
        calls += 1
        return original(self, *args)

    def leave(step: Any) -> None:
        if profile is not None:
            profile.end()
        seconds = [end - start for start, end in itertools.pairwise(begun)][WARMUP : options.steps]
        from megatron_lrpath.runs.history import read_history

        history = read_history(folder / name / "ptfs/scratch-v1")
        loss = float(history["loss"][-1]) if len(history) else None
        if turns is not None:
            turns.report(seconds)
        report(name, options, seconds, loss=loss)
        os._exit(0)

    forward.ForwardStep.__call__ = forward_step  # type: ignore[method-assign,assignment]
    flags = OURS[name] if options.device == "cuda" else []  # the CPU has kernels of its own
    pretrain.main([*run_argv(plan, options.device), "--save-interval", "100000", *flags])


class Turns:
    """Turns of steps in which single kernels are off, alternating with all kernels on."""

    def __init__(self, device: str) -> None:
        from megatron_lrpath.training import seams
        from megatron_lrpath.training.gpu.measures import ADAM, KERNELS

        self.names = ["", *(name for name in KERNELS if name != ADAM)]
        self.session: Any = None
        self.all: frozenset[str] = frozenset()
        original = seams.apply

        def apply(session: Any) -> None:
            self.session = session
            original(session)

        seams.apply = apply

    def step_begins(self, step: int) -> None:
        """Choose the kernels of a step, counted from 0."""
        if step == 0:
            self.all = self.session.kernels
        self.session.kernels = self.all - {self.off(step)}

    def off(self, step: int) -> str:
        """Return the kernel that is off in a step; empty for none."""
        return self.names[(step - WARMUP) // BLOCK % len(self.names)] if step >= WARMUP else ""

    def report(self, seconds: list[float]) -> None:
        """Print the time of a step without each kernel; the first step of a block is not counted."""
        for name in self.names:
            steps = [
                taken
                for index, taken in enumerate(seconds)
                if self.off(index + WARMUP) == name and index % BLOCK
            ]
            if steps:
                median = statistics.median(steps) * 1e3
                print(f"toggled: {f'without {name}' if name else 'all kernels'}: {median:.1f} ms a step")


def hugging_face(name: str, options: argparse.Namespace) -> None:
    """Train `LlamaForCausalLM` in bf16 on random tokens, in a loop that does nothing else."""
    import torch

    shape, device = options.shape, options.device
    torch.manual_seed(0)
    model = llama(shape, device).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    run: Callable[..., Any] = torch.compile(model) if name == "hf-compile" else model
    profile = Profile(device) if options.profile else None
    seconds = []
    micros = shape.batch // options.micro
    for step in range(options.steps + 1):
        wait_for_device(device)
        if profile is not None and step == options.steps:
            profile.begin()
        start = time.perf_counter()
        for _ in range(micros):
            tokens = torch.randint(1, shape.vocabulary - 1, (options.micro, shape.sequence), device=device)
            loss = run(input_ids=tokens, labels=tokens).loss / micros
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last = loss.item() * micros
        seconds.append(time.perf_counter() - start)
    if profile is not None:
        profile.end()
    report(name, options, seconds[WARMUP : options.steps], loss=last)


def ceiling(name: str, options: argparse.Namespace) -> None:
    """Time only the step's matrix products and attention, and print the rate of each."""
    import torch
    import torch.nn.functional as F

    shape, device = options.shape, options.device
    hidden, tokens = shape.hidden, options.micro * shape.sequence

    def random(*size: int) -> Any:
        return torch.randn(*size, device=device, dtype=torch.bfloat16)

    total = 0.0
    products = {
        "qkv": (3 * hidden, hidden, shape.layers),
        "projection": (hidden, hidden, shape.layers),
        "up and gate": (2 * shape.ffn, hidden, shape.layers),
        "down": (hidden, shape.ffn, shape.layers),
        "output": (shape.vocabulary, hidden, 1),
    }
    for what, (out, into, times) in products.items():
        inputs, weight, grad = random(tokens, into), random(out, into), random(tokens, out)
        forward = median(partial(torch.matmul, inputs, weight.t()), device)
        to_inputs = median(partial(torch.matmul, grad, weight), device)
        to_weight = median(partial(torch.matmul, grad.t(), inputs), device)
        total += times * (forward + to_inputs + to_weight)
        rates = [2 * tokens * out * into / taken / 1e12 for taken in (forward, to_inputs, to_weight)]
        line = (
            f"ceiling: {what}: {', '.join(f'{rate:.1f}' for rate in rates)} TFLOP/s (forward, inputs, weight)"
        )
        print(line + fused_line(inputs, grad, out, into, tokens, device), flush=True)
    heads, width = shape.heads, hidden // shape.heads
    states = [random(options.micro, heads, shape.sequence, width).requires_grad_() for _ in range(3)]
    grad = random(options.micro, heads, shape.sequence, width)

    def attend() -> None:
        query, key, value = states
        torch.autograd.grad(F.scaled_dot_product_attention(query, key, value, is_causal=True), states, grad)

    for backend in backends(device):
        try:
            with backend[1]:
                taken = median(attend, device)
        except RuntimeError as error:
            print(f"ceiling: attention, {backend[0]}: {str(error).splitlines()[0][:100]}")
            continue
        print(f"ceiling: attention, {backend[0]}: {taken * 1e3:.3f} ms forward and backward", flush=True)
        if backend[0] == "default":
            total += shape.layers * taken
    size = 2**30 if device == "cuda" else 2**24
    source = torch.empty(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    print(f"ceiling: copy: {2 * size / median(lambda: target.copy_(source), device) / 1e12:.2f} TB/s")
    print(f"ceiling: torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    report(name, options, [total * shape.batch / options.micro], loss=None)


def fused_line(inputs: Any, grad: Any, out: int, into: int, tokens: int, device: str) -> str:
    """Return the rate of a weight gradient added to fp32 inside the product, if the device supports it."""
    import torch

    from megatron_lrpath.training import fused_gradients

    if device != "cuda" or not fused_gradients.accumulates(torch.bfloat16):
        return ""
    main_grad = torch.zeros(out, into, device=device)
    taken = median(lambda: fused_gradients.wgrad_gemm_accum_fp32(inputs, grad, main_grad), device)
    return f"; added to fp32: {2 * tokens * out * into / taken / 1e12:.1f}"


def backends(device: str) -> list[tuple[str, Any]]:
    """Return the implementations of torch's attention, by name; the first is torch's choice."""
    from contextlib import nullcontext

    from torch.nn.attention import SDPBackend, sdpa_kernel

    named = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION] if device == "cuda" else []
    return [("default", nullcontext()), *((one.name, sdpa_kernel(one)) for one in named)]


def median(function: Callable[[], Any], device: str, repeats: int = 20) -> float:
    """Return the median seconds of a call; on a GPU measured by its own clock."""
    import torch

    for _ in range(3):
        function()
    if device != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start_event, end_event in events:
        start_event.record()
        function()
        end_event.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


# ---------------------------------------------------------------- all contenders


def run(name: str, micro: int, argv: list[str], limit: float) -> tuple[dict[str, Any] | None, str]:
    """Return a contender's row and all its output; no row if it failed or exceeded `limit` seconds."""
    command = [sys.executable, "-W", "ignore", __file__, "--contender", name, "--micro", str(micro), *argv]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--folder", folder]
        try:
            answer = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit
            )
            output = answer.stdout
        except subprocess.TimeoutExpired as error:
            output = (error.stdout or b"").decode(errors="replace") + f"\nended after {limit:.0f} s"
    rows = [line for line in output.splitlines() if line.startswith(ROW)]
    return (json.loads(rows[-1].removeprefix(ROW)) if rows else None), output


def line_of(row: dict[str, Any]) -> str:
    """Return a contender's line of the table."""
    mfu = f"{row['mfu']:7.1%}" if row["mfu"] is not None else f"{'–':>7}"
    gib = f"{row['gib']:8.1f}" if row["gib"] is not None else f"{'–':>8}"
    loss = f"{row['loss']:8.4f}" if row["loss"] is not None else f"{'–':>8}"
    low, middle, high = (1e3 * value for value in row["seconds"])
    times = f"{middle:9.1f} ({low:.1f} … {high:.1f})"
    return f"{row['name']:11} {row['micro']:5} {row['tokens_s']:11,.0f} {mfu} {gib} {loss} {times}"


def compare(options: argparse.Namespace, argv: list[str]) -> int:
    """Run the contenders one after the other and print a table; return the number of those without a row."""
    end = time.monotonic() + options.budget
    print(f"{'':11} {'micro':>5} {'tokens/s':>11} {'MFU':>7} {'GiB':>8} {'loss':>8} {'ms a step':>9}")
    rows, failed = [], 0
    for micro in options.micros:
        for name in options.contenders:
            left = end - time.monotonic()
            if left < options.least:
                print(f"{name:11} {micro:5} not run: {left:.0f} s of --budget are left", flush=True)
                failed += 1
                continue
            row, output = run(name, micro, argv, min(left, options.limit))
            if options.output:
                options.output.mkdir(parents=True, exist_ok=True)
                (options.output / f"{options.model}-{name}-{micro}.log").write_text(output)
            if row is None:
                failed += 1
                print(f"{name:11} {micro:5} failed:\n{output[-2000:]}", flush=True)
                continue
            rows.append(row)
            print(line_of(row), flush=True)
            notes = [line for line in output.splitlines() if line.startswith(("toggled:", "ceiling:"))]
            print("".join(f"  {line}\n" for line in notes), end="", flush=True)
    if options.output:
        result = {"model": options.model, "device": options.device, "rows": rows}
        (options.output / f"{options.model}.json").write_text(json.dumps(result, indent=1))
    return failed


def main() -> None:
    """Measure and print a table; exit with status 1 if a contender has no row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="1.2b", help="a recipe (default: 1.2b)")
    add("--micro", type=int, nargs="+", default=[4], help="samples of a micro batch, several in turn")
    add("--batch", type=int, default=32, help="samples of a step (default: 32)")
    add("--sequence", type=int, default=2048, help="tokens of a sample (default: 2048)")
    add("--steps", type=int, default=WARMUP + 4 * BLOCK, help=f"the first {WARMUP} are not counted")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a tiny model, to try the script")
    add("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    add("--profile", action="store_true", help="profile one step more; with --output in each log")
    add("--output", type=Path, metavar="DIR", help="for the rows as JSON and all that the contenders print")
    add("--budget", type=float, default=3600.0, help="seconds in all; no contender begins after them")
    add("--limit", type=float, default=300.0, help="seconds of one contender")
    add("--least", type=float, default=20.0, help="seconds that must be left for one to begin")
    add("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)  # a contender's folder for its data and run
    options = parser.parse_args()
    if options.steps <= WARMUP:
        parser.error(f"--steps: more than {WARMUP}")
    is_cpu = options.device == "cpu"
    options.shape = CPU_SHAPE if is_cpu else shape_of(options.model, options.sequence, options.batch)
    options.model = "tiny" if is_cpu else options.model
    options.micros = [2] if is_cpu else options.micro
    for micro in options.micros:
        if options.shape.batch % micro:
            parser.error(f"--micro {micro} does not divide --batch {options.shape.batch}")
    if options.contender is None:
        argv = [
            "--device",
            options.device,
            "--batch",
            str(options.batch),
            "--sequence",
            str(options.sequence),
        ]
        argv += ["--steps", str(options.steps), *(["--profile"] if options.profile else [])]
        argv += [] if is_cpu else ["--model", options.model]
        sys.exit(min(1, compare(options, argv)))
    options.micro = options.micros[0]
    kinds = {"hf": hugging_face, "hf-compile": hugging_face, "ceiling": ceiling}
    kinds.get(options.contender, ours)(options.contender, options)


if __name__ == "__main__":
    main()

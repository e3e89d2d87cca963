"""Check that the machine and its disk suffice for a plan's runs: GPUs, processes, memory, disk space."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_lrpath.errors import UserError
from megatron_lrpath.launch.memory import host_bytes, predict, sizes_of
from megatron_lrpath.launch.resources import (
    check_batch,
    check_fine_tuning,
    gpu_memory,
    machine_memory,
    micro_batch_arguments,
    model_parallel_size,
    share_out,
)
from megatron_lrpath.models import parameter_count, resolve_model
from megatron_lrpath.plan import Plan
from megatron_lrpath.plan.optimizers import OF_MEGATRON, optimizer_problems
from megatron_lrpath.readiness.finding import FAILED, OK, WARNING, Finding, attempt
from megatron_lrpath.runs.storage import checkpoint_bytes, folder_bytes
from megatron_lrpath.runs.tasks import Task
from megatron_lrpath.wording import byte_size, plural

LITTLE_DISK = 10e9  # bytes


def process_check(
    plan: Plan, device: str, nproc: int | None, extra: Sequence[str], left: Sequence[int] = ()
) -> Finding:
    """Check that the machine has a run's processes, and that they divide its batch sizes, or those `left`."""

    def proof() -> str:
        share = share_out(plan, 1, device, nproc, None, extra)
        check_batch(plan, share.nproc, extra, left)
        check_fine_tuning(plan, share.nproc, extra)
        where = f"{plural(len(share.gpus), 'GPU')}" if share.gpus else "the CPU"
        return f"{plural(share.nproc, 'process', 'es')} a run on {where}"

    return attempt("processes", proof)


def optimizer_checks(plan: Plan, is_here: bool = True) -> list[Finding]:
    """Check that Megatron supports the plan's optimizers with its arguments; no finding for Megatron's own.

    If the plan is trained on this machine (`is_here`), their package must be installed.
    """
    tuned = [plan.sft_megatron] if plan.sft else []
    parts = [
        {name.replace("-", "_"): value for name, value in {**plan.model.overrides, **part}.items()}
        for part in (plan.megatron, *tuned)
    ]
    problems = [problem for part in parts for problem in optimizer_problems(part, is_here=is_here)]
    if problems:
        return [Finding("optimizer", FAILED, text) for text in dict.fromkeys(problems)]
    chosen = sorted({str(part.get("optimizer", "adam")) for part in parts} - OF_MEGATRON)
    return [Finding("optimizer", OK, ", ".join(chosen))] if chosen and is_here else []


def memory_checks(
    plan: Plan, vocabulary: int, device: str = "auto", nproc: int | None = None, extra: Sequence[str] = ()
) -> list[Finding]:
    """Compare the predicted memory of a process with that of its GPU (or of this machine).

    On GPUs, also the host memory of a save. A state larger than the GPU, and a save larger than the host,
    cannot work and are failures; everything else is a warning.
    """
    gpus = gpu_memory() if device != "cpu" else ()
    try:
        if not gpus:
            return [process_memory(plan, vocabulary)]
        share = share_out(plan, 1, device, nproc, None, extra)
        return gpu_checks(plan, vocabulary, min(gpus), share.nproc, extra)
    except UserError as error:  # experts; or processes that do not fit, which their own check reports
        return [Finding("memory", OK, f"not estimated: {error}")]


def gpu_checks(plan: Plan, vocabulary: int, most: float, nproc: int, extra: Sequence[str]) -> list[Finding]:
    """Compare the predicted memory of each of `nproc` GPUs with its `most` bytes, and that of the host.

    Raises:
        UserError: the model's parameters cannot be counted.
    """
    extra = (*extra, *micro_batch_arguments(plan, nproc, extra))
    one = predict(plan, sizes_of(plan, nproc, extra), vocabulary, extra)
    parts = f"state {byte_size(one.state)}, activations {byte_size(one.activations)}, other {byte_size(one.left_out)}"
    found = f"each of {plural(nproc, 'GPU')} will hold about {byte_size(one.total)} ({parts}; predicted)"
    if one.fits(most):
        gpu = Finding("memory", OK, found)
    else:
        advice = (
            "Give a smaller micro_batch_size, more GPUs, or --tensor-model-parallel-size 2; "
            "lrpath budget PLAN shows what fits."
        )
        status = FAILED if one.state > most else WARNING
        gpu = Finding("memory", status, f"{found}, it has {byte_size(most)}", advice)
    return [gpu, host_check(host_bytes(plan, nproc, nproc, vocabulary, extra), machine_memory())]


def host_check(needed: float, there: float) -> Finding:
    """Compare the host memory for a save or a load of all processes here with that of this machine."""
    found = f"a save and a load take about {byte_size(needed)} of the host's memory (predicted)"
    if needed <= there:
        return Finding("host memory", OK, found)
    advice = "Train on more nodes, so that each holds a smaller share, or on a machine with more memory."
    return Finding("host memory", FAILED, f"{found}, it has {byte_size(there)}", advice)


def process_memory(plan: Plan, vocabulary: int) -> Finding:
    """Compare the approximate memory of a single process on the CPU with that of this machine.

    Weights, gradients and Adam's state (bf16: 18 bytes a parameter, fp32: 16), the activations of a micro
    batch with an attention without an s×s matrix (34·s·b·h bytes a layer in bf16, Korthikanti et al., arXiv
    2205.05198), and the logits in fp32.

    Raises:
        UserError: the model's parameters cannot be counted.
    """
    model = resolve_model(plan.model)
    parameters = parameter_count(model, vocabulary)
    small = bool(plan.megatron.get("bf16") or plan.megatron.get("fp16"))
    parts = model_parallel_size({**model, **plan.megatron})
    tokens = plan.batch.seq_length * plan.batch.micro_batch_size
    whole = plan.megatron.get("recompute_granularity") == "full"
    kept = (2 if whole else 34) if small else (4 if whole else 60)
    layers = int(model["num_layers"]) * int(model["hidden_size"]) * tokens * kept
    logits = tokens * vocabulary * (4 + 4 + (2 if small else 0))
    needed, most = (parameters * (18 if small else 16) + layers + logits) / parts, machine_memory()
    found = f"{parameters / 1e6:,.1f}M parameters; a process alone would hold about {byte_size(needed)}"
    if needed < 0.9 * most:
        return Finding("memory", OK, found)
    advice = (
        "Data parallelism shares the optimizer's part; else a smaller micro_batch_size or tensor parallelism."
    )
    return Finding("memory", WARNING, f"{found}, it has {byte_size(most)}", advice)


def room_check(plan: Plan, todo: Sequence[Task], vocabulary: int, waits: bool) -> Finding:
    """Compare the free disk space at the output with the size of the checkpoints that the runs will add.

    `waits`: whether runs wait for disk space, as they do here; a job ends instead.
    """
    sized = replace(plan, tokenizer=replace(plan.tokenizer, vocab_size=vocabulary))
    try:
        needed = sum(
            max(0, checkpoint_bytes(sized, task.run) - folder_bytes(task.checkpoints)) for task in todo
        )
    except UserError:  # a model whose parameters cannot be counted
        needed = 0
    return disk_check(Path(plan.output), needed, waits)


def disk_check(folder: Path, needed: float, waits: bool = False) -> Finding:
    """Compare the free space at `folder`, which need not exist, with the needed space (bytes)."""
    free = shutil.disk_usage(existing(folder)).free
    found = f"{byte_size(free)} free at {folder}"
    if needed:
        found += f", the checkpoints take about {byte_size(needed)}"
    if free < needed:
        advice = "Free space, or give the plan another `output`"
        status, end = (WARNING, "; a run that finds none waits for it.") if waits else (FAILED, ".")
        return Finding("disk", status, found, advice + end)
    advice = "Checkpoints and caches need room." if free < LITTLE_DISK else ""
    return Finding("disk", WARNING if advice else OK, found, advice)


def output_check(output: Path) -> Finding:
    """Check that the output is a writable folder, or can be created."""
    there = existing(output)
    if not there.is_dir():
        advice = "Move it away, or give the plan another `output`."
        return Finding("output", FAILED, f"{output}: {there} is a file, not a folder", advice)
    if not os.access(there, os.W_OK | os.X_OK):
        advice = "Change its rights, or give the plan another `output`."
        return Finding("output", FAILED, f"{output}: {there} may not be written to", advice)
    return Finding("output", OK, f"{output.absolute()}")


def existing(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return there

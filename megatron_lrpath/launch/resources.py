"""The resources of this machine, and how parallel runs share them."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import Plan
from megatron_lrpath.runs.checkpoints import latest_step
from megatron_lrpath.runs.tasks import Task
from megatron_lrpath.wording import plural

CPU_PROCESS_BYTES = 2 * 1024**3  # of a training process of a small model with its libraries
_PARALLEL = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


@dataclass(frozen=True)
class Share:
    """The sharing of the machine: `jobs` runs at a time, `nproc` processes each, `threads` for every process.

    `gpus` are the visible devices, empty on the CPU.
    """

    jobs: int
    nproc: int
    threads: int
    device: str
    gpus: tuple[str, ...] = ()

    def environment(self, slot: int) -> dict[str, str]:
        """Return environment variables for the run in place `slot` (0 … jobs-1) of the parallel runs."""
        threads = self.threads
        if os.environ.get("OMP_NUM_THREADS", "").isdigit():
            threads = max(1, min(threads, int(os.environ["OMP_NUM_THREADS"])))
        variables = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        if self.jobs * self.nproc > 1:
            variables["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that spin at a barrier delay others
        if self.gpus:
            own = [self.gpus[(slot * self.nproc + rank) % len(self.gpus)] for rank in range(self.nproc)]
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(own))
        variables["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")  # no name service needed
        return variables


def share_out(
    plan: Plan, width: int, device: str, nproc: int | None, jobs: int | None, extra: Sequence[str] = ()
) -> Share:
    """Share this machine among runs, up to `width` of them in parallel; compute values that are None.

    Without `nproc`: on the CPU the plan's model-parallel size, on GPUs as many as the batch can be divided
    among. Without `jobs`: as many runs as cores (or GPUs) and memory allow. These values depend only on the
    plan and the machine, so that a second call uses the same threads and has the same rounding. `extra` are
    Megatron arguments in addition to the plan's. Raise `UserError` if a requested GPU is missing, or counts
    do not fit.
    """
    gpus = () if device == "cpu" else visible_gpus()
    if device == "cuda" and not gpus:
        raise UserError("--device cuda: no NVIDIA GPU is visible here (CUDA_VISIBLE_DEVICES, nvidia-smi -L)")
    nproc = nproc or default_nproc(plan, len(gpus), extra)
    if gpus and nproc > len(gpus):
        found = "one GPU is" if len(gpus) == 1 else f"{len(gpus)} GPUs are"
        raise UserError(f"a run takes {nproc} processes, but {found} visible; change --nproc or --device")
    places = len(gpus) // nproc if gpus else min(cores() // nproc, _memory_places(nproc))
    jobs = jobs or max(1, min(places, width))
    threads = max(1, cores() // (jobs * nproc))
    return Share(jobs, nproc, threads, "cuda" if gpus else "cpu", gpus)


def default_nproc(plan: Plan, gpus: int, extra: Sequence[str] = ()) -> int:
    """Return the processes of a run: model-parallel size times the largest data-parallel size that fits."""
    base = model_parallel_size({**plan.model.overrides, **plan.megatron, **whole_numbers(extra)})
    batches = [(size, plan.batch.micro_batch_size) for size in every_size(plan)]
    if plan.sft:
        batches.append((plan.sft.batch.global_batch_size, plan.sft.batch.micro_batch_size))
    fitting = [
        size
        for size in range(1, gpus // base + 1)
        if all(batch % (micro * size) == 0 for batch, micro in batches)
    ]
    return base * max(fitting, default=1)


def every_size(plan: Plan) -> list[int]:
    """Return the distinct batch sizes of a plan's pre-training steps."""
    return plan.batch_sizes.sizes(plan.timeline.begins[0], plan.timeline.ends[-1])


def sizes_to_divide(plan: Plan, copies: int, left: Sequence[int] = ()) -> list[int]:
    """Return the batch sizes that the number of copies of the model must divide.

    These are all sizes of the plan, so that an interrupted run resumes with the same number; if they do not
    divide, the sizes of the steps that are left.
    """
    every = every_size(plan)
    return list(left) if left and any(size % copies for size in every) else every


def sizes_left(tasks: Sequence[Task]) -> list[int]:
    """Return the different batch sizes of the remaining steps of pre-trainings."""
    left: dict[int, None] = {}
    for task in tasks:
        if not task.complete and not task.run.is_sft:
            step = max(task.run.first_step, latest_step(task.checkpoints) or 0)
            left |= dict.fromkeys(task.sizes.sizes(step, task.run.last_step))
    return list(left)


def micro_batch_arguments(
    plan: Plan, nproc: int, extra: Sequence[str] = (), left: Sequence[int] = ()
) -> tuple[str, ...]:
    """Return `--micro-batch-size N` if the plan's is too large for `nproc` processes; otherwise ().

    As in `lrpath submit`, N is the largest size up to the plan's that divides a model copy's share of a
    batch. `left` are the batch sizes of the remaining steps (default: all).

    Raises:
        UserError: the processes are not a multiple of a model copy, or the copies do not divide a batch.
    """
    if "micro_batch_size" in given_options(extra):
        return ()
    parallel = model_parallel_size({**plan.model.overrides, **plan.megatron, **whole_numbers(extra)})
    if nproc % parallel:
        raise UserError(
            f"--nproc {nproc}: {parallel} processes hold a copy of the model; give a multiple of it"
        )
    copies, most = nproc // parallel, plan.batch.micro_batch_size
    sizes = sizes_to_divide(plan, copies, left)
    if wrong := [size for size in sizes if size % copies]:
        raise UserError(
            f"--nproc {nproc}: the batch of {wrong[0]} samples does not divide by {copies} copies of "
            "the model; give a number that does"
        )
    share = math.gcd(*sizes) // copies
    micro = max(size for size in range(1, min(most, share) + 1) if share % size == 0)
    return () if micro == most else ("--micro-batch-size", str(micro))


def check_fine_tuning(plan: Plan, nproc: int, extra: Sequence[str] = ()) -> None:
    """Raise UserError, before days of training, if `nproc` processes cannot share the fine-tuning's batch."""
    if plan.sft is None:
        return
    arguments = {**plan.model.overrides, **plan.sft_megatron, **whole_numbers(extra)}
    shares, batch = nproc // model_parallel_size(arguments), plan.sft.batch
    micro = int(whole_numbers(extra).get("micro_batch_size", batch.micro_batch_size))
    if shares and batch.global_batch_size % (micro * shares):
        raise UserError(
            f"{plan.sft.place}.global_batch_size: {batch.global_batch_size} samples cannot be shared out among "
            f"{shares} data-parallel ranks in micro batches of {micro}"
        )


def check_batch(plan: Plan, nproc: int, extra: Sequence[str] = (), left: Sequence[int] = ()) -> None:
    """Raise UserError if the data-parallel ranks of `nproc` processes cannot share a batch.

    `left` are the batch sizes of the remaining steps (default: all).
    """
    sizes = whole_numbers(extra)
    shares = nproc // model_parallel_size({**plan.model.overrides, **plan.megatron, **sizes})
    micro = int(sizes.get("micro_batch_size", plan.batch.micro_batch_size))
    if not shares:
        raise UserError(f"{plural(nproc, 'process', 'es')} cannot hold one copy of the model; change --nproc")
    wrong = [size for size in sizes_to_divide(plan, shares, left) if size % (max(1, micro) * shares)]
    if wrong:
        raise UserError(
            f"batch.global_batch_size: {wrong[0]} samples cannot be shared out among {shares} data-parallel ranks in "
            f"micro batches of {micro}; change --nproc or batch.micro_batch_size"
        )


def model_parallel_size(arguments: Mapping[str, Any]) -> int:
    """Return the number of processes per copy of the model, from Megatron arguments (names with - or _)."""
    given = {name.replace("-", "_"): value for name, value in arguments.items()}
    return math.prod(int(given.get(name) or 1) for name in _PARALLEL)


def whole_numbers(argv: Sequence[str]) -> dict[str, str]:
    """Return the options of a command line whose values are whole numbers, by name."""
    options = given_options(argv)
    return {name: value for name, value in options.items() if isinstance(value, str) and value.isdigit()}


def given_options(argv: Sequence[str]) -> dict[str, str | bool]:
    """Return a command line's options, `--name value` or `--name=value`, by name (`_`); flags: True."""
    options: dict[str, str | bool] = {}
    for index, part in enumerate(argv):
        if part.startswith("--"):
            name, joined, value = part[2:].partition("=")
            following = argv[index + 1] if index + 1 < len(argv) else "--"
            separate = True if following.startswith("--") else following
            options[name.replace("-", "_")] = value if joined else separate
    return options


def cores() -> int:
    """Return the CPU cores that this process may use: its affinity, limited by a container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):  # no quota: the file is missing or contains `max`
        return allowed


def visible_gpus() -> tuple[str, ...]:
    """Return the NVIDIA GPUs that a process started here would see, without importing torch."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return tuple(name.strip() for name in listed.split(",") if name.strip() and name.strip() != "-1")
    return tuple(map(str, range(driver_gpus())))


def driver_gpus() -> int:
    """Return the number of GPUs that the driver lists."""
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in answer.stdout.splitlines()) if not answer.returncode else 0


def gpu_memory() -> tuple[int, ...]:
    """Return the memory in bytes of each GPU that a process started here would see; () if unknown."""
    visible = visible_gpus()
    if not visible or shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines()]
    told = [row for row in rows if len(row) == 3 and row[2].isdigit()]
    seen = [row for row in told if row[0] in visible or any(row[1].startswith(name) for name in visible)]
    return tuple(int(row[2]) * 2**20 for row in seen or told)  # a part of a GPU (MIG) has a separate name


def machine_memory() -> int:
    """Return the bytes of memory of this machine, or of the container if it has a limit."""
    memory = psutil.virtual_memory().total
    with suppress(OSError, ValueError):  # no limit: the file is missing or contains `max`
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")) or memory)
    return int(memory)


def _memory_places(nproc: int) -> int:
    """Return the number of runs that fit into the memory."""
    return max(1, machine_memory() // (nproc * CPU_PROCESS_BYTES))

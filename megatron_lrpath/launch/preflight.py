"""Check an allocation before a training starts on it: GPUs, network, shared folders, memory, disk, versions.

Every rank runs it, under the launcher of the training; rank 0 writes the observations and the problems.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import TrainingStoppedError, UserError
from megatron_lrpath.files import atomic_write_json
from megatron_lrpath.launch.memory import host_bytes, predict, sizes_of
from megatron_lrpath.launch.resources import machine_memory
from megatron_lrpath.models import USUAL_VOCABULARY
from megatron_lrpath.plan import Plan, load_plan
from megatron_lrpath.runs import failure
from megatron_lrpath.runs.lineage import package_versions
from megatron_lrpath.wording import byte_size

TIMEOUT = timedelta(minutes=3)
MEBIBYTES = {"cuda": 256, "cpu": 1}  # the size of the timed all-reduce


@dataclass(frozen=True)
class Facts:
    """The observations of one rank: `files` of the shared folders, `versions` of packages and libraries,
    memory in bytes.

    `gpu_bytes` is the memory of its GPU, 0 on a CPU.
    """

    rank: int
    host: str
    gpus: list[str]
    local_ranks: int
    versions: dict[str, str]
    files: dict[str, list[str] | None]
    gpu_bytes: int = 0
    host_bytes: int = 0


def main(argv: list[str]) -> int:
    """Check and report; return 0 without problems, else 1, with the reasons on rank 0's output and in a
    failure file.
    """
    parser = argparse.ArgumentParser(prog="preflight")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--needed", type=int, default=0, help="bytes of disk for the checkpoints to come")
    parser.add_argument("--plan", type=Path, help="of the training, whose memory is predicted")
    parser.add_argument(
        "--arguments", type=json.loads, default=[], help="Megatron's in addition to the plan's, as JSON"
    )
    parser.add_argument("--write", type=Path, required=True, help="JSON file for what was found")
    parser.add_argument("folders", type=Path, nargs="+", help="shared folders; the last is written to")
    args = parser.parse_args(argv)
    try:
        with failure.recorded():
            check(args)
    except TrainingStoppedError as error:
        print(f"pre-flight: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def check(args: argparse.Namespace) -> None:
    """Check the allocation together with the other ranks.

    Raises:
        TrainingStoppedError: there is a problem (on rank 0; the text has all problems), or this rank sees no GPU.
    """
    # Here and below: only the checks themselves need torch, which takes seconds to import.
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    backend = "nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, **bound(args.device))
    token = share_token(args.folders[-1], rank)
    mine = facts(args.folders, args.device, args.folders[-1] / token)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    total, speed = all_reduce(args.device)
    problems = find_problems(gathered, args.device)
    if total != sum(range(1, len(gathered) + 1)):
        problems.append(
            f"the sum over {len(gathered)} ranks comes out as {total:g}: a GPU or the network errs"
        )
    if rank == 0:
        (args.folders[-1] / token).unlink(missing_ok=True)
        problems += disk_problem(args.folders[-1], args.needed)
        if args.plan and args.device == "cuda":
            problems += memory_problems(load_plan(args.plan), args.arguments, gathered)
        write_report(args.write, gathered, problems, speed)
    dist.destroy_process_group()
    if problems and rank == 0:
        raise TrainingStoppedError("; ".join(problems))


def bound(device: str) -> dict[str, Any]:
    """Return the GPU of this rank, bound to its process group."""
    import torch

    if device == "cpu":
        return {}
    count = torch.cuda.device_count()
    if count == 0:
        raise TrainingStoppedError(
            f"no GPU is visible on {platform.node()}: check `nvidia-smi` and --gpus-per-node there"
        )
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % count)
    return {"device_id": torch.device("cuda", torch.cuda.current_device())}


def share_token(folder: Path, rank: int) -> str:
    """Return the name of a new file that rank 0 writes into `folder`."""
    import torch.distributed as dist

    name = [f".preflight-{uuid.uuid4().hex}"]
    dist.broadcast_object_list(name, src=0)
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name[0]).write_text("seen", encoding="ascii")
    dist.barrier()
    return name[0]


def facts(folders: Sequence[Path], device: str, token: Path) -> Facts:
    """Return the observations of this rank."""
    import torch

    versions = package_versions() | {"cuda": str(torch.version.cuda)}
    gpus: list[str] = []
    if device == "cuda":
        gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        versions["driver"] = ""
        with suppress(OSError):  # its file is missing
            versions["driver"] = Path("/sys/module/nvidia/version").read_text(encoding="ascii").strip()
    files = {str(folder): listing(folder) for folder in folders[:-1]}
    files[str(token.parent)] = ["written by rank 0"] if token.exists() else None
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if gpus else 0
    rank, host = int(os.environ["RANK"]), platform.node()
    return Facts(rank, host, gpus, local, versions, files, gpu, machine_memory())


def listing(folder: Path) -> list[str] | None:
    """Return names and sizes of the files in a folder; None if it does not exist."""
    try:
        entries = sorted(
            entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith(".")
        )
        return [f"{entry.name} {entry.stat().st_size}" for entry in entries]
    except OSError:
        return None


def all_reduce(device: str) -> tuple[float, float]:
    """Return the sum of rank+1 over all ranks, and the bytes per second and rank through the network in both
    directions.

    The second is the bus bandwidth as defined by NVIDIA's nccl-tests: 2(n−1)/n of the data for n ranks.
    """
    import torch
    import torch.distributed as dist

    world = dist.get_world_size()
    data = torch.full((MEBIBYTES[device] * 2**18,), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(data)
    total = float(data[-1])
    data.zero_()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    dist.all_reduce(data)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return total, data.numel() * 4 * 2 * (world - 1) / world / seconds


def find_problems(ranks: Sequence[Facts], device: str) -> list[str]:
    """Compare all ranks with rank 0; return the problems as sentences."""
    first, problems = ranks[0], []
    for one in {other.host: other for other in ranks}.values():
        if device == "cuda" and len(one.gpus) not in (1, one.local_ranks) and len(one.gpus) < one.local_ranks:
            problems.append(f"{one.host} shows {len(one.gpus)} GPUs to {one.local_ranks} processes")
        if one.gpus and first.gpus and one.gpus[0] != first.gpus[0]:
            problems.append(f"{one.host} has {one.gpus[0]}, {first.host} has {first.gpus[0]}")
        for name in sorted(one.versions.keys() | first.versions.keys()):
            here, there = one.versions.get(name, "none"), first.versions.get(name, "none")
            if here != there:
                problems.append(f"{name} is {here} on {one.host} and {there} on {first.host}")
        for folder, files in one.files.items():
            if files is None:
                problems.append(
                    f"{folder} is not the same folder on {one.host}: is it on a shared file system?"
                )
            elif files != first.files[folder]:
                problems.append(f"{folder} holds other files on {one.host} than on {first.host}")
    return problems


def disk_problem(folder: Path, needed: int) -> list[str]:
    """Return a sentence if the free disk space is less than `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return []
    room, want = f"{free / 2**30:,.0f} GiB", f"{needed / 2**30:,.0f} GiB"
    return [f"{folder} has {room} free, and the checkpoints to come take about {want}"]


def memory_problems(plan: Plan, arguments: Sequence[str], ranks: Sequence[Facts]) -> list[str]:
    """Return predicted problems of memory: weights, gradients and optimizer on a GPU; a save on a node's
    host.

    If only the activations might not fit, a message is printed, because the prediction is not that
    precise.
    """
    vocabulary = plan.tokenizer.vocab_size or USUAL_VOCABULARY
    try:
        one = predict(plan, sizes_of(plan, len(ranks), arguments), vocabulary, arguments)
    except UserError:  # a model whose parameters cannot be counted
        return []
    least = min(ranks, key=lambda rank: rank.gpu_bytes)
    problems = []
    if not one.fits(least.gpu_bytes):
        text = f"a GPU will hold about {byte_size(one.total)} (predicted), on {least.host} it has "
        text += f"{byte_size(least.gpu_bytes)}; lrpath budget shows what fits"
        if one.state > least.gpu_bytes:
            problems.append(f"{text}; weights, gradients and optimizer alone take {byte_size(one.state)}")
        else:
            print(f"pre-flight: warning: {text}")
    host = min(ranks, key=lambda rank: rank.host_bytes / rank.local_ranks)
    needed = host_bytes(plan, host.local_ranks, len(ranks), vocabulary, arguments)
    if needed > host.host_bytes:
        problems.append(
            f"a save takes about {byte_size(needed)} of a node's memory (predicted), and {host.host} has "
            f"{byte_size(host.host_bytes)}: train on more nodes"
        )
    return problems


def write_report(path: Path, ranks: Sequence[Facts], problems: Sequence[str], speed: float) -> None:
    """Write the observations: a line on the console and a file as a record."""
    hosts = {one.host: {"gpus": one.gpus, "processes": one.local_ranks} for one in ranks}
    row = {
        "hosts": hosts,
        "versions": asdict(ranks[0])["versions"],
        "all_reduce_bytes_per_second": round(speed),
    }
    atomic_write_json(path, {**row, "problems": list(problems)})
    print(f"pre-flight: {len(ranks)} ranks on {len(hosts)} nodes, all-reduce {speed / 1e9:.2f} GB/s a rank")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The checks of `lrpath doctor`: the machine (versions, GPUs, libraries, NCCL, memory, disk), and a plan on it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

import torch

from megatron_lrpath.launch.resources import cores, driver_gpus
from megatron_lrpath.plan import PARADIGMS, Plan
from megatron_lrpath.readiness import FAILED, INFO, OK, WARNING, Finding, Request, check_plan
from megatron_lrpath.readiness.machine import disk_check
from megatron_lrpath.training import machine
from megatron_lrpath.training.gpu import measures
from megatron_lrpath.training.seams import MEGATRON
from megatron_lrpath.wording import byte_size, plural

PYTHON = (3, 12)
PACKAGES = ("torch", "numpy", "transformers", "sentencepiece", "gigatoken", "safetensors", "psutil")


def machine_checks(folder: Path) -> list[Finding]:
    """Return all checks of the machine; the disk check examines `folder`."""
    gpus = gpu_list()
    checks = [
        verdict(
            "Python",
            sys.version_info >= PYTHON,
            platform.python_version(),
            advice="megatron-core with megatron.training is built for 3.12 and later.",
        ),
        megatron_check(MEGATRON),
    ]
    for name in PACKAGES:  # further packages that a training needs
        found = version(name)
        checks.append(verdict(name, bool(found), found or "not installed", advice=f"pip install {name}"))
    checks += [gpu_check(gpus), *accelerator_checks(bool(gpus)), nccl_check(bool(gpus))]
    helpers = machine.importable("megatron.core.datasets.helpers_cpp")
    helpers_advice = "Reinstall megatron-core from its wheel; compiling needs g++ and make."
    compiled = "compiled" if helpers else "not compiled"  # otherwise every start tries to compile them
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    sbatch = shutil.which("sbatch")
    return [
        *checks,
        verdict("dataset helpers", helpers, compiled, WARNING, helpers_advice),
        Finding("CPU", OK, f"{cores()} cores, {byte_size(memory)} of memory"),
        disk_check(folder, 0),
        verdict("Slurm", bool(sbatch), sbatch or "no sbatch; runs are started with lrpath run", INFO),
    ]


def verdict(name: str, good: bool, found: str, otherwise: str = FAILED, advice: str = "") -> Finding:
    """Return a finding: ok if `good`, else the status `otherwise` with the advice."""
    return Finding(name, OK if good else otherwise, found, "" if good else advice)


def megatron_check(supported: str) -> Finding:
    """Check that megatron-core is in the supported range of versions (`>=0.19,<0.20`)."""
    found = version("megatron-core")
    advice = f"pip install 'megatron-core{supported}'"
    if found is None:
        return Finding("megatron-core", FAILED, "not installed", advice)
    good = within(found, supported)
    return verdict(
        "megatron-core", good, found if good else f"{found}, supported is {supported}", FAILED, advice
    )


def within(found: str, supported: str) -> bool:
    """Return whether a version is in a range of the form `>=A,<B`."""
    low, high = re.findall(r"[\d.]+", supported)
    lowest, own, beyond = ([*map(int, re.findall(r"\d+", text)[:3])] for text in (low, found, high))
    return lowest <= own < beyond


def version(name: str) -> str | None:
    """Return the version of a distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def gpu_list() -> list[tuple[str, int]]:
    """Return the name and the memory in bytes of every GPU that torch can use."""
    if not torch.cuda.is_available():
        return []
    properties = (torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count()))
    return [(one.name, one.total_memory) for one in properties]


def gpu_check(gpus: list[tuple[str, int]]) -> Finding:
    """Check the GPUs, and the CUDA version that torch was built for."""
    if gpus:
        names = ", ".join(f"{name} ({byte_size(memory)})" for name, memory in gpus)
        return Finding("GPUs", OK, f"{len(gpus)}: {names}; torch is built for CUDA {torch.version.cuda}")
    listed = driver_gpus()
    if listed:
        advice = (
            f"torch is built for CUDA {torch.version.cuda}: install a torch for this driver, or look at "
            "CUDA_VISIBLE_DEVICES."
        )
        return Finding("GPUs", FAILED, f"nvidia-smi lists {listed}, but torch can use none of them", advice)
    return Finding("GPUs", INFO, "none; training runs on the CPU, which is for small models and tests")


def accelerator_checks(gpu: bool) -> list[Finding]:
    """Check Transformer Engine, Apex and liger-kernel, and report the effect of their absence."""
    lacking = WARNING if gpu else INFO
    engine, apex = (machine.importable(name) for name in (machine.TRANSFORMER_ENGINE, machine.APEX_FUSIONS))
    without_engine = (
        "its fused kernels, FP8 and context parallelism are not there; attention is torch's "
        "scaled_dot_product_attention, norms are torch's"
    )
    without_apex = "Transformer Engine does its work" if engine else "norms and Adam are torch's"
    advice = "pip install 'megatron-lrpath[{}]'" if gpu else ""
    liger = measures.liger_problem()
    liger_found = f"{liger}; the cross-entropy is Megatron's" if liger else version(measures.LIGER) or "found"
    return [
        fast_part(
            "Transformer Engine", "transformer-engine", engine, without_engine, lacking, advice.format("gpu")
        ),
        fast_part("Apex", "apex", apex, without_apex, INFO),
        verdict(measures.LIGER, not liger, liger_found, lacking, advice.format("kernels")),
    ]


def fast_part(title: str, name: str, works: bool, without: str, lacking: str, advice: str = "") -> Finding:
    """Check an optional distribution that speeds up training; report its status and the effect `without` it
    if it is missing.
    """
    found = version(name)
    broken = f"{found} is installed but cannot be imported" if found else "not installed"
    return verdict(title, works, (found or "found") if works else f"{broken}: {without}", lacking, advice)


def nccl_check(gpu: bool) -> Finding:
    """Check the communication backend."""
    if torch.distributed.is_nccl_available() and gpu:
        return Finding("NCCL", OK, ".".join(str(part) for part in torch.cuda.nccl.version()))
    if gpu:
        return Finding("NCCL", FAILED, "torch was built without it", "Install torch's CUDA build.")
    gloo = torch.distributed.is_gloo_available()
    return Finding(
        "NCCL", INFO if gloo else FAILED, "not used without GPUs; processes communicate through Gloo"
    )


def plan_checks(plan: Plan) -> list[Finding]:
    """Return all checks of a plan."""
    runs = [run for paradigm in PARADIGMS for run in plan.runs(paradigm) if run.same_as is None]
    size = f"{plural(len(plan.versions), 'version')}, {plural(len(runs), 'run')}"
    loaded = Finding("plan", OK, f"{plan.name}: {size}")
    return [loaded, *check_plan(plan, Request())]

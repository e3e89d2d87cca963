"""From a job of the graph to what sbatch gets: options, a batch script of a few lines, and its data as JSON."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import megatron_lrpath
from megatron_lrpath.errors import UserError
from megatron_lrpath.launch.slurm.jobs import Job
from megatron_lrpath.launch.slurm.settings import Settings
from megatron_lrpath.plan import Plan

REPORT_CORES = 2


@dataclass(frozen=True)
class Spec:
    """What the program in the job needs to know. `folder` is OUTPUT/slurm.

    `plan` is the copy submitted last; for a report the file that it is made for.

    `words` are Megatron arguments; `srun` options of each srun; `python` the words that call Python on a rank.
    """

    key: str
    kind: str
    plan: str
    paradigm: str
    run: str
    folder: str
    device: str
    words: tuple[str, ...]
    srun: tuple[str, ...]
    python: tuple[str, ...]
    preflight: bool

    @classmethod
    def read(cls, path: Path) -> Spec:
        """The spec in a file that `lrpath submit` wrote."""
        row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name in ("words", "srun", "python"):
            row[name] = tuple(row[name])
        return cls(**row)


@dataclass(frozen=True)
class Prepared:
    """A job ready for submission: options of sbatch, the script's and the spec's text and where they go."""

    job: Job
    options: tuple[str, ...]
    script: str
    script_file: Path
    spec: dict[str, Any]
    spec_file: Path


def prepare(name: str, job: Job, settings: Settings, folder: Path, extra: Sequence[str]) -> Prepared:
    """The job of the plan or experiment `name` as it is submitted; `folder` is OUTPUT/slurm. Writes nothing."""
    folder = Path(os.path.abspath(folder))
    check_path(folder)
    spec = asdict(make_spec(job, settings, folder, extra))
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:8]
    spec_file = folder / "specs" / f"{job.name}-{digest}.json"
    return Prepared(
        job=job,
        options=tuple(sbatch_options(name, job, settings, folder)),
        script=script_text(name, job, settings, spec_file),
        script_file=folder / "scripts" / f"{job.name}-{digest}.sh",
        spec=spec,
        spec_file=spec_file,
    )


def check_path(path: Path) -> None:
    """Refuse a folder that Slurm's own line-wise answers could not name."""
    if any(ord(character) < 32 for character in str(path)):
        raise UserError(f"{str(path)!r}: control characters cannot stand in the name of an output folder")


def make_spec(job: Job, settings: Settings, folder: Path, extra: Sequence[str]) -> Spec:
    """The data of a job."""
    srun, python = launcher(job.plan, settings)
    run = job.task.run if job.task else None
    return Spec(
        key=job.key,
        kind=job.kind,
        plan=os.path.abspath(job.snapshot.latest if run else job.subject),
        paradigm=run.paradigm if run else "",
        run=run.name if run else "",
        folder=str(folder),
        device=settings.device,
        words=(*job.allocation.words, *extra),
        srun=(f"--cpus-per-task={settings.cpus_per_task}", *srun, *settings.srun),
        python=tuple(python),
        preflight=settings.preflight and job.kind == "train",
    )


def launcher(plan: Plan, settings: Settings) -> tuple[list[str], list[str]]:
    """(options of srun, words that call Python) that bring a rank into its container, if there is one."""
    if settings.container is None:
        return [], [settings.python or sys.executable]
    python = settings.python or "python3"
    mounts = settings.mounts or ",".join(default_mounts(plan))
    if settings.container_runtime == "pyxis":
        options = [f"--container-image={settings.container}", f"--container-mounts={mounts}"]
        return [*options, f"--container-workdir={os.getcwd()}"], [python]
    inside = ["apptainer", "exec", "--pwd", os.getcwd(), "--bind", mounts]
    inside += ["--nv"] if settings.gpus_per_node else []
    return [], [*inside, settings.container, python]


def default_mounts(plan: Plan) -> list[str]:
    """SOURCE:TARGET of the working directory, the data and the output, each under its own name."""
    folders = [os.getcwd(), os.path.abspath(plan.data.slices), os.path.abspath(plan.output)]
    root = package_root()
    folders += [str(root)] if root else []
    for folder in folders:
        if set(folder) & set(",:"):
            raise UserError(f"{folder}: a path with , or : in it cannot be mounted into a container")
    return [f"{folder}:{folder}" for folder in dict.fromkeys(folders)]


def sbatch_options(name: str, job: Job, settings: Settings, folder: Path) -> list[str]:
    """The options of sbatch but for the dependency. On its command line no variable overrides them."""
    place = job.allocation
    options = [
        f"--job-name={name}.{job.name}",
        f"--output={log_option(folder, job)}",
        "--open-mode=append",
        "--requeue",
        "--kill-on-invalid-dep=no",
        f"--nodes={place.nodes}",
        f"--ntasks-per-node={place.per_node}",
    ]
    if job.kind == "report":
        options.append(f"--cpus-per-task={REPORT_CORES}")
    else:
        options.append(f"--cpus-per-task={settings.cpus_per_task}")
        options += [f"--gpus-per-node={place.per_node}"] if settings.gpus_per_node else []
        options += [f"--mem={settings.memory}"] if settings.memory else []
    options += [f"--signal=B:USR2@{settings.signal_seconds}"] if job.kind == "train" else []
    for word in ("partition", "account", "qos", "time"):
        value = getattr(settings, word)
        options += [f"--{word}={value}"] if value else []
    return [*options, *settings.sbatch]


def log_option(folder: Path, job: Job) -> str:
    """The job's log as sbatch takes it: a pattern, in which %j is the job's number.

    A folder with % or backslash in its name cannot be written as a pattern: there the script redirects its
    output itself, and only what Slurm has to say of the job is lost.
    """
    return "/dev/null" if set(str(folder)) & set("%\\") else str(folder / "logs" / f"{job.name}-%j.log")


def script_text(name: str, job: Job, settings: Settings, spec_file: Path) -> str:
    """The batch script. Every path in it is one quoted word."""
    lines = ["#!/bin/bash", f"# {job.key} of {name}; written by `lrpath submit`."]
    folder = spec_file.parents[1]
    if log_option(folder, job) == "/dev/null":
        log = shlex.quote(str(folder / "logs" / job.name))
        lines.append(f'exec >>{log}-"$SLURM_JOB_ID".log 2>&1')
    lines.append(f"cd -- {shlex.quote(os.getcwd())} || exit 2")
    if settings.setup:
        lines.append(f". {shlex.quote(os.path.abspath(settings.setup))} || exit 2")
    root = package_root()
    if root:
        lines.append(f'export PYTHONPATH={shlex.quote(str(root))}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    module = "megatron_lrpath.launch.slurm.program"
    lines.append(f"exec {shlex.quote(sys.executable)} -m {module} {shlex.quote(str(spec_file))}")
    return "\n".join(lines) + "\n"


def package_root() -> Path | None:
    """The checkout that the package is used from; None where it is installed beside all others."""
    root = Path(megatron_lrpath.__file__).resolve().parents[1]
    return None if root.name in ("site-packages", "dist-packages") else root

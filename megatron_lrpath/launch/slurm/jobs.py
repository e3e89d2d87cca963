"""Build the graph of the jobs of plans, and what sbatch gets of each: options, a batch script, its data."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import megatron_lrpath
from megatron_lrpath.data.record import prepared_difference
from megatron_lrpath.errors import UserError
from megatron_lrpath.launch.layouts import Allocation, Layout, allocate, allocate_evaluation
from megatron_lrpath.launch.memory import arguments_of
from megatron_lrpath.launch.resources import sizes_left
from megatron_lrpath.launch.slurm.ledger import SIGNALS, SubmittedPlan
from megatron_lrpath.launch.slurm.settings import Settings
from megatron_lrpath.launch.torchrun import TRAINING
from megatron_lrpath.plan import Plan
from megatron_lrpath.plan.needs import ENGINE, GPU, WORDS, unmet
from megatron_lrpath.plan.needs import refuse as refuse_unmet
from megatron_lrpath.reading import build, read_object, why
from megatron_lrpath.runs.folder import OutputFolder, report_page
from megatron_lrpath.runs.results import needs_evaluation, report_is_fresh
from megatron_lrpath.runs.tasks import Task, build_tasks, with_ancestors
from megatron_lrpath.sealed import json_digest

REPORT = "report"
JOB_MODULE = "megatron_lrpath.launch.slurm.job"
RANK_MODULE = "megatron_lrpath.launch.slurm.rank"
EVALUATION = "megatron_lrpath.evaluate.worker"
STRAGGLER_SECONDS = 60  # from the end of the first rank to the end of all: they may hang in a collective


@dataclass(frozen=True)
class Wait:
    """A condition of a job: the end of job `key`, or with `step` only its training's checkpoint of it."""

    key: str
    step: int | None = None


@dataclass(frozen=True)
class Job:
    """A node of the graph. `kind`: train, eval or report.

    `submitted` is its plan, `task` the training, also of an evaluation; `page` is the path of
    the finished report, `subject` the file that the report is made for (a plan's copy, or an experiment).
    """

    key: str
    kind: str
    allocation: Allocation
    submitted: SubmittedPlan
    waits: tuple[Wait, ...] = ()
    task: Task | None = None
    page: Path = Path()
    subject: Path = Path()

    @property
    def plan(self) -> Plan:
        """The plan that it belongs to."""
        return self.submitted.plan

    @property
    def name(self) -> str:
        """The key as part of a file name and of Slurm's job name."""
        return self.key.replace("/", ".")

    @property
    def target(self) -> int:
        """The last step of a training, 0 for the others."""
        return self.task.run.last_step if self.kind == "train" and self.task else 0


def plan_jobs(
    submitted: SubmittedPlan,
    paradigms: Sequence[str],
    settings: Settings,
    run: str | None = None,
    extra: Sequence[str] = (),
) -> list[Job]:
    """Return the jobs of a plan's paradigms (or of `run` and its ancestors), each after those it needs.

    `extra` are Megatron arguments for every training. Raise UserError if the nodes do not fit the plan.
    """
    plan = submitted.plan
    prepared = plan.prepared_record() if plan.sft is not None else None
    if plan.sft is not None and prepared and (difference := prepared_difference(plan, prepared)):
        raise UserError(difference)
    if plan.sft is not None and prepared is None:
        raise UserError(
            f"{plan.sft.place}: the data of the fine-tuning are not prepared yet; do it here, once: "
            f"lrpath sft {plan.path} --prepare --output {plan.output}"
        )
    tasks = build_tasks(plan, paradigms)
    if run is not None:
        tasks = with_ancestors(tasks, plan, run)
    jobs = task_jobs([(submitted, task) for task in tasks], settings, extra)
    page = report_page(OutputFolder(Path(plan.output)).report)
    return [*jobs, report_job(jobs, page, submitted.latest)]


def task_jobs(
    tasks: Sequence[tuple[SubmittedPlan, Task]], settings: Settings, extra: Sequence[str] = ()
) -> list[Job]:
    """Return a job for every training, main paths first, then one for the evaluation of every version.

    With equal priorities the queue then never lets an update delay the next. Raise UserError if the nodes do
    not fit a plan.
    """
    ordered = sorted(tasks, key=lambda pair: pair[1].run.makes_version)
    every = {task.key: task for _, task in tasks}
    jobs = []
    for submitted, task in ordered:
        place = training_place(submitted.plan, task, settings, extra)
        parent = every.get(task.parent or "")
        step = task.parent_step if parent and task.parent_step < parent.run.last_step else None
        waits = (Wait(parent.key, step),) if parent else ()
        jobs.append(Job(task.key, "train", place, submitted, waits, task))
    for submitted, task in tasks:
        if task.run.makes_version:
            place = evaluation_place(submitted.plan, task, settings, extra)
            jobs.append(Job(f"eval/{task.key}", "eval", place, submitted, (Wait(task.key),), task))
    return jobs


def training_place(plan: Plan, task: Task, settings: Settings, extra: Sequence[str]) -> Allocation:
    """Return the allocation of a training; a fine-tuning gets as many of the nodes as its own batch allows.

    Raise UserError if no number of nodes fits.
    """
    left = sizes_left([task])
    most = allocate(
        plan, settings.nodes, settings.per_node, settings.device, extra, settings.gpu_memory, left
    )
    if not task.run.is_sft:
        return most
    sized = plan_of(plan, task)
    for nodes in range(most.nodes, 1, -1):
        try:
            return allocate(sized, nodes, settings.per_node, settings.device, extra, settings.gpu_memory)
        except UserError:
            continue
    return allocate(sized, 1, settings.per_node, settings.device, extra, settings.gpu_memory)


def evaluation_place(plan: Plan, task: Task, settings: Settings, extra: Sequence[str]) -> Allocation:
    """Return the allocation of an evaluation: the fewest nodes that hold the model.

    Raise UserError if the plan's arguments need a GPU, but evaluations have none.
    """
    device = settings.device_of("eval")
    if device != settings.device:
        refuse_unmet(
            unmet(arguments_of(plan, extra), WORDS.keys() - {GPU, ENGINE}),
            f"{plan.path}: evaluations on CPUs (--eval-gpus 0) are not possible; give them GPUs",
        )
    sized, per_node = plan_of(plan, task), settings.per_node_of("eval")
    return allocate_evaluation(sized, per_node, device, extra, settings.gpu_memory)


def plan_of(plan: Plan, task: Task) -> Plan:
    """Return the plan with the batch and the Megatron arguments of this training."""
    if not task.run.is_sft:
        return plan
    versions = tuple(replace(version, global_batch_size=None) for version in plan.versions)
    return replace(plan, batch=plan.batch_of(task.run), megatron=plan.sft_megatron, versions=versions)


def report_job(jobs: Sequence[Job], page: Path, subject: Path) -> Job:
    """Return the job that writes the report after all evaluations among `jobs`."""
    waits = tuple(Wait(job.key) for job in jobs if job.kind == "eval")
    single = Allocation(1, 1, Layout(1, 1), ())
    return Job(REPORT, "report", single, jobs[0].submitted, waits, page=page, subject=subject)


def is_finished(job: Job, jobs: Sequence[Job]) -> bool:
    """Return whether the job's result exists, so that it need not be submitted."""
    if job.task is None:
        evaluations = [other for other in jobs if other.kind == "eval"]
        folders = [other.task.folder for other in evaluations if other.task]
        done = job.page.is_file() and all(is_finished(other, jobs) for other in evaluations)
        return done and report_is_fresh(job.page.parent, folders)
    return job.task.complete and (job.kind == "train" or not needs_evaluation(job.plan, job.task.run))


REPORT_CORES = 2


@dataclass(frozen=True)
class Spec:
    """The settings of the program in the job. `folder` is OUTPUT/slurm.

    `plan` is the last submitted copy; for a report, the file that it is made for.

    `arguments` are Megatron's; `srun`: options of each srun; `python`: the command for Python on a rank;
    `signal_seconds`: how long before the time limit the job is asked to stop; `notify`: the user's command,
    or empty.
    """

    key: str
    kind: str
    plan: str
    paradigm: str
    run: str
    folder: str
    device: str
    arguments: tuple[str, ...]
    srun: tuple[str, ...]
    python: tuple[str, ...]
    preflight: bool
    signal_seconds: int = 300
    notify: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Spec:
        """Return the spec in a file that `lrpath submit` wrote. Raise UserError if it cannot be read."""
        try:
            return build(cls, read_object(path))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({why(error)}); call lrpath submit again.") from None


@dataclass(frozen=True)
class JobFiles:
    """A job ready for submission: options of sbatch, the script's and the spec's text and their paths."""

    options: tuple[str, ...]
    script: str
    script_file: Path
    spec: dict[str, Any]
    spec_file: Path


def job_files(name: str, job: Job, settings: Settings, folder: Path, extra: Sequence[str]) -> JobFiles:
    """Return the files of a job of the plan or experiment `name`, not written; `folder` is OUTPUT/slurm."""
    folder = Path(os.path.abspath(folder))
    if any(ord(character) < 32 for character in str(folder)):  # impossible in Slurm's answers
        raise UserError(
            f"{str(folder)!r}: control characters are not allowed in the name of an output folder"
        )
    made = make_spec(job, settings, folder, extra)
    spec = asdict(made)
    digest = json_digest(spec)[:8]
    spec_file = folder / "specs" / f"{job.name}-{digest}.json"
    return JobFiles(
        options=tuple(sbatch_options(name, job, settings, folder)),
        script=script_text(name, job, settings, made, spec_file),
        script_file=folder / "scripts" / f"{job.name}-{digest}.sh",
        spec=spec,
        spec_file=spec_file,
    )


def make_spec(job: Job, settings: Settings, folder: Path, extra: Sequence[str]) -> Spec:
    """Return the data of a job."""
    srun, python = launcher(job.plan, settings, settings.gpus_of(job.kind) > 0)
    run = job.task.run if job.task else None
    return Spec(
        key=job.key,
        kind=job.kind,
        plan=os.path.abspath(job.submitted.latest if run else job.subject),
        paradigm=run.paradigm if run else "",
        run=run.name if run else "",
        folder=str(folder),
        device=settings.device_of(job.kind),
        arguments=(*job.allocation.arguments, *extra),
        srun=(f"--cpus-per-task={settings.cpus_per_task}", *srun, *settings.srun),
        python=tuple(python),
        preflight=settings.preflight and job.kind == "train",
        signal_seconds=settings.signal_seconds,
        notify=settings.notify,
    )


def launcher(plan: Plan, settings: Settings, gpus: bool) -> tuple[list[str], list[str]]:
    """Return (options of srun, the command for Python) that start a rank, in its container if there is one.

    `gpus`: whether the rank uses a GPU.
    """
    if settings.container is None:
        return [], [settings.python or sys.executable]
    python = settings.python or "python3"
    mounts = settings.mounts or ",".join(default_mounts(plan))
    if settings.container_runtime == "pyxis":
        options = [f"--container-image={settings.container}", f"--container-mounts={mounts}"]
        return [*options, f"--container-workdir={os.getcwd()}"], [python]
    inside = ["apptainer", "exec", "--pwd", os.getcwd(), "--bind", mounts]
    inside += ["--nv"] if gpus else []
    return [], [*inside, settings.container, python]


def default_mounts(plan: Plan) -> list[str]:
    """Return SOURCE:TARGET of the working directory, the data and the output, each with equal paths."""
    folders = [os.getcwd(), os.path.abspath(plan.data.slices), os.path.abspath(plan.output)]
    root = package_root()
    folders += [str(root)] if root else []
    for folder in folders:
        if set(folder) & set(",:"):
            raise UserError(f"{folder}: a path with , or : in it cannot be mounted into a container")
    return [f"{folder}:{folder}" for folder in dict.fromkeys(folders)]


def sbatch_options(name: str, job: Job, settings: Settings, folder: Path) -> list[str]:
    """Return sbatch's options except the dependency. On its command line no variable overrides them."""
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
        options += [f"--gpus-per-node={place.per_node}"] if settings.gpus_of(job.kind) else []
    memory = settings.memory_of(job.kind)
    options += [f"--mem={memory}"] if memory else []
    options += [f"--signal=B:USR2@{settings.signal_seconds}"] if job.kind == "train" else []
    words = {"partition": settings.partition_of(job.kind), "account": settings.account, "qos": settings.qos}
    words["time"] = settings.time_of(job.kind)
    if settings.mail:
        events = "END,FAIL" if job.kind == "report" else "FAIL"
        words |= {"mail-user": settings.mail, "mail-type": events}
    options += [f"--{word}={value}" for word, value in words.items() if value]
    return [*options, *settings.sbatch_of(job.kind)]


def log_option(folder: Path, job: Job) -> str:
    """Return the path of the job's log for sbatch: a pattern, in which %j is the job's number.

    A folder with % or backslash in its name cannot be written as a pattern: for it the script redirects its
    output itself, and only Slurm's own messages on the job are lost.
    """
    return "/dev/null" if set(str(folder)) & set("%\\") else str(folder / "logs" / f"{job.name}-%j.log")


def script_text(name: str, job: Job, settings: Settings, spec: Spec, spec_file: Path) -> str:
    """Return the batch script: sbatch's options, comments, the program. Each path is one quoted word."""
    folder = spec_file.parents[1]
    lines = ["#!/bin/bash", f"# {comment_text(f'{job.key} of {name}; written by `lrpath submit`.')}"]
    lines += [f"#SBATCH {directive(option)}" for option in sbatch_options(name, job, settings, folder)]
    lines += [f"# {comment_text(line)}" for line in about_job(job, spec)]
    lines += signal_traps(folder)
    if log_option(folder, job) == "/dev/null":
        log = shlex.quote(str(folder / "logs" / job.name))
        lines.append(f'exec >>{log}-"$SLURM_JOB_ID".log 2>&1')
    lines.append(f"cd -- {shlex.quote(os.getcwd())} || exit 2")
    if settings.setup:
        lines.append(f". {shlex.quote(os.path.abspath(settings.setup))} || exit 2")
    root = package_root()
    if root:
        lines.append(f'export PYTHONPATH={shlex.quote(str(root))}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    program = f"{shlex.quote(sys.executable)} -m {JOB_MODULE} {shlex.quote(str(spec_file))}"
    lines += [
        f"(trap '' USR2; exec {program}) &",
        "program=$!",
        'while wait "$program"; kill -0 "$program" 2>/dev/null; do :; done  # a signal ends wait, not the program',
        'wait "$program"',
    ]
    return "\n".join(lines) + "\n"


def directive(option: str) -> str:
    """Quote an option for an #SBATCH line, unlike the shell: \\ escapes within quotes, too."""
    if re.fullmatch(r"[\w@%+=:,./-]+", option):
        return option
    return '"' + re.sub(r"([\"'#\\])", r"\\\1", option) + '"'


def comment_text(text: str) -> str:
    """Return the text for a comment of the script: in one line, with its control characters escaped."""
    return "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in text)


def about_job(job: Job, spec: Spec) -> list[str]:
    """Return what the program does, for readers of the script: the sruns and the commands of the ranks."""
    if job.kind == "report":
        return [f"It runs: {shlex.join(report_command(spec.plan))}"]
    told = [
        "Handed to sbatch as it is, it continues from the last checkpoint; the program below runs on the first"
    ]
    told += ["node, follows the ranks and requeues the job. What it runs on every rank:"]
    module, argv = rank_command(spec, spec.plan, job.task.key if job.task else "")
    return [*told, f"  {shlex.join(srun_command(spec, Path('LOGS'), module, argv))}"]


def srun_command(spec: Spec, logs: Path, module: str, argv: Sequence[str]) -> list[str]:
    """Return the srun that runs a module on every rank, each with a log in the folder `logs`."""
    command = ["srun", "--kill-on-bad-exit=0", f"--wait={STRAGGLER_SECONDS}", *spec.srun]
    return [*command, *spec.python, "-m", RANK_MODULE, str(logs), module, *argv]


def rank_command(spec: Spec, plan: str, key: str) -> tuple[str, list[str]]:
    """Return (module, arguments) of the training, or the evaluation of `key`, by the plan in this file."""
    if spec.kind == "eval":
        return EVALUATION, ["--plan", plan, "--runs", key, "--device", spec.device, *spec.arguments]
    argv = ["--plan", plan, "--paradigm", spec.paradigm, "--run", spec.run, "--device", spec.device]
    return TRAINING, [*argv, *spec.arguments]


def report_command(subject: str) -> list[str]:
    """Return the command of the report's job."""
    return [sys.executable, "-m", "megatron_lrpath.cli", "report", subject]


def signal_traps(folder: Path) -> list[str]:
    """Return lines that record signals in a file, so that the program, which starts later, misses none."""
    start = '"$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"'  # as in `Ledger.signals_file`
    file = f"{shlex.quote(str(folder / SIGNALS))}/{start}"
    return [f"trap {shlex.quote(f'echo {name} >>{file}')} {name}" for name in ("USR2", "TERM")]


def package_root() -> Path | None:
    """Return the checkout that the package is used from; None if it is installed in site-packages."""
    root = Path(megatron_lrpath.__file__).resolve().parents[1]
    return None if root.name in ("site-packages", "dist-packages") else root

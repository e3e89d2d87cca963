"""The settings of a cluster, from a settings file and the command line: nodes, partition, container, folders."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError

PREFIX = "LRPATH_"
_LINE = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)")
_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}")
_MEMORY = re.compile(r"\d+[KMGT]?")


def _setting(about: str, kind: str = "text", default: Any = None) -> Any:
    return field(default=default, metadata={"kind": kind, "about": about})


@dataclass(frozen=True)
class Settings:
    """The settings of one submission: each `LRPATH_<NAME>` in the file, `--<name>` on the command line.

    The kind of a setting: count (whole number), text, options (several, quoted as in a shell), switch (yes or
    no), time, memory, or the values to choose from with | between them. Times are in seconds.
    """

    nodes: int | None = _setting("nodes of a training job; default: the layout of the plan's model", "count")
    gpus_per_node: int = _setting("GPUs of a node, one process each; 0 trains on CPUs", "count", 8)
    gpu_memory: int = _setting("memory of a GPU in GB (40, 80, 141), which the layout follows", "count", 80)
    tasks_per_node: int = _setting("processes of a node when gpus_per_node is 0", "count", 1)
    cpus_per_task: int = _setting("CPU cores of each process", "count", 8)
    memory: str | None = _setting(
        "memory of a node as sbatch's --mem (0: all of it); default: the site's", "memory"
    )
    partition: str | None = _setting("sbatch's --partition; default: the site's")
    account: str | None = _setting("sbatch's --account; default: yours")
    qos: str | None = _setting("sbatch's --qos; default: the site's")
    time: str | None = _setting("time limit of a training job, D-HH:MM:SS; default: the partition's", "time")
    eval_time: str | None = _setting(
        "time limit of an evaluation; default: --time, and 4 hours where that is more", "time"
    )
    eval_partition: str | None = _setting("partition of the evaluations; default: --partition")
    eval_gpus: int | None = _setting(
        "GPUs of an evaluation's node, one process each; 0 evaluates on CPUs; default: --gpus-per-node",
        "count",
    )
    eval_memory: str | None = _setting(
        "memory of an evaluation's node as sbatch's --mem; default: --memory", "memory"
    )
    report_time: str | None = _setting(
        "time limit of the report; default: --time, and 30 minutes where that is more", "time"
    )
    report_partition: str | None = _setting(
        "partition of the report, which needs no GPU; default: that of evaluations without GPUs, else --partition"
    )
    signal_seconds: int = _setting(
        "how long before the time limit a training saves and requeues", "count", 300
    )
    mail: str | None = _setting("address that Slurm writes to when a job fails and when the report is done")
    notify: tuple[str, ...] = _setting(
        "command that a job calls, with EVENT JOB TEXT behind it, when it fails for good and when the report is done",
        "options",
        (),
    )
    sbatch: tuple[str, ...] = _setting("further options for every sbatch", "options", ())
    short_sbatch: tuple[str, ...] | None = _setting(
        "the same for evaluations and the report; default: --sbatch", "options"
    )
    srun: tuple[str, ...] = _setting("further options for every srun", "options", ())
    setup: str | None = _setting("shell file that every job reads first (modules, NCCL variables)")
    python: str | None = _setting("Python of the training; default: this one, in a container python3")
    container: str | None = _setting("image to train in; default: none")
    container_runtime: str = _setting("what runs the image", "pyxis|apptainer", "pyxis")
    mounts: str | None = _setting("what the image sees, SOURCE:TARGET,…; default: the folders used")
    data: str | None = _setting("folder with tokenizer.model and slices/, instead of the plan's")
    output: str | None = _setting("folder of all results, instead of the plan's")
    preflight: bool = _setting("check the allocation before each start of a training", "switch", True)

    @property
    def per_node(self) -> int:
        """Number of processes on a training's node."""
        return self.per_node_of("train")

    @property
    def device(self) -> str:
        """The --device of a training."""
        return self.device_of("train")

    def gpus_of(self, kind: str) -> int:
        """Return the number of GPUs of a node for a job of this kind (train, eval, report)."""
        if kind == "report":
            return 0
        return self.gpus_per_node if kind == "train" or self.eval_gpus is None else self.eval_gpus

    def per_node_of(self, kind: str) -> int:
        """Return the number of processes on a node in a job of this kind."""
        return self.gpus_of(kind) or self.tasks_per_node

    def device_of(self, kind: str) -> str:
        """Return the --device of a job of this kind."""
        return "cuda" if self.gpus_of(kind) else "cpu"

    def memory_of(self, kind: str) -> str | None:
        """Return the memory of a node in a job of this kind; None: the site's default."""
        if kind == "report":
            return None
        return (self.eval_memory if kind == "eval" else None) or self.memory

    def sbatch_of(self, kind: str) -> tuple[str, ...]:
        """Return further options of sbatch for a job of this kind."""
        return self.sbatch if kind == "train" or self.short_sbatch is None else self.short_sbatch

    def time_of(self, kind: str) -> str | None:
        """Return the time limit of a job of this kind (train, eval, report); None: the partition's."""
        own = {"eval": self.eval_time, "report": self.report_time}.get(kind)
        if own or self.time is None or kind not in LONGEST:
            return own or self.time
        limit = limit_seconds(self.time)
        return LONGEST[kind] if limit is None or limit > (limit_seconds(LONGEST[kind]) or 0) else self.time

    def partition_of(self, kind: str) -> str | None:
        """Return the partition of a job of this kind; None: the site's default."""
        evaluation = self.eval_partition or self.partition
        if kind == "train":
            return self.partition
        if kind == "eval":
            return evaluation
        return self.report_partition or (self.partition if self.gpus_of("eval") else evaluation)


LONGEST = {"eval": "4:00:00", "report": "30"}  # time limits without a setting, in sbatch's format
START_SECONDS = 120  # least time from a training's start to its signal, which may arrive a minute early


def limit_seconds(text: str) -> int | None:
    """Return the seconds of a time limit (minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S); None: no limit."""
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    return total or None


def check_limit(settings: Settings) -> None:
    """Raise UserError if a training would be asked to stop before it could train a step."""
    limit = limit_seconds(settings.time) if settings.time else None
    if limit is not None and limit < settings.signal_seconds + START_SECONDS:
        raise UserError(
            f"a time limit of {limit} s leaves a training no time: it is asked to save {settings.signal_seconds} s "
            f"before the limit (Slurm may be 60 s early) and takes a minute to start. Give it --time (LRPATH_TIME) "
            f"of {-(-(settings.signal_seconds + START_SECONDS) // 60)} minutes or more, or a smaller "
            "--signal-seconds (LRPATH_SIGNAL_SECONDS)."
        )


@dataclass(frozen=True)
class Setting:
    """One field of `Settings` as set by the user."""

    name: str
    kind: str
    about: str

    @property
    def variable(self) -> str:
        """Return its name in the settings file."""
        return PREFIX + self.name.upper()

    @property
    def option(self) -> str:
        """Return its name on the command line."""
        return "--" + self.name.replace("_", "-")


SETTINGS = tuple(Setting(one.name, **one.metadata) for one in fields(Settings))


def read_settings(path: Path | None, options: Mapping[str, Any]) -> Settings:
    """Return the settings of a file (None: the defaults), overridden by the options of the command line.

    `options` maps names to text, or to None if they are not given. Raise UserError, `FILE:LINE: …`, for an
    unknown setting or an invalid value.
    """
    values: dict[str, Any] = {}
    by_variable = {setting.variable: setting for setting in SETTINGS}
    for number, name, text in _assignments(path) if path else ():
        if name not in by_variable:
            raise UserError(
                f"{path}:{number}: there is no setting {name}; there are {', '.join(by_variable)}"
            )
        setting = by_variable[name]
        if text or setting.kind == "options":
            values[setting.name] = _value(setting, text, f"{path}:{number}: {name}")
    for setting in SETTINGS:
        given = options.get(setting.name)
        if given is not None:
            values[setting.name] = _value(setting, str(given), setting.option)
    settings = Settings(**values)
    if settings.per_node < 1:
        raise UserError("gpus_per_node and tasks_per_node are both 0: give one of them")
    check_limit(settings)
    return settings


def within_job(settings: Settings, environment: Mapping[str, str]) -> Settings:
    """Return the settings of a submission from a job (a recipe under sbatch), with its partition and account.

    Settings that name one override it.
    """
    partition = settings.partition or environment.get("SLURM_JOB_PARTITION")
    account = settings.account or environment.get("SLURM_JOB_ACCOUNT")
    return replace(settings, partition=partition, account=account)


def _assignments(path: Path) -> list[tuple[int, str, str]]:
    """Return (line number, name, value) of each assignment in shell syntax, without expansion."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy slurm/settings.env.example there") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        try:
            values = shlex.split(match[2], comments=True) if match else []
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        if match is None or len(values) > 1:
            raise UserError(f"{path}:{number}: not NAME=VALUE; quote a value that contains spaces")
        found.append((number, match[1], values[0] if values else ""))
    return found


def _value(setting: Setting, text: str, where: str) -> Any:
    """Return the value of the setting in `text`. Raise UserError if it is invalid."""
    if setting.kind == "count":
        if not text.isascii() or not text.isdigit() or int(text) > 10**6:
            raise UserError(f"{where}: {text!r} is not a whole number from 0 on")
        if int(text) == 0 and setting.name not in ("gpus_per_node", "eval_gpus"):
            raise UserError(f"{where}: must be at least 1")
        return int(text)
    if setting.kind == "options":
        from megatron_lrpath.plan.secrets import secret_problem  # shortens the parser's start-up

        try:
            words = tuple(shlex.split(text))
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        if secret := secret_problem(words):
            raise UserError(f"{where}: {secret}")
        return words
    if setting.kind == "switch":
        if text.lower() not in ("yes", "no", "1", "0", "true", "false"):
            raise UserError(f"{where}: {text!r} is neither yes nor no")
        return text.lower() in ("yes", "1", "true")
    shapes = {"time": _TIME, "memory": _MEMORY}
    if setting.kind in shapes and not shapes[setting.kind].fullmatch(text):
        raise UserError(f"{where}: {text!r} is not a {setting.kind} as sbatch takes it")
    if "|" in setting.kind and text not in setting.kind.split("|"):
        raise UserError(f"{where}: {text!r} is none of {setting.kind.replace('|', ', ')}")
    if any(ord(character) < 32 for character in text):
        raise UserError(f"{where}: control characters are not allowed in it")
    return text

"""What a cluster needs to know, from a settings file and the command line: nodes, partition, container, folders."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError

PREFIX = "LRPATH_"
_LINE = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)")
_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}")
_MEMORY = re.compile(r"\d+[KMGT]?")


@dataclass(frozen=True)
class Setting:
    """One setting: `LRPATH_<NAME>` in the file, `--<name>` on the command line.

    `kind`: count (whole number), text, options (several, quoted as in a shell), switch (yes or no),
    time, memory, or the values to choose from with | between them.
    """

    name: str
    kind: str
    about: str

    @property
    def variable(self) -> str:
        """Its name in the settings file."""
        return PREFIX + self.name.upper()

    @property
    def option(self) -> str:
        """Its name on the command line."""
        return "--" + self.name.replace("_", "-")


SETTINGS = (
    Setting("nodes", "count", "nodes of a training job; default: the layout of the plan's model"),
    Setting("gpus_per_node", "count", "GPUs of a node, one process each; 0 trains on CPUs"),
    Setting("tasks_per_node", "count", "processes of a node when gpus_per_node is 0"),
    Setting("cpus_per_task", "count", "CPU cores of each process"),
    Setting("memory", "memory", "memory of a node as sbatch's --mem (0: all of it); default: the site's"),
    Setting("partition", "text", "sbatch's --partition; default: the site's"),
    Setting("account", "text", "sbatch's --account; default: yours"),
    Setting("qos", "text", "sbatch's --qos; default: the site's"),
    Setting("time", "time", "time limit of a training job, D-HH:MM:SS; default: the partition's"),
    Setting("signal_seconds", "count", "how long before the time limit a training saves and requeues"),
    Setting("sbatch", "options", "further options for every sbatch"),
    Setting("srun", "options", "further options for every srun"),
    Setting("setup", "text", "shell file that every job reads first (modules, NCCL variables)"),
    Setting("python", "text", "Python of the training; default: this one, in a container python3"),
    Setting("container", "text", "image to train in; default: none"),
    Setting("container_runtime", "pyxis|apptainer", "what runs the image"),
    Setting("mounts", "text", "what the image sees, SOURCE:TARGET,…; default: the folders used"),
    Setting("data", "text", "folder with tokenizer.model and slices/, instead of the plan's"),
    Setting("output", "text", "folder of all results, instead of the plan's"),
    Setting("preflight", "switch", "check the allocation before each start of a training"),
)


@dataclass(frozen=True)
class Settings:
    """The settings of one submission; see `SETTINGS` for their meaning. Times are in seconds."""

    nodes: int | None = None
    gpus_per_node: int = 8
    tasks_per_node: int = 1
    cpus_per_task: int = 8
    memory: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    signal_seconds: int = 300
    sbatch: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()
    setup: str | None = None
    python: str | None = None
    container: str | None = None
    container_runtime: str = "pyxis"
    mounts: str | None = None
    data: str | None = None
    output: str | None = None
    preflight: bool = True

    @property
    def per_node(self) -> int:
        """Processes of a node."""
        return self.gpus_per_node or self.tasks_per_node

    @property
    def device(self) -> str:
        """What the training runs on, as its --device."""
        return "cuda" if self.gpus_per_node else "cpu"


def read_settings(path: Path | None, options: Mapping[str, Any]) -> Settings:
    """The settings of a file (none: all defaults) with the options of the command line on top.

    `options` maps names to text, None for those that are not given.
    Raises UserError, `FILE:LINE: …`, for what is not a setting or has no sense.
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
    return settings


def within_job(settings: Settings, environment: Mapping[str, str]) -> Settings:
    """The settings of a submission from within a job (a recipe under sbatch): its partition and account.

    Settings that name one override it.
    """
    partition = settings.partition or environment.get("SLURM_JOB_PARTITION")
    account = settings.account or environment.get("SLURM_JOB_ACCOUNT")
    return replace(settings, partition=partition, account=account)


def _assignments(path: Path) -> list[tuple[int, str, str]]:
    """(line number, name, value) of each assignment: shell syntax, but nothing in it is expanded or run."""
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
            raise UserError(f"{path}:{number}: not NAME=VALUE; a value with spaces stands in quotes")
        found.append((number, match[1], values[0] if values else ""))
    return found


def _value(setting: Setting, text: str, where: str) -> Any:
    """The value that `text` is for the setting."""
    if setting.kind == "count":
        if not text.isascii() or not text.isdigit() or int(text) > 10**6:
            raise UserError(f"{where}: {text!r} is not a whole number from 0 on")
        if int(text) == 0 and setting.name != "gpus_per_node":
            raise UserError(f"{where}: must be at least 1")
        return int(text)
    if setting.kind == "options":
        try:
            return tuple(shlex.split(text))
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
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
        raise UserError(f"{where}: control characters cannot stand in it")
    return text

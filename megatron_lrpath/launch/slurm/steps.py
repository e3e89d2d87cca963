"""One srun in a job: the rendezvous of its ranks, their logs, signals passed on, and why it failed."""

from __future__ import annotations

import os
import platform
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_lrpath.files import atomic_write_json
from megatron_lrpath.launch.slurm import queue as commands
from megatron_lrpath.launch.slurm.jobs import Spec
from megatron_lrpath.runs.failure import find_cause, is_consequence

RANK_MODULE = "megatron_lrpath.launch.slurm.rank"
FIRST_PORT, PORTS = 12000, 20000  # below the ports that Linux gives to outgoing connections
STRAGGLER_SECONDS = 60  # from the end of the first rank to the end of all: they may hang in a collective
_RECORDED = ("NCCL_", "UCX_", "FI_", "GLOO_", "CUDA_", "TORCH_", "OMP_", "NVTE_", "OFI_")
_SLURM = (
    "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_PARTITION", "SLURM_JOB_ACCOUNT", "SLURM_CLUSTER_NAME",
    "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_GPUS_ON_NODE", "SLURM_TOPOLOGY_ADDR", "SLURM_RESTART_COUNT",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """This job as Slurm describes it in the environment: its number, its start (0, 1, … by requeues), nodes."""

    number: int
    start: int
    nodes: str

    @classmethod
    def here(cls) -> Place:
        """The job that this process runs in."""
        start = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        return cls(int(os.environ["SLURM_JOB_ID"]), start, os.environ.get("SLURM_JOB_NODELIST", ""))

    @property
    def port(self) -> int:
        """The port of the rendezvous: jobs that share a node differ in it, and so do the starts of one job."""
        return FIRST_PORT + (self.number * 31 + self.start) % PORTS

    def address(self) -> str:
        """The first node's name, or where it does not resolve the address that Slurm uses; MASTER_ADDR overrides."""
        if os.environ.get("MASTER_ADDR"):
            return os.environ["MASTER_ADDR"]
        first = commands.host_names(self.nodes)[0]
        try:
            socket.getaddrinfo(first, None)
        except OSError:
            return commands.node_address(first)
        return first


@dataclass
class Steps:
    """The sruns of a start of the job. `log` gets what they say themselves; each rank has its own beside it."""

    spec: Spec
    place: Place
    log: Path
    asked: bool = False
    _process: subprocess.Popen[bytes] | None = None
    _handlers: dict[int, Any] = field(default_factory=dict)

    def watch_signals(self) -> None:
        """Pass SIGUSR2 (time limit ahead) and SIGTERM (the job ends) on to the ranks as SIGUSR2."""
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self.note(f"received {signal.Signals(number).name}: asking the ranks to save and stop")
        if self._process and self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR2)  # srun hands it to every rank

    def note(self, text: str) -> None:
        """A line in the job's log and in the run's."""
        line = f"[lrpath {time.strftime('%H:%M:%S')}] {text}"
        print(line, flush=True)
        with self.log.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    @property
    def ranks(self) -> Path:
        """The folder of the ranks' logs."""
        return self.log.with_suffix("")

    def rank_logs(self) -> list[Path]:
        """The ranks' logs, by rank."""
        return sorted(self.ranks.glob("rank-*.log"), key=lambda path: int(path.stem.partition("-")[2]))

    def run(
        self, module: str, words: Sequence[str], between: Callable[[], None], seconds: float | None = None
    ) -> int:
        """Run a module on every rank and return srun's status; `between` is called every other second.

        After `seconds` the step is ended, with status 124.
        """
        self.ranks.mkdir(parents=True, exist_ok=True)
        command = ["srun", "--kill-on-bad-exit=0", f"--wait={STRAGGLER_SECONDS}", *self.spec.srun]
        command += [*self.spec.python, "-m", RANK_MODULE, str(self.ranks), module, *words]
        deadline = time.monotonic() + seconds if seconds else None
        with self.log.open("ab") as output:
            environment = os.environ | self.environment()
            self._process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        if self.asked:  # the signal came while there was nobody to pass it on to
            self._process.send_signal(signal.SIGUSR2)
        while True:
            try:
                return self._process.wait(2.0)
            except subprocess.TimeoutExpired:
                between()
            if deadline and time.monotonic() > deadline:
                self._process.kill()
                self._process.wait()
                return 124

    def environment(self) -> dict[str, str]:
        """Variables of the ranks: the rendezvous, threads, and where the record of this start lies."""
        cores = os.environ.get("SLURM_CPUS_PER_TASK", "1")
        return {
            "MASTER_ADDR": self.place.address(),
            "MASTER_PORT": str(self.place.port),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", cores),
            "PYTHONUNBUFFERED": "1",
            "LRPATH_LAUNCH": str(self.record_file),
        }

    @property
    def record_file(self) -> Path:
        """Where this start is recorded; the lineage takes it up."""
        return self.ranks / "launch.json"

    def record(self, found: Mapping[str, Any]) -> None:
        """Write what is known of this start: Slurm's variables, those of the network libraries, what was `found`."""
        about = {name: os.environ[name] for name in _SLURM if name in os.environ}
        network = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_RECORDED)}
        system = {"kernel": platform.release(), "slurm": commands.call("srun", "--version").strip()}
        rendezvous = f"{self.place.address()}:{self.place.port}"
        row = {"slurm": about, "variables": network, "system": system, "rendezvous": rendezvous, **found}
        atomic_write_json(self.record_file, row)


def first_exits(text: str) -> list[tuple[int, str]]:
    """(rank, how it ended) in the order of srun's lines `srun: error: n1: task 0: Exited with exit code 2`."""
    pattern = re.compile(r"^srun: error: [^:]+: tasks? ([\d,-]+): (.+)$", re.MULTILINE)
    return [(int(re.split("[,-]", match[1])[0]), match[2].strip()) for match in pattern.finditer(text)]


_OWN_ERROR = re.compile(r"\blrpath: error: (.*)")
_TAIL = 200_000  # characters
BAD_INPUT = "Exited with exit code 2"  # as srun says it


@dataclass(frozen=True)
class Failure:
    """The cause in a sentence; `hopeless` where another start would meet it again, as with bad data."""

    text: str
    hopeless: bool = False


def why(steps: Steps, status: int) -> Failure:
    """The cause of a step's failure.

    An error message of ours first; then the exception of a rank, the rank that ended first before the others;
    then how that rank ended. What a rank says only because another is gone comes last. A rank's exit status 2
    means bad input.
    """
    logs = {int(path.stem.partition("-")[2]): path for path in steps.rank_logs()}
    own_log = steps.log.read_text(encoding="utf-8", errors="replace")[-_TAIL:]
    exits = first_exits(own_log)
    hopeless = any(how == BAD_INPUT for _, how in exits)
    texts = [path.read_text(encoding="utf-8", errors="replace")[-_TAIL:] for path in logs.values()]
    said = [match[1].strip() for text in texts for match in _OWN_ERROR.finditer(text)]
    for text in said:
        if not is_consequence(text):
            return Failure(text, hopeless)
    order = [*(rank for rank, _ in exits), *logs]
    ranks = [rank for rank in dict.fromkeys(order) if rank in logs]
    found = [(rank, cause) for rank in ranks if (cause := find_cause(logs[rank]))]
    causes = [(rank, cause) for rank, cause in found if not is_consequence(cause)]
    signals = [(rank, how) for rank, how in exits if not how.startswith("Exited with")]
    if causes:
        return Failure(f"rank {causes[0][0]}: {causes[0][1]}")
    if signals:
        return Failure(f"rank {signals[0][0]} ended by a signal: {signals[0][1]}")
    if status == 124:
        return Failure("it did not end within its time")
    if found or exits:
        rank, text = (found or exits)[0]
        return Failure(f"rank {rank}: {text}")
    return Failure(f"srun ended with status {status}: {last_line(own_log)}")


def last_line(text: str) -> str:
    """The last line that is not ours."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("[lrpath ")]
    return lines[-1].strip() if lines else "it said nothing"

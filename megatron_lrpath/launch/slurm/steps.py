"""One srun in a job: the rendezvous of its ranks, their logs, signals passed on, and why it failed."""

from __future__ import annotations

import os
import platform
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
from megatron_lrpath.runs import failure

NOTE = "[lrpath "  # begins a line of ours in a log
RECORD = "launch.json"  # in the folder of the ranks' logs, for the lineage
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
        first = commands.call("scontrol", "show", "hostnames", self.nodes).split()[0]
        try:
            socket.getaddrinfo(first, None)
        except OSError:
            return commands.show("node", first).get("NodeAddr", first)
        return first


@dataclass
class Steps:
    """The sruns of a start of the job.

    `log` gets what they print themselves; each rank has its own beside it. Ranks that fail write `error_file`.
    """

    spec: Spec
    place: Place
    log: Path
    error_file: Path
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
        line = f"{NOTE}{time.strftime('%H:%M:%S')}] {text}"
        print(line, flush=True)
        with self.log.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    @property
    def ranks(self) -> Path:
        """The folder of the ranks' logs."""
        return self.log.with_suffix("")

    def run(
        self, module: str, argv: Sequence[str], between: Callable[[], None], seconds: float | None = None
    ) -> int:
        """Run a module on every rank and return srun's status; `between` is called every other second.

        After `seconds` the step is ended, with status `TIMED_OUT`.
        """
        self.ranks.mkdir(parents=True, exist_ok=True)
        failure.clear(self.error_file)
        command = ["srun", "--kill-on-bad-exit=0", f"--wait={STRAGGLER_SECONDS}", *self.spec.srun]
        command += [*self.spec.python, "-m", RANK_MODULE, str(self.ranks), module, *argv]
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
                return TIMED_OUT

    def environment(self) -> dict[str, str]:
        """Variables of the ranks: the rendezvous, threads, and where the record of this start lies."""
        cores = os.environ.get("SLURM_CPUS_PER_TASK", "1")
        return {
            "MASTER_ADDR": self.place.address(),
            "MASTER_PORT": str(self.place.port),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", cores),
            "PYTHONUNBUFFERED": "1",
            "LRPATH_LAUNCH": str(self.ranks / RECORD),
            failure.VARIABLE: str(self.error_file),
        }

    def record(self, found: Mapping[str, Any]) -> None:
        """Write what is known of this start: Slurm's variables, those of the network libraries, what was `found`."""
        about = {name: os.environ[name] for name in _SLURM if name in os.environ}
        network = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_RECORDED)}
        system = {"kernel": platform.release(), "slurm": commands.call("srun", "--version").strip()}
        rendezvous = f"{self.place.address()}:{self.place.port}"
        row = {"slurm": about, "variables": network, "system": system, "rendezvous": rendezvous, **found}
        atomic_write_json(self.ranks / RECORD, row)


_TAIL_BYTES = 64 * 1024
TIMED_OUT = 124  # the status of a step that was ended after its time


def cause(steps: Steps, status: int) -> failure.Failure:
    """Why a step failed: what its ranks have written; else srun's own end and the last line that it printed.

    The latter is all there is where no rank ever started, as with an image that does not exist.
    """
    written = failure.read(steps.error_file)
    if written is not None:
        return written
    if status == TIMED_OUT:
        return failure.here(failure.STOPPED, "it did not end within its time", status=status)
    text = f"srun ended with status {status}: {last_line(steps.log)}"
    return failure.here(failure.EXCEPTION, text, status=status)


def last_line(log: Path) -> str:
    """The last line of a log that is not a note of ours."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = stream.read().decode("utf-8", errors="replace").splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith(NOTE)]
    return lines[-1].strip() if lines else "it printed nothing"

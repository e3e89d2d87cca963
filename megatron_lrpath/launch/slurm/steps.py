"""One srun in a job: the rendezvous of its ranks, their logs, forwarded signals, and the cause of a failure."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_lrpath.exits import SAVED_AND_STOPPED
from megatron_lrpath.files import atomic_write_json
from megatron_lrpath.launch.slurm import queue as commands
from megatron_lrpath.launch.slurm.jobs import Spec, srun_command
from megatron_lrpath.launch.slurm.stop import StopRequest, block_usr2
from megatron_lrpath.plan.secrets import hide_values
from megatron_lrpath.runs import failure

NOTE = "[lrpath "  # prefix of this project's lines in a log
RECORD = "launch.json"  # in the folder of the ranks' logs, for the lineage
FIRST_PORT, PORTS = 12000, 20000  # below Linux's ports for outgoing connections
_RECORDED = ("NCCL_", "UCX_", "FI_", "GLOO_", "CUDA_", "TORCH_", "OMP_", "NVTE_", "OFI_")
_SLURM = (
    "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_PARTITION", "SLURM_JOB_ACCOUNT", "SLURM_CLUSTER_NAME",
    "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_GPUS_ON_NODE", "SLURM_TOPOLOGY_ADDR", "SLURM_RESTART_COUNT",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """This job as described by Slurm's environment: its number, its start (0, 1, … by requeues), nodes."""

    number: int
    start: int
    nodes: str

    @classmethod
    def here(cls) -> Place:
        """Return the job of this process."""
        start = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        return cls(int(os.environ["SLURM_JOB_ID"]), start, os.environ.get("SLURM_JOB_NODELIST", ""))

    @property
    def has_several_nodes(self) -> bool:
        """Return whether its nodes are given as a list like `n1,n3` or `n[1-4]`."""
        return bool(set(self.nodes) & set(",["))

    @property
    def port(self) -> int:
        """The port of the rendezvous, which differs between jobs on one node and between the starts of one
        job.
        """
        return FIRST_PORT + (self.number * 31 + self.start) % PORTS

    def address(self) -> str:
        """Return the first node's name, or Slurm's address of it if the name does not resolve; MASTER_ADDR
        overrides it.
        """
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

    `log` gets their own output; each rank has a separate log next to it. Ranks that fail write
    `error_file`.
    """

    spec: Spec
    place: Place
    log: Path
    error_file: Path
    stop: StopRequest
    log_offset: int = 0  # bytes of the log before the last srun
    _noted: bool = False

    def note(self, text: str) -> None:
        """Write a line into the job's log and the run's."""
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

        After `seconds` the step is ended, with status `TIMED_OUT`. If the job was asked to stop, nothing
        is started and the status is `SAVED_AND_STOPPED`.
        """
        self.ranks.mkdir(parents=True, exist_ok=True)
        failure.clear(self.error_file)
        command = srun_command(self.spec, self.ranks, module, argv)
        deadline = time.monotonic() + seconds if seconds else None
        environment = os.environ | self.environment()
        if self.was_asked():
            return SAVED_AND_STOPPED
        with self.log.open("ab") as output:
            self.log_offset = output.tell()
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, preexec_fn=block_usr2
            )
        self.stop.tell(process, self.ranks)
        while True:
            try:
                return process.wait(2.0)
            except subprocess.TimeoutExpired:
                self.was_asked()
                between()
            if deadline and time.monotonic() > deadline:
                process.kill()
                process.wait()
                return TIMED_OUT

    def was_asked(self) -> bool:
        """Return whether the job was asked to stop; log that once."""
        if self.stop.received and not self._noted:
            self._noted = True
            self.note(f"received {self.stop.received}: the ranks are asked to save and stop")
        return bool(self.stop.received)

    def environment(self) -> dict[str, str]:
        """Return variables of the ranks: the rendezvous, threads, and the record of this start."""
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
        """Record this start: Slurm's variables, those of the network libraries, and the observations `found`."""
        about = {name: os.environ[name] for name in _SLURM if name in os.environ}
        network = hide_values(
            {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_RECORDED)}
        )
        system = {"kernel": platform.release(), "slurm": commands.call("srun", "--version").strip()}
        rendezvous = f"{self.place.address()}:{self.place.port}"
        row = {"slurm": about, "variables": network, "system": system, "rendezvous": rendezvous, **found}
        atomic_write_json(self.ranks / RECORD, row)


_TAIL_BYTES = 64 * 1024
TIMED_OUT = 124  # the status of a step that was ended after its time
CACHE_SECONDS = (1.0, 5.0, 30.0)  # NFS can hide a new file of another node for 30 s


def cause(steps: Steps, status: int) -> failure.Failure:
    """Return why a step failed: the record of a rank, or else srun's exit status and its own lines.

    srun's status is the highest of its ranks', 128+n for a rank killed by signal n; it takes precedence
    over another rank's record of a consequence.
    """
    written = wait_for_failure(steps)
    if written is not None and not written.consequence:
        return written
    lines = srun_lines(steps)
    if status > 128:
        killed = failure.of_status("a rank", 128 - status)
        return replace(killed, message=f"{killed.message}: {lines[0]}") if lines else killed
    if written is not None:
        return written
    if status == TIMED_OUT:
        return failure.here(failure.STOPPED, "it did not end within its time", status=status)
    last = lines[-1] if lines else "it printed nothing"
    text = f"srun ended with status {status}: {last}"
    return failure.here(failure.EXCEPTION, text, status=status, consequence=True)


def wait_for_failure(steps: Steps) -> failure.Failure | None:
    """Return the failure that the ranks have written; with several nodes, wait until NFS must show the file."""
    found = failure.read(steps.error_file)
    for seconds in CACHE_SECONDS if steps.place.has_several_nodes else ():
        if found is not None:
            break
        time.sleep(seconds)
        found = failure.read(steps.error_file)
    return found


def srun_lines(steps: Steps) -> list[str]:
    """Return the lines that the last srun and Slurm's daemon have printed themselves."""
    with steps.log.open("rb") as stream:
        stream.seek(max(steps.log_offset, steps.log.stat().st_size - _TAIL_BYTES))
        lines = stream.read().decode("utf-8", errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith(NOTE)]

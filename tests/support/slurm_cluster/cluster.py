"""Start munge, slurmctld and one slurmd per node in a separate folder, and stop exactly those.

Needs root (slurmd switches users; the pretended GPUs are device nodes) and Debian's packages, which are
installed with apt if they are missing. Nothing outside the folder is written. All nodes share 127.0.0.1 but
have host names of their own.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.ports import free_ports
from tests.support.waiting import until

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
TEMPLATE = Path(__file__).with_name("slurm.conf.in")


class NoSlurmError(Exception):
    """Slurm is not available here; the message gives the reason."""


@dataclass
class Cluster:
    """A running cluster; its commands need `environment`."""

    home: Path
    nodes: int
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a user of this cluster."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        return kept | {"SLURM_CONF": str(self.home / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def call(self, *argv: str, check: bool = True) -> str:
        """Run one of Slurm's commands and return its output."""
        answer = subprocess.run(argv, env=self.environment, capture_output=True, text=True, timeout=240)
        assert answer.returncode == 0 or not check, f"{argv}: {answer.stderr}"
        return answer.stdout

    def job(self, number: int | str) -> dict[str, str]:
        """Return the output of `scontrol show job` as a dictionary; Slurm keeps finished jobs for an hour."""
        text = self.call("scontrol", "show", "job", "-o", str(number))
        pairs = (word.partition("=") for word in text.split())
        return {key: value for key, _, value in pairs}

    def wait(self, number: int | str, *states: str, seconds: float = 60) -> dict[str, str]:
        """Wait until the job is in one of `states`; return it."""
        self.until(lambda: self.job(number)["JobState"] in states, seconds, lambda: str(self.job(number)))
        return self.job(number)

    def until(
        self, true: Callable[[], object], seconds: float = 180, about: Callable[[], str] = lambda: ""
    ) -> None:
        """Wait until `true()` is true; fail with `about()` after `seconds`."""
        until(true, seconds, lambda: about() or self.queue(), pause=0.2)

    def queue(self) -> str:
        """Return the queue as `squeue` prints it."""
        return self.call("squeue", "-o", "%i %j %T %r %k")

    def empty(self) -> None:
        """End all jobs and wait until the nodes are idle."""
        self.call("scancel", "--quiet", "--user=root", check=False)
        self.until(lambda: not self.call("squeue", "-h"), 30)

    def start(self) -> None:
        """Start the daemons and wait until all nodes are idle."""
        self._write_files()
        socket_, key = self.home / "munge/munge.sock", self.home / "munge/munge.key"
        munge = ["munged", "-F", "--force", f"--socket={socket_}", f"--key-file={key}"]
        munge += [f"--{name}-file={self.home}/munge/munged.{name}" for name in ("pid", "log", "seed")]
        self._spawn("munged", munge)
        self.until(socket_.exists, 20)
        self._spawn("slurmctld", ["slurmctld", "-D", "-i", "-f", str(self.home / "slurm.conf")])
        for number in range(1, self.nodes + 1):
            (self.home / f"spool.n{number}").mkdir()
            # separate namespaces: `hostname` prints n1, n2, …, and each node finds the others by name
            rest = (
                'hostname "$1"; mount --bind "$2/hosts" /etc/hosts; exec slurmd -D -N "$1" -f "$2/slurm.conf"'
            )
            argv = ["unshare", "--uts", "--mount", "bash", "-ec", rest, "_", f"n{number}", str(self.home)]
            self._spawn(f"slurmd.n{number}", argv)
        self.until(self._all_idle, 60, self._complaints)

    def stop(self) -> None:
        """End the jobs, then the daemons, then remove the folder."""
        with contextlib.suppress(AssertionError, subprocess.SubprocessError, OSError):
            self.empty()  # the daemons are ended even if that fails
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in reversed(self.processes.values()):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.home, ignore_errors=True)

    def _spawn(self, name: str, argv: Sequence[str]) -> None:
        with (self.home / f"{name}.out").open("wb") as output:
            self.processes[name] = subprocess.Popen(
                [
                    "setpriv",
                    "--pdeathsig",
                    "TERM",
                    *argv,
                ],  # if the tests are killed, the cluster ends too
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )

    def _all_idle(self) -> bool:
        states = self.call("sinfo", "-h", "-N", "-p", "test", "-o", "%t", check=False).split()
        return len(states) == self.nodes and set(states) == {"idle"}

    def _complaints(self) -> str:
        logs = [path.read_text(errors="replace")[-1500:] for path in sorted(self.home.glob("*.out"))]
        return "\n".join(logs)

    def _write_files(self) -> None:
        munge = self.home / "munge"
        munge.mkdir(mode=0o755)
        descriptor = os.open(munge / "munge.key", os.O_WRONLY | os.O_CREAT, 0o400)
        os.write(descriptor, os.urandom(128))
        os.close(descriptor)
        for number in range(2):
            # character devices: with regular files Slurm would not set CUDA_VISIBLE_DEVICES
            os.mknod(self.home / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        ports = free_ports(self.nodes + 1)
        nodes = "\n".join(
            f"NodeName=n{number} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port}"
            for number, port in enumerate(ports[1:], start=1)
        )
        values = {
            "home": str(self.home),
            "host": socket.gethostname().partition(".")[0],
            "port": str(ports[0]),
            "count": str(self.nodes),
            "nodes": nodes,
        }
        text = TEMPLATE.read_text()
        for name, value in values.items():
            text = text.replace(f"@{name}@", value)
        (self.home / "slurm.conf").write_text(text)
        gres = f"NodeName=n[1-{self.nodes}] Name=gpu Flags=nvidia_gpu_env File={self.home}/gpu[0-1]\n"
        (self.home / "gres.conf").write_text(gres)
        (self.home / "cgroup.conf").write_text("")
        names = " ".join(f"n{number}" for number in range(1, self.nodes + 1))
        hosts = Path("/etc/hosts").read_text().rstrip("\n")
        (self.home / "hosts").write_text(f"{hosts}\n127.0.0.1 {names}\n")


def install() -> None:
    """Install Slurm if it is missing.

    Raises:
        NoSlurmError: it cannot be installed.
    """
    if os.geteuid() != 0:
        raise NoSlurmError("a Slurm of one's own needs root")
    if all(shutil.which(program) for program in PROGRAMS):
        return
    if shutil.which("apt-get") is None:
        raise NoSlurmError("Slurm is not installed and there is no apt-get")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for argv in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
        try:
            answer = subprocess.run(["apt-get", *argv], env=environment, capture_output=True, timeout=300)
        except subprocess.TimeoutExpired:
            raise NoSlurmError("apt-get did not answer within five minutes") from None
    if answer.returncode != 0 or not all(shutil.which(program) for program in PROGRAMS):
        raise NoSlurmError(
            f"apt-get could not install Slurm: {answer.stderr[-300:].decode(errors='replace')}"
        )


@functools.cache
def running_cluster() -> Cluster:
    """Return the one cluster of this process, which is stopped at its exit.

    Raises:
        NoSlurmError: no cluster can run here.
    """
    install()
    home = Path(tempfile.mkdtemp(prefix="lrpath-slurm-"))
    home.chmod(0o755)
    cluster = Cluster(home, 2)
    atexit.register(cluster.stop)
    try:
        cluster.start()
    except AssertionError as error:
        if "Operation not permitted" in str(error):
            raise NoSlurmError(f"Slurm's daemons may not run here: {error}") from None
        raise
    return cluster

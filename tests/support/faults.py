"""Trainings with faults: an entry point for `training_fixtures.launch` that injects faults.

`main(["nan:3:1", "kill:renamed", "--", *argv])` trains with a loss of NaN in step 3 on rank 1, and kills
itself when a checkpoint has been renamed.
"""

from __future__ import annotations

import errno
import functools
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.support.training_fixtures import Outcome, launch

BALLAST = "ballast"


def train_with(faults: list[str], argv: list[str], nproc: int = 1, **named: Any) -> Outcome:
    """Run the entry point under `faults`."""
    return launch("tests.support.faults:main", [*faults, "--", *argv], nproc, **named)


def main(argv: list[str]) -> None:
    """Inject the faults and train."""
    from megatron_lrpath.training import pretrain

    split = argv.index("--")
    for fault in argv[:split]:
        name, *values = fault.split(":")
        FAULTS[name](*values)
    pretrain.main(argv[split + 1 :])


def after(owner: Any, name: str, act: Callable[[], None]) -> None:
    """Call `act` whenever `owner.name` has returned."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def then_act(*args: Any, **named: Any) -> Any:
        result = original(*args, **named)
        act()
        return result

    setattr(owner, name, then_act)


def on_loss(step: str, rank: str, change: Callable[[Any], Any]) -> None:
    """Change the loss of each micro-batch of a step on a rank."""
    from megatron.training import get_args

    from megatron_lrpath.training import forward

    original = forward.ForwardStep.loss

    def loss(self: Any, mask: Any, losses: Any) -> Any:
        if get_args().curr_iteration + 1 == int(step) and os.environ["RANK"] == rank:
            losses = change(losses)
        return original(self, mask, losses)

    forward.ForwardStep.loss = loss


def times(step: str, rank: str, factor: float) -> None:
    """Multiply the loss."""
    on_loss(step, rank, lambda losses: losses * factor)


def send(number: signal.Signals) -> Callable[[Any], Any]:
    """Return a function that sends this process a signal in the middle of a step."""

    def act(losses: Any) -> Any:
        os.kill(os.getpid(), number)
        return losses

    return act


def hang(losses: Any) -> Any:
    """Hang in a step, without ending the process."""
    time.sleep(600)
    return losses


def impatient() -> None:
    """Make the guards report a standstill within seconds."""
    from megatron_lrpath.training.guards import peers, standstill

    peers.LOOK_SECONDS = standstill.LOOK_SECONDS = 0.2
    standstill.ANSWER_SECONDS = 2.0


def fail(losses: Any) -> Any:
    """Raise an ordinary exception."""
    raise ArithmeticError("something is broken")


def kill_at(point: str, rank: str = "0") -> None:
    """Kill a rank (SIGKILL) at a point of saving, loading or removing."""
    if os.environ["RANK"] != rank:
        return
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.training import training

    from megatron_lrpath.runs import checkpoints as disk
    from megatron_lrpath.training.checkpoints import commit, start

    owner, name = {
        "written": (FileSystemWriterAsync, "finish"),
        "summed": (commit, "write_sums"),
        "manifest": (disk, "write_manifest"),
        "renamed": (commit, "sync_folder"),
        "tracked": (disk, "write_tracker"),
        "removed": (disk, "remove"),
        "chosen": (start, "choose"),
        "loaded": (training, "load_checkpoint"),
    }[point]
    after(owner, name, lambda: os.kill(os.getpid(), signal.SIGKILL))


def absent(rank: str, patience: str) -> None:
    """Kill a rank (SIGKILL) before the rendezvous; the others wait for `patience` seconds."""
    from megatron_lrpath.training.guards import peers as ranks

    ranks.MEETING = timedelta(seconds=float(patience))
    if os.environ["RANK"] == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def stop_early() -> None:
    """Send SIGTERM before anything is loaded."""
    from megatron_lrpath.training.checkpoints import start

    after(start, "choose", lambda: os.kill(os.getpid(), signal.SIGTERM))


def full_disk(first: str, last: str) -> None:
    """Report 1000 free bytes during the saves number `first` to `last` of this process."""
    from megatron_lrpath.training.checkpoints import commit as space

    original, calls = space.free_bytes, iter(range(1, 1000))

    def free_bytes(folder: Any) -> int:
        return 1000 if int(first) <= next(calls) <= int(last) else original(folder)

    space.free_bytes = free_bytes


def fill(folder: str) -> None:
    """Fill the disk of `folder` to the last byte."""
    with (Path(folder) / BALLAST).open("ab", buffering=0) as stream:
        for size in (2**20, 2**12, 1):
            with suppress(OSError):
                while True:
                    stream.write(bytes(size))


def brimful(first: str, last: str, folder: str) -> None:
    """Fill the disk from the end of step `first` until the end of step `last`."""
    from megatron.training import training

    steps = iter(range(1, 10**6))

    def act() -> None:
        step = next(steps)
        if step in (int(first), int(last)):  # a save ends in the same state of the disk
            training.maybe_finalize_async_save(blocking=True)
        if int(first) <= step < int(last):
            fill(folder)
        elif step == int(last):
            (Path(folder) / BALLAST).unlink()

    after(training, "train_step", act)


def log_into(path: str) -> None:
    """Send all output to `path`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def no_room_for_metadata(*saves: str) -> None:
    """Let the disk have room for the weights, but not for rank 0's metadata, at these saves.

    At the first save writing `.metadata` fails, at the second `metadata.json`, and so on in turn.
    """
    from megatron.core.dist_checkpointing import core
    from torch.distributed.checkpoint.filesystem import _FileSystemWriter

    def refuse(owner: Any, name: str, at: Sequence[str]) -> None:
        original, calls = getattr(owner, name), iter(range(1, 1000))

        def write(*args: Any) -> Any:
            if str(next(calls)) in at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args)

        setattr(owner, name, write)

    # functions that Megatron calls while it writes these two files
    refuse(_FileSystemWriter, "finish", saves[::2])
    refuse(core, "asdict", saves[1::2])


def roomy_disk() -> None:
    """Make the check of the free space always pass."""
    from megatron_lrpath.training.checkpoints import commit as space

    space.shortage = lambda folder, tensor_bytes: None


def use_temporary(folder: str) -> None:
    """Put temporary files into `folder`."""
    tempfile.tempdir = folder


def slow_steps(seconds: str) -> None:
    """Make each step longer by this many seconds."""
    from megatron.training import training

    after(training, "train_step", lambda: time.sleep(float(seconds)))


def attack(step: str, kind: str) -> None:
    """Change values in the store during `step`, as an outsider with only the address and our key names."""

    def change(losses: Any) -> Any:
        from torch.distributed import TCPStore

        from megatron_lrpath.training.guards import peers

        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        for name in ("report", "left/0", "left/1", "share/1", "collect/1/0", "peers/reports", "nobody's"):
            key = f"attempt/0/lrpath/{name}"
            if kind == "delete":
                store.delete_key(key)
            elif kind == "add":
                store.delete_key(key)
                store.add(key, 1)
            else:
                store.set(key, "0" * 64 + " 0")
        time.sleep(2 * peers.LOOK_SECONDS)  # in the meantime the other threads read the values
        print(f"attacked: {kind}")
        return losses

    on_loss(step, "1", change)


FAULTS: dict[str, Callable[..., None]] = {
    "nan": lambda step, rank="0": times(step, rank, float("nan")),
    "large": lambda step, factor, rank="0": times(step, rank, float(factor)),
    "term": lambda step, rank="0": on_loss(step, rank, send(signal.SIGTERM)),
    "usr2": lambda step, rank="0": on_loss(step, rank, send(signal.SIGUSR2)),
    "die": lambda step, rank="0": on_loss(step, rank, send(signal.SIGKILL)),
    "freeze": lambda step, rank="0": on_loss(step, rank, send(signal.SIGSTOP)),
    "hang": lambda step, rank="0": on_loss(step, rank, hang),
    "impatient": impatient,
    "bug": lambda step, rank="0": on_loss(step, rank, fail),
    "absent": absent,
    "attack": attack,
    "early": stop_early,
    "kill": kill_at,
    "full": full_disk,
    "brimful": brimful,
    "log": log_into,
    "metadata": no_room_for_metadata,
    "roomy": roomy_disk,
    "slow": slow_steps,
    "tmp": use_temporary,
    "session": os.setsid,
}

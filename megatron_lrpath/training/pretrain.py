"""The training entry point that `pretrain_gpt.py`, torchrun and srun start."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lrpath import full_disk
from megatron_lrpath.console import warn
from megatron_lrpath.errors import UserError
from megatron_lrpath.training import machine
from megatron_lrpath.training.checkpoints.ahead import ReadAhead
from megatron_lrpath.training.exits import Exits, Signals
from megatron_lrpath.training.options.arguments import read_early

if TYPE_CHECKING:
    from megatron_lrpath.training.session import Session


def main(argv: list[str] | None = None) -> None:
    """Train the run of the command line.

    A user's error prints one message and exits with 2; a training that cannot continue prints one message and
    exits with 1; a training that saved and stopped after a signal exits with `SAVED_AND_STOPPED`.
    """
    for category in (DeprecationWarning, FutureWarning, SyntaxWarning):
        warnings.filterwarnings("ignore", category=category)
    # Warnings about missing libraries at every start; `machine.flags` handles that.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|transformer-engine).*")
    start = time.time()
    exits, signals = Exits(), Signals()
    signals.watch()
    full_disk.keep_printing()
    with exits.reported():
        argv = sys.argv[1:] if argv is None else argv
        session = open_session(argv, exits, signals)
        from megatron_lrpath.training.loop import train  # imports Megatron, after the choice of the device

        train(session, argv, start)


def open_session(argv: list[str], exits: Exits, signals: Signals) -> Session:
    """Return the session of this process: it reads ahead, chooses the device, and prepares the process for
    it.
    """
    early = read_early(argv)
    ahead = ReadAhead()
    ahead.begin(early)
    device = machine.choose_device(early.device)
    machine.activate(device)
    set_single_process_environment(is_run=early.plan is not None or any("--lr-path" in word for word in argv))
    wandb = nullcontext() if asks_for_wandb(argv, early.plan) else without("wandb")
    with machine.lasting_imports(), wandb:
        # imports Megatron, after the choice of the device
        from megatron_lrpath.training.session import Session

    return Session(device, exits, signals, ahead)


def asks_for_wandb(argv: list[str], plan: Path | None) -> bool:
    """Return whether the command line or the plan mention wandb, whose import takes more than a second."""
    try:
        text = plan.read_bytes() if plan else b""
    except OSError:  # reported when the plan is read
        text = b""
    return b"wandb" in text or any("wandb" in word for word in argv)


@contextmanager
def without(package: str) -> Iterator[None]:
    """Hide an optional package from Megatron's imports; later imports find it again."""
    if package in sys.modules:
        yield
        return
    modules: dict[str, Any] = sys.modules
    modules[package] = None  # documented by Python: importing the name fails at once
    try:
        yield
    finally:
        del modules[package]


def set_single_process_environment(is_run: bool) -> None:
    """Support `python pretrain_gpt.py …` without a launcher, as one process.

    Raises:
        UserError: srun has started several processes, and each would train a run (`is_run`) alone.
    """
    if "RANK" not in os.environ:
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
        if tasks.isdigit() and int(tasks) > 1:
            text = (
                f"srun has started {tasks} processes, and RANK is not set: each would train alone, as one process. "
                "Start them with `lrpath submit`, with torchrun under srun, or with RANK, WORLD_SIZE, LOCAL_RANK, "
                "MASTER_ADDR and MASTER_PORT set from Slurm's variables"
            )
            if is_run:
                raise UserError(f"{text}.")
            if os.environ.get("SLURM_PROCID", "0") == "0":
                warn(f"{text}; the training continues.")
        from torch.distributed.elastic.utils.distributed import get_free_port

        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # an in-process restart needs them
        os.environ.setdefault("MASTER_PORT", str(get_free_port()))


if __name__ == "__main__":
    main()

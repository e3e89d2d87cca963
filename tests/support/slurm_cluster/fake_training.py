"""A stand-in for training and evaluation on a cluster: same files and signals, no torch. See `fake_python`.

`FAKE_<run>` (with _ for -) makes a run misbehave at a step: `fail:N` raises an exception, `once:N` the same
but only at the first start, `kill:N` sends SIGKILL, once, `error:N` prints a message of ours with status 2,
`hold:N,M` makes all ranks wait at each of these steps until they must stop or the run's folder has a file
`go-on`. `FAKE_PACE` is the time of a step in seconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.exits import SAVED_AND_STOPPED
from megatron_lrpath.files import atomic_write_text
from megatron_lrpath.plan import Plan, Run, load_plan
from megatron_lrpath.runs import failure
from megatron_lrpath.training.exits import Signals

RANK = int(os.environ["RANK"])
stop = False


def note_signal(number: int, frame: Any) -> None:
    """Request to save and stop at the next step."""
    global stop
    stop = True


def main(arguments: list[str]) -> None:
    """Act on these arguments as the real entry does, as far as other processes can see."""
    options = dict(zip(arguments[::2], arguments[1::2], strict=False))
    plan = load_plan(options["--plan"])
    if "--runs" in options:
        return evaluate(plan, options["--runs"])
    run = plan.run(options["--paradigm"], options["--run"])
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, note_signal)
    train(plan, run)


def train(plan: Plan, run: Run) -> None:
    """Pretend to train up to the run's end, from its newest checkpoint or its parent's."""
    folder = plan.folder(run)
    root = folder / "checkpoints"
    tracker = root / "latest_checkpointed_iteration.txt"
    step = int(tracker.read_text()) if tracker.is_file() else run.first_step
    if step == run.first_step and run.parent:
        parent = plan.folder(plan.run(run.paradigm, run.parent.run)) / "checkpoints"
        assert (parent / f"iter_{step:07d}/metadata.json").is_file(), f"no checkpoint {step} in {parent}"
    start = {"rank": RANK, "world": os.environ["WORLD_SIZE"], "step": step, "host": os.uname().nodename}
    start |= {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")}
    with (folder / "starts").open("a") as stream:
        stream.write(json.dumps(start | {"argv": sys.argv[1:], "time": time.time()}) + "\n")
    history = folder / "history.jsonl"
    if RANK == 0 and history.exists():  # the steps after the checkpoint are repeated
        rows = history.read_text().splitlines(keepends=True)
        history.write_text("".join(row for row in rows if json.loads(row)["step"] <= step))
    interval = int(plan.megatron.get("save_interval", 10**9))
    while step < run.last_step:
        step += 1
        Signals().begin()
        misbehave(folder, run, step)
        time.sleep(float(os.environ.get("FAKE_PACE", "0.02")))
        if RANK == 0:
            line = {"step": step, "lr": 1e-3, "loss": 5 - step / 100, "grad_norm": 1.0, "seconds": 0.02}
            with history.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            if stop or step % interval == 0 or step in run.keep_steps or step == run.last_step:
                save(root, step)
        if stop and step < run.last_step:
            os._exit(SAVED_AND_STOPPED)
    if RANK == 0:
        result = {
            "run": run.name,
            "paradigm": run.paradigm,
            "version": run.version,
            "step": step,
            "loss": 4.0,
        }
        (folder / "result.json").write_text(json.dumps(result))


def misbehave(folder: Path, run: Run, step: int) -> None:
    """Fail as `FAKE_<run>` requests, on the first rank only; `hold` applies to all ranks."""
    mode, _, at = os.environ.get(f"FAKE_{run.name.replace('-', '_')}", ":").partition(":")
    if not mode or step not in map(int, at.split(",")):
        return
    if mode == "hold":
        while not (stop or (folder / "go-on").exists()):
            time.sleep(0.05)
        return
    if RANK != 0:
        return
    mark = folder / "misbehaved"
    if mode in ("once", "kill") and mark.exists():
        return
    mark.touch()
    if mode == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "error":
        error = UserError("the slice v9 is damaged; draw it again")
        failure.record_error(error)
        print(f"lrpath: error: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    raise RuntimeError("the loss is not finite")


def save(root: Path, step: int) -> None:
    """Write a checkpoint as Megatron does; wait while the run's folder has a file `saving`."""
    while (root.parent / "saving").exists():
        time.sleep(0.05)
    folder = root / f"iter_{step:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".metadata").write_text("x")
    (folder / "common.pt").write_text("x")
    (folder / "metadata.json").write_text("{}")
    atomic_write_text(root / "latest_checkpointed_iteration.txt", str(step))


def evaluate(plan: Plan, key: str) -> None:
    """Write an evaluation of the run `paradigm/name`."""
    paradigm, _, name = key.partition("/")
    run = plan.run(paradigm, name)
    row = {"step": run.last_step, "loss": 3.0, "perplexity": 20.1, "tokens": 100, "domains": {}}
    if RANK == 0:
        (plan.folder(run) / "eval.json").write_text(json.dumps(row))


if __name__ == "__main__":
    main(sys.argv[1:])

"""A stand-in for the training entry: same files, no training. The variable `FAKE_<run>` sets its behavior.

`fail:N` ends with an exception at step N, `die:N` with SIGKILL, `hang:N` stops logging there (`deaf:N`: and
ignores SIGTERM), `early:N` exits with 0 there, `error:N` prints a message of ours and exits with 2. Before
step N of `FAKE_UNTIL_<run>`, `N:FILE`, it waits for the file, at most a minute.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from megatron_lrpath.errors import UserError
from megatron_lrpath.runs import failure
from tests.support.waiting import until


def main() -> None:
    """Pretend to train; arguments: folder, first and last step, save interval, kept steps, pace, parent."""
    folder, kept, pace, parent = Path(sys.argv[1]), sys.argv[5], float(sys.argv[6]), sys.argv[7:]
    first, last, interval = map(int, sys.argv[2:5])
    keep = {int(step) for step in kept.split(",") if step}
    name = folder.name.replace("-", "_")
    mode, _, at = os.environ.get(f"FAKE_{name}", ":").partition(":")
    waits_at, _, awaited = os.environ.get(f"FAKE_UNTIL_{name}", ":").partition(":")
    (folder / "started").open("a").write(f"{time.time()} {json.dumps(dict(os.environ))}\n")
    if parent and not (Path(parent[0]) / "metadata.json").is_file():
        sys.exit(f"lrpath: error: no checkpoint {parent[0]}")
    print("a page of arguments")
    tracker = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    step = int(tracker.read_text()) if tracker.is_file() else first
    while step < last:
        step += 1
        if waits_at and step == int(waits_at):
            until(Path(awaited).exists, 60)
        if mode and step == int(at):
            misbehave(mode, folder)
        time.sleep(pace)
        line = {"step": step, "lr": 1e-3, "loss": 5.0 - step / 100, "grad_norm": 1.0, "seconds": pace}
        with (folder / "history.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        if step % interval == 0 or step in keep or step == last:
            save(folder / "checkpoints", step)
    result = {"run": folder.name, "paradigm": folder.parent.name, "step": last, "loss": 5.0 - last / 100}
    (folder / "result.json").write_text(json.dumps(result))


def misbehave(mode: str, folder: Path) -> None:
    """Fail in the requested way."""
    if mode == "fail":
        raise RuntimeError("the loss is not finite")
    if mode == "error":
        error = UserError("the slice v9 is damaged; draw it again")
        failure.record_error(error)
        print(f"lrpath: error: {error}", flush=True)
        sys.exit(2)
    if mode == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "early":
        sys.exit(0)
    if mode == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # a worker in its own session, like torchrun's workers
    worker = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    (folder / "pids").write_text(f"{os.getpid()} {worker.pid}")
    while True:
        time.sleep(0.05)


def save(root: Path, step: int) -> None:
    """Write a checkpoint with the files that Megatron leaves."""
    folder = root / f"iter_{step:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".metadata").write_text("x")
    (folder / "metadata.json").write_text("{}")
    (root / "latest_checkpointed_iteration.txt").write_text(str(step))


if __name__ == "__main__":
    with failure.recorded():
        main()

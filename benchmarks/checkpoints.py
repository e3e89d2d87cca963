#!/usr/bin/env python3
"""Checkpoints on the CPU: what a save costs the training, synchronous and asynchronous, and what loading costs
compared with reading the same bytes raw.

  python benchmarks/checkpoints.py            # a 110M-parameter model in bf16, 1.5 GB a checkpoint
  python benchmarks/checkpoints.py --quick    # fewer rounds

Saving: one real training (`pretrain_gpt.py --plan …`) saves by turns synchronously and asynchronously. A save's *wait*
is how long the training waits for it (the call, and what is left to do when the writers are done); *slowed*
is by how much the steps that follow are longer than undisturbed ones (the writers use the same cores and disk,
and the first write to each page of memory that they still need copies it). The stall is both.

Loading: real starts of `pretrain_gpt.py` until their first step is done, without a checkpoint and from the last one,
by turns, with checksums (the default) and with sizes alone. By how much the second takes longer is what verifying and
loading cost a program that waits for them; it is shown next to a plain sequential read of the same files.
Once with the files dropped from the page cache (as on a machine that did not write them), once with the files in it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.step_time import Shape, write_plan  # noqa: E402
from megatron_lrpath.runs.folder import RunFolder  # noqa: E402

if TYPE_CHECKING:
    from megatron_lrpath.training.checkpoints.commit import Saves

SHAPE = Shape(hidden=768, ffn=2048, layers=12, heads=12, vocabulary=16384, sequence=128, batch=4)
WARMUP_STEPS = 4
GAP = 8  # steps between two saves
KINDS = ("sync", "async")
CHUNK = 4 * 2**20  # bytes of a raw read
CONTEXT = mp.get_context("fork")  # Megatron is imported once, before any process is forked


def in_child(act: Callable[..., Any], *args: Any) -> Any:
    """Call `act` in its own process, with the output in a file; return its result."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("w+") as log:

        def run() -> None:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            sender.send(act(*args))

        process = CONTEXT.Process(target=run)
        process.start()
        sender.close()
        try:
            return receiver.recv()
        except EOFError:
            raise SystemExit(f"a measurement ended early:\n{Path(log.name).read_text()[-4000:]}") from None
        finally:
            process.join()


class Seconds(NamedTuple):
    """A moment, or a duration: wall clock and processor time of this process."""

    wall: float
    processor: float

    @classmethod
    def now(cls) -> Seconds:
        """Return the current moment."""
        return cls(time.perf_counter(), time.process_time())

    def __add__(self, other: Seconds) -> Seconds:  # type: ignore[override]
        return Seconds(self.wall + other.wall, self.processor + other.processor)

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall - other.wall, self.processor - other.processor)


class Timings:
    """Times of the steps and saves of one training, taken at its seams."""

    def __init__(self, rounds: int) -> None:
        self.kinds = [kind for _ in range(rounds) for kind in KINDS]
        self.steps: list[dict[str, Any]] = []
        self.saves: list[dict[str, Any]] = []
        self.finishing = Seconds(0.0, 0.0)
        self.mark = time.perf_counter()
        self.rest = 0  # remaining steps after the last save

    def install(self, saves: Saves) -> None:
        """Wrap the functions between the training loop and its saves."""
        from megatron.training import get_args, training

        finalize = training.maybe_finalize_async_save

        def timed_finalize(*args: Any, **named: Any) -> None:
            begun = Seconds.now()
            finalize(*args, **named)
            self.finishing += Seconds.now() - begun

        def save_or_go_on(
            model: Any, optimizer: Any, scheduler: Any, iteration: int, flops: Any, context: Any, data: Any
        ) -> bool:
            now = time.perf_counter()
            step = now - self.mark - self.finishing.wall
            self.steps.append({"step": step, "finishing": self.finishing, "writing": bool(saves.under_way)})
            if (iteration - WARMUP_STEPS) % GAP == 0 and iteration > WARMUP_STEPS and self.kinds:
                kind = self.kinds.pop(0)
                get_args().async_save = kind == "async"
                begun = Seconds.now()
                state = (iteration, model, optimizer, scheduler, flops)
                training.save_checkpoint_and_time(*state, context, train_data_iterator=data)
                self.saves.append({"kind": kind, "after": len(self.steps), "call": Seconds.now() - begun})
                get_args().async_save = True
                self.rest = GAP
            self.finishing, self.mark = Seconds(0.0, 0.0), time.perf_counter()
            self.rest -= not self.kinds
            return not self.kinds and self.rest < 0

        training.maybe_finalize_async_save = timed_finalize
        training.checkpoint_and_decide_exit = save_or_go_on


def train(plan: Path, rounds: int) -> dict[str, Any]:
    """Run a training with alternating kinds of saves; return the rows of `Timings`."""
    from megatron_lrpath.training import loop, pretrain, seams, setup
    from megatron_lrpath.training.exits import Exits, Signals

    argv = [
        "--plan",
        str(plan),
        "--paradigm",
        "ptfs",
        "--run",
        "scratch-v1",
        "--device",
        "cpu",
        "--async-save",
    ]
    session = pretrain.open_session(argv, Exits(), Signals())
    seams.apply(session)
    args = setup.arguments(session, argv)
    setup.begin(session, args)
    timings = Timings(rounds)
    assert session.saves is not None
    timings.install(session.saves)
    with suppress(SystemExit):
        loop.carry_out(session, args, lambda: loop.loop(session, args))
    return {"steps": timings.steps, "saves": timings.saves}


def stalls(rows: dict[str, Any]) -> dict[str, Any]:
    """Return by kind of save the seconds of its wait and of the slower steps until the next save.

    Undisturbed are the steps during which nothing was being written, without the first after a save.
    """
    steps = rows["steps"]
    firsts = {save["after"] for save in rows["saves"]}
    quiet = [
        row["step"]
        for number, row in enumerate(steps)
        if number >= WARMUP_STEPS
        and number not in firsts
        and not row["writing"]
        and not steps[number - 1]["writing"]
    ]
    usual = statistics.median(quiet)
    found: dict[str, Any] = {"step": usual, "quiet": len(quiet)}
    for kind in KINDS:
        waits, slowed = [], []
        for save in rows["saves"]:
            if save["kind"] == kind:
                following = steps[save["after"] : save["after"] + GAP]
                waits.append(sum((row["finishing"] for row in following), start=save["call"]))
                slowed.append(sum(row["step"] - usual for row in following[: busy(following)]))
        found[kind] = {
            "wait": statistics.median(wait.wall for wait in waits),
            "wait_processor": statistics.median(wait.processor for wait in waits),
            "slowed": max(0.0, statistics.median(slowed)),
        }
    return found


def busy(following: list[dict[str, Any]]) -> int:
    """Return how many steps after a save it may slow down: those with active writers, and the next one."""
    return 1 + sum(1 for row in following if row["writing"])


def seconds_to_first_step(plan: Path, check: str) -> float:
    """Return the seconds from a start by the command line until a step is done; then kill it."""
    history = RunFolder(run_folder(plan)).history
    before = history.stat().st_mtime_ns if history.exists() else 0
    argv = ["--plan", plan, "--paradigm", "ptfs", "--run", "scratch-v1", "--device", "cpu"]
    command = [sys.executable, ROOT / "pretrain_gpt.py", *argv, "--checkpoint-check", check]
    with tempfile.TemporaryFile("w+") as log:
        begun = time.perf_counter()
        process = subprocess.Popen([*map(str, command)], stdout=log, stderr=log, start_new_session=True)
        try:
            while not stepped(history, before):
                if process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"a start ended early:\n{log.read()[-4000:]}")
                time.sleep(0.005)
            return time.perf_counter() - begun
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def stepped(history: Path, before: int) -> bool:
    """Return whether a step was written to the history since `before`; a start empties or shortens it."""
    with suppress(FileNotFoundError, IndexError, ValueError):
        if history.stat().st_mtime_ns > before:
            last = json.loads(history.read_text().splitlines()[-1])
            return bool(last["step"] == first_step(history.parent) + 1)
    return False


def first_step(folder: Path) -> int:
    """Return the step at which a run's last start began."""
    return int(json.loads(RunFolder(folder).lineage.read_text())["starts"][-1]["step"])


def run_folder(plan: Path) -> Path:
    """Return the folder of the one run that is measured."""
    return plan.with_suffix("") / "ptfs/scratch-v1"


def read_raw(folder: Path) -> float:
    """Read all files sequentially; return the seconds."""
    buffer = bytearray(CHUNK)
    begun = time.perf_counter()
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - begun


def write_raw(folder: Path, size: int) -> float:
    """Write `size` bytes sequentially to a new file and sync it; return the seconds."""
    buffer = os.urandom(CHUNK)
    path = folder / "raw"
    begun = time.perf_counter()
    with path.open("wb", buffering=0) as stream:
        for _ in range(size // CHUNK):
            stream.write(buffer)
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - begun
    path.unlink()
    return seconds


def drop_from_cache(folder: Path) -> None:
    """Drop the files, which are synced, from the kernel's page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def loads(plan: Path, without: Path, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Return the seconds of raw reads and of starts, a row per round, cache state and check.

    Each row has a start without a checkpoint and a start that loads it.

    Args:
        plan: of the run whose newest checkpoint is in `folder`.
        without: the same plan with another output folder.
    """
    rows = []
    for number in range(rounds):
        for cold in (True, False):
            for check in ("checksums", "sizes") if number % 2 else ("sizes", "checksums"):
                shutil.rmtree(without.with_suffix(""), ignore_errors=True)
                bare = seconds_to_first_step(without, check)
                if cold:
                    drop_from_cache(folder)
                raw = read_raw(folder)
                if cold:
                    drop_from_cache(folder)
                rows.append(
                    {
                        "cold": cold,
                        "check": check,
                        "raw": raw,
                        "without": bare,
                        "with": seconds_to_first_step(plan, check),
                    }
                )
    return rows


def prepare(threads: int) -> None:
    """Import Megatron before the measured processes are forked."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from megatron_lrpath.training.machine import activate

    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|transformer-engine).*")
    activate("cpu")
    import megatron.training  # noqa: F401

    from megatron_lrpath.training import seams

    seams.import_rows("cpu")


def measure(shape: Shape, folder: Path, rounds: int) -> dict[str, Any]:
    """Return all figures."""
    last = WARMUP_STEPS + 2 * rounds * GAP
    plan = write_plan(shape, folder, "bf16", last + GAP + 1)
    saving = stalls(in_child(train, plan, rounds))
    checkpoint = folder / "bf16/ptfs/scratch-v1/checkpoints" / f"iter_{last:07d}"
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    saving["raw_write"] = statistics.median(write_raw(folder, size) for _ in range(rounds))
    without = plan.with_name("without.yaml")
    without.write_text(plan.read_text().replace(str(plan.with_suffix("")), str(without.with_suffix(""))))
    rows = loads(plan, without, checkpoint, rounds)
    return {"parameters": shape.parameters, "bytes": size, "saving": saving, "loading": rows}


def print_figures(found: dict[str, Any], threads: int, load: float) -> None:
    """Print the two tables."""
    from megatron_lrpath.plan.spec import SAVE_INTERVAL

    saving, size = found["saving"], found["bytes"]
    print(f"{found['parameters'] / 1e6:.0f}M parameters, {size / 1e9:.2f} GB a checkpoint;", end=" ")
    print(f"{threads} threads on {os.cpu_count()} cores, load average before: {load:.1f}")
    print(f"undisturbed step {saving['step']:.2f} s (median of {saving['quiet']});", end=" ")
    print(f"raw write with fsync {saving['raw_write']:.2f} s ({size / 1e6 / saving['raw_write']:.0f} MB/s)")
    print(f"\n{'save':6} {'wait':>8} {'of sync':>8} {'processor':>10} {'of sync':>8} {'slowed':>8}", end="")
    print(f"  stall at every {SAVE_INTERVAL} steps")
    for kind in KINDS:
        row, base = saving[kind], saving["sync"]
        stall = row["wait"] + row["slowed"]
        print(f"{kind:6} {row['wait']:7.2f}s {row['wait'] / base['wait']:8.1%}", end=" ")
        print(f"{row['wait_processor']:9.2f}s {row['wait_processor'] / base['wait_processor']:8.1%}", end=" ")
        print(f"{row['slowed']:7.2f}s  {stall / (SAVE_INTERVAL * saving['step'] + stall):.3%}")
    print(f"\n{'files':6} {'check':10} {'raw':>7} {'without':>8} {'with':>7} {'more':>7} {'ratio':>7}")
    for cold in (True, False):
        for check in ("sizes", "checksums"):
            rows = [row for row in found["loading"] if (row["cold"], row["check"]) == (cold, check)]
            print(f"{'cold' if cold else 'cached':6} {check:10} {load_row(rows)}")


def load_row(rows: list[dict[str, Any]]) -> str:
    """Return the medians of the seconds, how much the starts differ, and this over the raw read."""
    raw, without, with_it = (
        statistics.median(row[name] for row in rows) for name in ("raw", "without", "with")
    )
    more = with_it - without
    return f"{raw:6.2f}s {without:7.2f}s {with_it:6.2f}s {more:6.2f}s {more / raw:6.2f}×"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="saves of each kind, loads of each kind")
    parser.add_argument("--quick", action="store_true", help="2 rounds")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="OpenMP threads of the training")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    for name, value in asdict(SHAPE).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    shape = Shape(**{name: getattr(args, name) for name in asdict(SHAPE)})
    load = os.getloadavg()[0]
    prepare(args.threads)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(shape, Path(folder), 2 if args.quick else args.rounds)
    if args.json:
        return print(json.dumps({"load_before": load, **found}, indent=1))
    print_figures(found, args.threads, load)


if __name__ == "__main__":
    main()

"""The records of every step: a line in the run's history, and its curves over tokens in TensorBoard and W&B.

Tokens are counted from the first step of the run's oldest ancestor, so that the runs of a plan share one
axis and a branch begins at the main path's last point before the branch point.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_lrpath.console import warn
from megatron_lrpath.devices import peak_flops
from megatron_lrpath.errors import cause
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.runs.history import HistoryWriter, LoggedStep, row_of_step
from megatron_lrpath.runs.lineage import add_skipped
from megatron_lrpath.training.context import RunContext
from megatron_lrpath.training.guards.guard import Guard

GROUP = "by tokens"
LOSS, RATE, PLANNED = f"{GROUP}/loss", f"{GROUP}/learning rate", f"{GROUP}/learning rate as planned"
NORM, PACE, MFU = f"{GROUP}/gradient norm", f"{GROUP}/tokens per second", f"{GROUP}/MFU"
LAYOUT = {
    "path": {
        "learning rate, real and planned": ["Multiline", [RATE, PLANNED]],
        "loss": ["Multiline", [LOSS]],
        "tokens per second": ["Multiline", [PACE]],
    }
}


class Pace:
    """Tokens per second and the utilization of the devices, step by step.

    MFU is Megatron's count of the model's floating-point operations per step (without recomputation)
    relative to the devices' peak: `--peak-tflops`, or a GPU's bf16 peak by its name. There is no MFU for
    the CPU, for an unknown GPU, and for precisions other than 16 bits.
    """

    def __init__(self, args: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        self.sample_tokens = args.seq_length
        self.peak = peak_of(args)
        self.sample_flops = sample_flops(args) if self.peak else 0.0
        self.devices = args.world_size
        self._clock = clock
        self._last: float | None = None

    def step_ended(self, samples: int) -> tuple[float | None, float | None]:
        """Return (tokens per second, MFU) of the step of `samples` samples that ends now; None for the first."""
        now, before = self._clock(), self._last
        self._last = now
        if before is None or now <= before:
            return None, None
        seconds = now - before
        share = samples * self.sample_flops / seconds / (self.peak * self.devices) if self.peak else None
        return samples * self.sample_tokens / seconds, share


def peak_of(args: Any) -> float | None:
    """Return the peak FLOP/s of one device of this run; None if it is unknown."""
    import torch

    if getattr(args, "peak_tflops", None):
        return float(args.peak_tflops) * 1e12
    half = (args.bf16 or args.fp16) and not (getattr(args, "fp8", None) or getattr(args, "fp4", None))
    if not half or args.distributed_backend == "gloo" or not torch.cuda.is_available():
        return None
    return peak_flops(torch.cuda.get_device_name())


def sample_flops(args: Any) -> float:
    """Return Megatron's count of the model's floating-point operations (forward and backward) for one sample."""
    from megatron.training.training import num_floating_point_operations

    return float(num_floating_point_operations(args, 1))


class Watcher:
    """Writes a run's curves over tokens to the writers that Megatron has opened (on its last rank)."""

    def __init__(self, args: Any, context: RunContext, tensorboard: Any, wandb: Any) -> None:
        self.args, self.context = args, context
        self.tensorboard, self.wandb = tensorboard, wandb
        self.begun = False

    def log(self, step: int, values: dict[str, float | None]) -> None:
        """Add the values of a step; `values` by the names above, None if unknown."""
        if not self.begun:
            self._begin(step)
        planned = self.context.path.lr_at(step - 1)
        self._write(step, self.context.sizes.samples_at(step), values | {PLANNED: planned})

    def _begin(self, step: int) -> None:
        self.begun = True
        if self.tensorboard:
            self.tensorboard.add_custom_scalars(LAYOUT)
        if self.wandb:
            self.wandb.define_metric("tokens")
            self.wandb.define_metric(f"{GROUP}/*", step_metric="tokens")
        parent, first = parent_row(self.context), self.context.path.start
        if parent is not None and step == first + 1:
            # W&B's steps must not decrease: the parent's point has the step before the first one.
            values = {LOSS: parent.loss, RATE: parent.lr, NORM: parent.grad_norm}
            self._write(step - 1, self.context.sizes.samples_at(first), values)

    def _write(self, step: int, samples: int, values: dict[str, float | None]) -> None:
        tokens = samples * self.args.seq_length
        known = {name: value for name, value in values.items() if value is not None}
        if self.tensorboard:
            for name, value in known.items():
                self.tensorboard.add_scalar(name, value, tokens)
        if self.wandb:
            self.wandb.log({**known, "tokens": tokens}, step)


def parent_row(context: RunContext) -> LoggedStep | None:
    """Return the parent's line of history at the step where the run leaves it; None without a plan or a line.

    A fine-tuning counts its own tokens, so that its parent has no point on its axis.
    """
    if context.plan is None or context.run is None or context.run.parent is None or context.parent is None:
        return None
    if context.parent.weights_only:
        return None
    return row_of_step(Path(context.parent.folder).parent, context.run.parent.step)


def set_wandb_defaults(args: Any, plan: Plan, run: Run) -> None:
    """Set one project, a group for the plan, and one W&B run for each run regardless of the number of starts.

    Arguments and W&B's own environment variables override these defaults.
    """
    if not getattr(args, "wandb_project", ""):
        return
    args.wandb_exp_name = args.wandb_exp_name or run.key
    args.wandb_save_dir = args.wandb_save_dir or str(Path(plan.output))
    os.environ.setdefault("WANDB_RUN_GROUP", plan.name)
    os.environ.setdefault("WANDB_JOB_TYPE", run.kind)
    continue_wandb_run(plan.folder(run))


def continue_wandb_run(place: Path) -> None:
    """Make every start of the run in `place` continue one W&B run, unless the environment names another."""
    own = hashlib.sha256(str(place.resolve()).encode()).hexdigest()[:16]
    os.environ.setdefault("WANDB_RUN_ID", own)
    os.environ.setdefault("WANDB_RESUME", "allow")


class StepRecorder:
    """Records the steps of a run: history and curves on the rank that has the loss, loss spikes on rank 0.

    Args:
        context: the run.
        guard: its results for the current step.
        args: Megatron's arguments; `consumed_train_samples` is the counter of the loop.
    """

    def __init__(self, context: RunContext, guard: Guard, args: Any) -> None:
        self.context, self.guard, self.args = context, guard, args
        self._history: HistoryWriter | None = None
        self._watcher: Watcher | None = None
        self._pace = Pace(args)
        self._unrecorded: list[dict[str, Any]] = []  # skipped updates that are not in the lineage yet

    def record(self, step: int, lr: float, loss: Any, grad_norm: Any, skipped: bool) -> None:
        """Record a step (1-based): the rate it used, its loss (nats per token), the gradient's norm, whether
        it was skipped.

        Only the last rank has the loss; the others do nothing.
        """
        if self.args.rank != self.args.world_size - 1:
            return
        loss = self.guard.loss if self.guard.loss is not None else loss
        row: dict[str, Any] = {
            "step": step,
            "consumed_samples": self.args.consumed_train_samples,
            "lr": lr,
            "loss": None if loss is None else float(loss),
            "grad_norm": None if grad_norm is None else float(grad_norm),
        }
        mfu = self._show(row)
        if self.context.folder is None:
            return
        if mfu is not None:
            row["mfu"] = round(mfu, 5)
        if skipped:
            row["skipped"] = True
        if self.guard.spike:
            row["spike"] = {"median": self.guard.spike.median, "limit": self.guard.spike.limit}
        if self._history is None:
            from megatron.training import get_timers  # after the choice of the backend

            elapsed = get_timers()("interval-time", log_level=0).elapsed(reset=False)  # started with the loop
            self._history = HistoryWriter(self.context.folder, step - 1, elapsed)
        self._history.append(row)

    def _show(self, row: dict[str, Any]) -> float | None:
        """Add a step's row to the curves; return its MFU, None if unknown."""
        from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

        if self._watcher is None:
            self._watcher = Watcher(self.args, self.context, get_tensorboard_writer(), get_wandb_writer())
        pace, mfu = self._pace.step_ended(self.context.sizes.size_of(row["step"]))
        if row["step"] % self.args.tensorboard_log_interval == 0:
            values = {LOSS: row["loss"], RATE: row["lr"], NORM: row["grad_norm"], PACE: pace, MFU: mfu}
            self._watcher.log(row["step"], values)
        return mfu

    def report_spike(self, step: int) -> None:
        """Warn about a loss spike in this step, with its samples; record a skipped update in the lineage. On
        rank 0.
        """
        guard, args = self.guard, self.args
        if guard.spike is None or args.rank != 0:
            return
        last = args.consumed_train_samples - 1
        first = last + 1 - self.context.sizes.size_of(step)
        spike, action = guard.spike, "update skipped" if guard.skipped else "update made"
        warn(
            f"step {step}: loss spike: {spike.loss:.4f} over a running median of {spike.median:.4f} (limit "
            f"{spike.limit:.4f}); samples {first} to {last}; {action}"
        )
        if guard.skipped and self.context.folder is not None:
            skip = {"step": step, "samples": [first, last], "loss": spike.loss, "median": spike.median}
            self._unrecorded.append(skip)
            try:
                self.record_skips()
            except OSError as error:
                file = RunFolder(self.context.folder).lineage
                warn(f"{file}: {cause(error)}; it learns of step {step} at the next save.")

    def record_skips(self) -> None:
        """Write skipped updates into the lineage; raise OSError if the disk has no space. On rank 0."""
        while self._unrecorded:
            assert self.context.folder is not None
            add_skipped(self.context.folder, self._unrecorded[0])
            del self._unrecorded[0]

    def sync_history(self) -> None:
        """Sync the history; raise OSError if the disk has no space. Do nothing if no step was recorded."""
        if self._history is not None:
            self._history.sync()


PATTERN = "events.out.tfevents.*"
OF_SAMPLES = " vs samples"  # suffix of Megatron's names of curves over samples
LENGTH, AROUND = (
    struct.Struct("<Q"),
    16,
)  # a record: its length with a checksum, the bytes with a checksum


def forget_curves(context: RunContext, args: Any, first: int) -> None:
    """Remove the points from step `first` on from TensorBoard's files in the run's own folder; on its last rank.

    A branch begins with its parent's point, one step before its own first.
    """
    from megatron.training.global_vars import (
        get_tensorboard_writer,  # after the choice of the backend
    )

    writer = get_tensorboard_writer()
    if writer is None or context.folder is None:
        return
    folder = RunFolder(context.folder).tensorboard
    own = file_of(writer)
    if own is not None and own.parent.resolve() == folder.resolve():
        forget_points(folder, first, context.sizes.samples_at(first), args.seq_length, own)


def forget_points(folder: Path, step: int, samples: int, sample_tokens: int, own: Path) -> None:
    """Remove the points of `step` and later steps from a run's event files in `folder`.

    A file is written in the order of the steps, so these points are at its end. A warning names a folder
    that is not writable.

    Args:
        folder: the folder of TensorBoard's files.
        step: the first step to train (1-based), or the one before, if a run begins with a point of it.
        samples: consumed after that step; `sample_tokens`: tokens of a sample. For curves over those.
        own: the file of this process, which is not changed.
    """
    firsts = (step, samples, samples * sample_tokens)
    for file in sorted(folder.glob(PATTERN)):
        if file.name == own.name:
            continue
        try:
            end = end_before(file.read_bytes(), firsts)
            if end is not None:
                os.truncate(file, end)
        except OSError as error:
            warn(f"{file}: {cause(error)}; TensorBoard shows the steps that are trained again twice.")
            return


def end_before(content: bytes, firsts: tuple[int, int, int]) -> int | None:
    """Return the end of an event file without its points from `firsts` on (in steps, samples, tokens).

    Return None if it has no such points, or if it is unreadable before an incomplete last record.
    """
    # This takes a while, and the first start of a run has no files.
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    end = None
    for begin, length in reversed(records(content)):
        try:
            event = Event.FromString(content[begin + 12 : begin + 12 + length])
        except DecodeError:
            return None
        values = event.summary.value
        if values and all(event.step < first_of(value.tag, firsts) for value in values):
            break
        if values:
            end = begin
    return end


def records(content: bytes) -> list[tuple[int, int]]:
    """Return the complete records of an event file: their offsets and the lengths of their content."""
    found, place = [], 0
    while place + AROUND <= len(content):
        (length,) = LENGTH.unpack_from(content, place)
        if place + AROUND + length > len(content):
            break
        found.append((place, length))
        place += AROUND + length
    return found


def first_of(tag: str, firsts: tuple[int, int, int]) -> int:
    """Return the first point to remove from the curve with this name, on its axis."""
    step, samples, tokens = firsts
    if tag.startswith(f"{GROUP}/"):
        return tokens
    return samples if tag.endswith(OF_SAMPLES) else step


def file_of(writer: Any) -> Path | None:
    """Return the file of torch's SummaryWriter; None if it is not available."""
    try:
        return Path(writer.file_writer.event_writer._file_name)
    except AttributeError:
        return None

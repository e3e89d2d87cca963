"""Save checkpoints: write to a temporary folder, add a manifest, rename to complete; and retention.

Megatron writes to the given folder, which is next to the final one; the rename happens when all ranks have
written, which is some steps later with asynchronous saves. A failed save leaves no files and does not end
the training.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron_lrpath.console import warn
from megatron_lrpath.errors import TrainingStoppedError, cause
from megatron_lrpath.files import atomic_write_text, sync_folder
from megatron_lrpath.reading import read_object
from megatron_lrpath.runs import checkpoints as disk
from megatron_lrpath.runs.checkpoints import FileSum
from megatron_lrpath.wording import byte_size

SPARE_SHARE = 0.02  # of the checkpoint, for its content other than tensors
SPARE_BYTES = 2**20


def free_bytes(folder: Path) -> int:
    """Return the free space for this user on the disk of `folder` (without quotas, which are not visible
    here).
    """
    about = os.statvfs(folder)
    return about.f_bavail * about.f_frsize


def local_bytes(sharded_state_dict: Any) -> int:
    """Return the bytes of tensors that this rank adds to a checkpoint."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

    total = 0
    for value in nested_values(sharded_state_dict):
        if isinstance(value, ShardedTensor | ShardedTensorFactory) and is_main_replica(value.replica_id):
            data = value.data
            total += 0 if data is None else data.numel() * data.element_size()
    return total


def shortage(folder: Path, tensor_bytes: int) -> str | None:
    """Return why a checkpoint does not fit on the disk of `folder`; None if it does."""
    needed, free = int(tensor_bytes * (1 + SPARE_SHARE)) + SPARE_BYTES, free_bytes(folder)
    if free >= needed:
        return None
    return f"it needs {byte_size(needed)} and {byte_size(free)} are free on the disk of {folder}"


WRITER_NICE = 10  # as Megatron's persistent writers
SUMS = ".sums-"  # + rank: the sums of what each rank wrote, until they are in the manifest


class Commits:
    """Writes the distributed checkpoints of a run to temporary folders and commits them.

    Args:
        saves: the saves of the run; notified of each commit.
        sync_history: syncs the run's history, called on the last rank before a commit.
        record_skips: writes skipped updates into the lineage, called on rank 0 before a commit.
    """

    def __init__(
        self, saves: Saves, sync_history: Callable[[], None], record_skips: Callable[[], None]
    ) -> None:
        self.saves = saves
        self.sync_history = sync_history
        self.record_skips = record_skips
        self._refused: list[OSError] = []  # of the disk, on rank 0, for the checkpoint that is being written

    def save(
        self, write: Callable[..., Any], state: Any, checkpoint_dir: str, *rest: Any, **named: Any
    ) -> Any:
        """Write `state` with Megatron's `write`; commit it now, or when the asynchronous writers are done.

        A synchronous save is also a request, which Megatron's own writers process immediately.
        """
        final = Path(checkpoint_dir)
        aside = disk.saving_folder(final)
        self._make_room(aside, local_bytes(state))
        wait = not named.get("async_sharded_save")
        if wait:
            named |= {"async_sharded_save": True, "async_strategy": "mcore"}
        with write_failures(aside):
            request = write(state, str(aside), *rest, **named)
            if wait:
                _summing(request, write_and_sum, aside).execute_sync()
        if wait:
            return self._commit(aside, final)
        return self._with_commit(request, aside, final)

    def defer(self, error: OSError) -> None:
        """Defer an error of rank 0 while the others wait for it; all ranks raise it at the commit."""
        self._refused.append(error)

    def _make_room(self, aside: Path, tensor_bytes: int) -> None:
        """Create the folder to write in, if the data of all ranks fits on the disk."""
        total = torch.tensor([tensor_bytes], dtype=torch.int64, device="cuda")
        dist.all_reduce(total)

        def prepare() -> None:
            lacking = shortage(aside.parent, int(total.item()))
            if lacking:
                raise SaveFailedError(lacking)
            self._refused.clear()  # of a save that failed before its commit
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

        on_rank(0, prepare)

    def _with_commit(self, request: Any, aside: Path, final: Path) -> Any:
        """Return an asynchronous request whose writers compute checksums, and that ends with the commit."""

        def finish() -> None:
            with write_failures(aside):
                for step in request.finalize_fns:
                    step()
            self._commit(aside, final)

        return _summing(request, write_behind, aside)._replace(finalize_fns=[finish])

    def _commit(self, aside: Path, final: Path) -> None:
        """Commit the checkpoint written in `aside` under the name `final`. All ranks have finished writing."""
        dist.barrier()
        on_rank(dist.get_world_size() - 1, self.sync_history)
        on_rank(0, lambda: self._publish(aside, final))
        self.saves.committed(step_of(final))

    def _publish(self, aside: Path, final: Path) -> None:
        """Write the manifest, sync, rename, and update the tracker; raise a deferred error of the disk first."""
        if self._refused:
            error = self._refused[0]
            self._refused.clear()
            raise error
        self.record_skips()
        step = step_of(final)
        disk.write_manifest(aside, step, collect_sums(aside))
        if final.exists():
            # An existing folder can only be unfinished (complete ones are never written again), or empty.
            if any(final.iterdir()):
                disk.set_aside(final.parent, step)
            else:
                final.rmdir()
        aside.rename(final)
        sync_folder(final.parent)
        disk.write_tracker(final.parent, step)


@contextmanager
def write_failures(aside: Path) -> Iterator[None]:
    """Convert the exception that Megatron raises on all ranks after a failed write on one of them."""
    try:
        yield
    except CheckpointException as error:
        ranks = ", ".join(map(str, error.failures))  # only rank 0 has them; the log has their errors
        raise SaveFailedError(f"writing failed on rank {ranks}{left_on(aside)}") from None
    except OSError as error:
        if dist.get_world_size() > 1:
            raise  # the other ranks have no error
        raise SaveFailedError(f"writing failed: {cause(error)}{left_on(aside)}") from None


def left_on(aside: Path) -> str:
    """Return the free space, for a message."""
    return f", with {byte_size(free_bytes(aside.parent))} free on the disk of {aside.parent}"


def _summing(request: Any, write_and_sum: Callable[..., None], aside: Path) -> Any:
    """Return the request with `write_and_sum` around its write; unchanged on a rank that writes nothing."""
    if request.async_fn is None:
        return request
    where = (str(aside), dist.get_rank(), dist.get_world_size())
    return request._replace(async_fn=functools.partial(write_and_sum, request.async_fn, *where))


def write_behind(write: Callable[..., None], aside: str, rank: int, world: int, *args: Any) -> None:
    """Write in a background process: Megatron's write, then the checksums of its files."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, max(WRITER_NICE, os.getpriority(os.PRIO_PROCESS, 0)))
    write_and_sum(write, aside, rank, world, *args)


def write_and_sum(write: Callable[..., None], aside: str, rank: int, world: int, *args: Any) -> None:
    """Write with Megatron's function, then compute the sums of the written files.

    Args:
        write: called with `args`; the queue among them receives the results.
        aside: the folder that it writes to.
    """
    results = [Results(one) if hasattr(one, "put") else one for one in args]
    write(*results)
    places: dict[str, list[tuple[int, int]]] = {}
    for one in results:
        if isinstance(one, Results):
            places |= one.places
    write_sums(Path(aside), rank, world, places)


class Results:
    """A writer's queue, which also records the places of the items: (offset, length) by file."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue
        self.places: dict[str, list[tuple[int, int]]] = {}

    def put(self, results: Any) -> None:
        """Pass on the results by bucket, or an error; for results in another form, only files are summed."""
        self.queue.put(results)
        with suppress(AttributeError, TypeError):
            for written in results.values():
                for place in [one.storage_data for one in written]:
                    self.places.setdefault(place.relative_path, []).append((place.offset, place.length))


def write_sums(aside: Path, rank: int, world: int, places: Mapping[str, list[tuple[int, int]]]) -> None:
    """Write the checksums of this rank's files for rank 0, which computes missing ones itself.

    Args:
        places: the places of each file's items, see `disk.sum_file`.
    """
    with suppress(OSError):
        names = [path.name for path in aside.iterdir() if path.suffix == ".distcp"]
        mine = disk.share_of(rank, world, names)
        sums = {name: disk.sum_entry(disk.sum_file(aside / name, places.get(name, ()))) for name in mine}
        atomic_write_text(aside / f"{SUMS}{rank}", json.dumps(sums))


def collect_sums(aside: Path) -> dict[str, FileSum]:
    """Return the checksums of all files: those written by the ranks; other files (metadata) are summed and
    synced now.
    """
    sums: dict[str, FileSum] = {}
    for path in sorted(aside.glob(f"{SUMS}*")):
        sums |= {name: disk.file_sum(name, entry) for name, entry in read_object(path).items()}
        path.unlink()
    for path in sorted(aside.iterdir()):
        if path.name not in sums:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            sums[path.name] = disk.sum_file(path)
    return sums


def on_rank(rank: int, act: Callable[[], None]) -> None:
    """Call a function on one rank while the others wait.

    Raises:
        SaveFailedError: on all ranks, if the function meets a full or broken disk.
    """
    outcome: list[str | None] = [None]
    if dist.get_rank() == rank:
        try:
            act()
        except SaveFailedError as error:
            outcome = [str(error)]
        except OSError as error:
            what = cause(error)
            outcome = [f"{what}: {error.filename}" if error.filename else what]
    dist.broadcast_object_list(outcome, src=rank)
    if outcome[0] is not None:
        raise SaveFailedError(outcome[0])


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint folder."""
    return int(folder.name.removeprefix("iter_"))


FALLBACKS = 2  # newest checkpoints that retention keeps: one more than necessary, in case of damage


class SaveFailedError(Exception):
    """A checkpoint could not be written; raised on all ranks. The text gives the reason."""


class Saves:
    """The checkpoints of this process's run.

    Args:
        root: the run's checkpoint folder.
        keep: steps whose checkpoints are never removed.
        branch_points: the subset that other runs start from.
        retain_interval: of the other checkpoints except the newest two, only multiples of this are kept; None: all.
        existing: steps whose checkpoints existed at the start.
        earlier: the `retain_interval` of earlier starts; checkpoints that one of them kept are not removed now.
    """

    def __init__(
        self,
        root: Path,
        keep: frozenset[int],
        branch_points: frozenset[int],
        retain_interval: int | None,
        existing: Iterable[int],
        earlier: Iterable[int | None] = (),
    ) -> None:
        self.root = root
        self.keep = keep
        self.branch_points = branch_points
        self.retain_interval = retain_interval
        self.steps = sorted(existing)
        self.under_way: list[int] = []
        self.failed_last = False
        intervals = list(earlier)
        left = [step for step in self.steps if not any(retained(step, interval) for interval in intervals)]
        self._removable = left[-FALLBACKS:]

    def is_due(self, step: int, interval: int | None, last_step: int) -> bool:
        """Return whether `step` must be saved and Megatron does not: it saves multiples of its interval and
        the last step.
        """
        regular = interval and step % interval == 0
        return step in self.keep and not regular and step < last_step

    def begin(self, step: int) -> bool:
        """Record the start of a save; return False if that step is saved already or is being saved."""
        if step in self.steps or step in self.under_way:
            return False
        self.under_way.append(step)
        return True

    def committed(self, step: int) -> None:
        """Record that the checkpoint of `step` is complete; remove those that retention does not keep."""
        self.under_way = [other for other in self.under_way if other != step]
        self.failed_last = False
        self.steps.append(step)
        self._removable.append(step)
        old, self._removable = self._removable[:-FALLBACKS], self._removable[-FALLBACKS:]
        if self.retain_interval is None or not on_rank_0():
            return
        going = [old_step for old_step in old if not self.is_kept(old_step)]
        threading.Thread(target=self._remove, args=(going,), name="retention").start()

    def is_kept(self, step: int) -> bool:
        """Return whether retention always keeps `step`."""
        return step in self.keep or retained(step, self.retain_interval)

    def failed(self, step: int, reason: str) -> None:
        """Print that the checkpoint of `step` could not be saved, and continue.

        Raises:
            TrainingStoppedError: other runs start from that checkpoint, which would be lost if the training continued.
        """
        self.under_way = [other for other in self.under_way if other != step]
        self.failed_last = True
        if on_rank_0():
            self.discard(step)
        newest = f"the newest one is of step {self.steps[-1]}" if self.steps else "there is none yet"
        message = f"{self.root}: the checkpoint of step {step} could not be saved: {reason}; {newest}."
        if step in self.branch_points:
            raise TrainingStoppedError(
                f"{message} Other runs start from step {step}, so the training stops here. Make room "
                "and call again."
            )
        if on_rank_0():
            warn(f"{message} The training continues and tries again at its next save.")

    def discard(self, step: int) -> None:
        """Remove the files of a failed save, and the empty folder that Megatron created for it."""
        folder = disk.checkpoint_folder(self.root, step)
        shutil.rmtree(disk.saving_folder(folder), ignore_errors=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def _remove(self, steps: list[int]) -> None:
        for step in steps:
            try:
                disk.remove(self.root, step)
            except OSError as error:
                warn(f"{self.root}: step {step}: {error}")


def retained(step: int, interval: int | None) -> bool:
    """Return whether `--save-retain-interval` keeps a step; with None or 0 all are kept."""
    return not interval or step % interval == 0


def on_rank_0() -> bool:
    """Return whether this is rank 0."""
    return int(os.environ.get("RANK", "0")) == 0

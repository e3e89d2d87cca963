"""How far one start of a training has come, from the run's files before and after."""

from __future__ import annotations

from megatron_lrpath.launch.records import HistoryTail
from megatron_lrpath.launch.tasks import Task
from megatron_lrpath.training.checkpoints.on_disk import latest_step


class Progress:
    """To be made before the start; `start` is the step that it starts from."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._before = self._signature()
        self.start = self.checkpoint()

    def checkpoint(self) -> int:
        """The newest complete checkpoint's step; the run's first step where there is none."""
        return max(latest_step(self._task.checkpoints) or 0, self._task.run.first_step)

    def last_step(self) -> int:
        """The last step that this start has logged; where it came to none, the step it started from."""
        if self._signature() == self._before:
            return self.start  # what stands in the history is an earlier start's
        tail = HistoryTail(self._task.folder / "history.jsonl")
        tail.poll()
        return max(tail.last.step, self.start) if tail.last else self.start

    def _signature(self) -> tuple[int, int, int]:
        try:
            about = (self._task.folder / "history.jsonl").stat()
        except OSError:
            return (0, 0, 0)
        return about.st_ino, about.st_size, about.st_mtime_ns

"""What the job of a training does for those that wait for it: let them start, or hold them with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_lrpath.launch.slurm import commands
from megatron_lrpath.launch.slurm.ledger import MARK, Entry, Ledger, dependents
from megatron_lrpath.training.checkpoints.on_disk import checkpoint_complete


@dataclass
class Chain:
    """The jobs that wait for job `number`, which trains `key` into `checkpoints`."""

    ledger: Ledger
    key: str
    number: int
    checkpoints: Path
    _released: set[int] = field(default_factory=set)

    def release(self) -> list[Entry]:
        """Let the branches start whose checkpoint is complete, and return them.

        Each is tried until it succeeds: while the controller does not answer nothing is lost, the next call
        tries again, and a branch starts at the latest when this job ends.
        """
        ready = [
            entry
            for entry in self.ledger.entries()
            if entry.parent == self.key
            and entry.number not in self._released
            and checkpoint_complete(self.checkpoints, entry.parent_step)
        ]
        if not ready:
            return []
        waiting = {number for number, job in commands.queue().items() if job.state == "PENDING"}
        freed = []
        for entry in ready:
            if entry.number in waiting:
                commands.forget_dependency(entry.number)
                freed.append(entry)
            self._released.add(entry.number)
        return freed

    def hold_dependents(self, reason: str) -> list[Entry]:
        """Hold what cannot start any more because this job stops; branches whose checkpoint is there go on."""
        entries = self.ledger.entries()
        spared = {
            entry.number
            for entry in entries
            if entry.parent == self.key and checkpoint_complete(self.checkpoints, entry.parent_step)
        }
        queue = commands.queue()
        held = []
        for entry in dependents([one for one in entries if one.number not in spared], self.number):
            job = queue.get(entry.number)
            if job and job.state == "PENDING":
                commands.hold(entry.number, f"{MARK}held: {self.key} (job {self.number}) stopped: {reason}")
                held.append(entry)
        return held

"""Kills real trainings with SIGKILL at random moments until all runs of a plan are complete, and compares the ends.

`python -m tests.support.kill_harness --kills 300 --seed 7 FOLDER` is the long mode. Two kinds of kill take turns: from
outside at a random time, and from inside at a point of saving, committing, removing or loading. One run has two
ranks; one or both are killed.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from megatron_lrpath.runs import checkpoints as disk
from megatron_lrpath.runs.checkpoints import read_manifest, wrong_content, wrong_sizes
from tests.support.states import states
from tests.support.training_fixtures import Ranks, history, make_plan, run_words, train


@dataclass(frozen=True)
class Victim:
    """A run to kill: paradigm and name, number of ranks, whether it starts from a parent."""

    paradigm: str
    name: str
    ranks: int = 1
    from_parent: bool = False

    def __str__(self) -> str:
        return f"{self.paradigm}/{self.name}"


VICTIMS = (
    Victim("ours", "main"),
    Victim("ours", "branch-v2", from_parent=True),
    Victim("ptfs", "scratch-v1"),
    Victim("cpt", "continual-v2", ranks=2, from_parent=True),
)
LOADING = ("chosen", "loaded")
POINTS = ("written", "summed", "manifest", "renamed", "tracked", "removed", *LOADING)
ON_EVERY_RANK = ("written", "summed", "loaded")
SAVING = ("--save-interval", "2", "--save-retain-interval", "4")
PATIENCE = 120.0  # seconds for one start
LAUNCHER = 20.0  # seconds after which a launcher would end the other ranks of a dead one


@dataclass
class Harness:
    """Kills the runs of one plan.

    Attributes:
        folder: contains the plan's data; `whole` is the undisturbed output, `killed1` and so on the others.
        counts: kills by the point that they hit.
        spans: seconds that an undisturbed start of each run takes, the range of the random times.
    """

    folder: Path
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    spans: dict[Victim, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        make_plan(self.folder, (8, 8))
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir()

    def plan(self, name: str) -> Path:
        """Return the plan with the output folder `name`."""
        path = self.folder / f"{name}.yaml"
        keys = yaml.safe_load((self.folder / "plan.yaml").read_text()) | {"output": str(self.folder / name)}
        path.write_text(yaml.safe_dump(keys, sort_keys=False))
        return path

    def argv(self, output: str, victim: Victim) -> list[str]:
        """Return the command line of a run."""
        return run_words(self.plan(output), victim.paradigm, victim.name, *SAVING)

    def train_undisturbed(self) -> None:
        """Train all runs without kills, for comparison."""
        for victim in VICTIMS:
            begun = time.monotonic()
            train(self.argv("whole", victim), victim.ranks).ok()
            self.spans[victim] = time.monotonic() - begun

    def carry_out(self, kills: int) -> None:
        """Kill until there have been `kills`, in as many passes over the runs as that takes."""
        passes = 0
        while self.counts.total() < kills:
            passes += 1
            for number, victim in enumerate(VICTIMS):
                share = -(-(kills - self.counts.total()) // (len(VICTIMS) - number))
                self.finish_run(f"killed{passes}", victim, share)
            self.compare(f"killed{passes}")
        print(f"{self.counts.total()} kills in {passes} passes: {dict(self.counts)}", flush=True)
        left = sorted(str(path.relative_to(self.temporary)) for path in self.temporary.rglob("*"))
        assert not left, f"temporary files left behind: {left}"

    def finish_run(self, output: str, victim: Victim, kills: int) -> None:
        """Start a run, kill it up to `kills` times, then let it complete; the first load is always hit."""
        folder = self.folder / output / victim.paradigm / victim.name
        for number in range(kills):
            if (folder / "result.json").exists():
                return
            extra = self.random.choice(((), ("--async-save",)))
            argv = [*self.argv(output, victim), *extra]
            if victim.from_parent and number == 0:
                self.kill_inside(argv, victim, self.random.choice(LOADING), "first load from a parent: ")
            elif self.random.random() < 0.5:
                self.kill_inside(argv, victim, self.random.choice(POINTS))
            else:
                self.kill_outside(argv, victim)
            self.check_checkpoints(folder / "checkpoints")
        train(self.argv(output, victim), victim.ranks).ok()

    def kill_inside(self, argv: list[str], victim: Victim, point: str, label: str = "") -> None:
        """Start once, with a rank that kills itself at `point` if it reaches it."""
        rank = self.random.randrange(victim.ranks) if point in ON_EVERY_RANK else 0
        ranks = self.start(argv, victim, f"kill:{point}:{rank}")
        ranks.processes[rank].join(PATIENCE)
        self.bury(ranks, [rank], label + point)

    def kill_outside(self, argv: list[str], victim: Victim) -> None:
        """Start once and kill one of the ranks, or all at once, after a random time."""
        everybody = list(range(victim.ranks))
        killed = self.random.choice([everybody, [self.random.choice(everybody)]])
        ranks = self.start(argv, victim)
        ranks.processes[killed[0]].join(self.random.uniform(0.2, self.spans[victim]))
        for rank in killed:
            if ranks.processes[rank].is_alive():
                ranks.processes[rank].kill()
        self.bury(ranks, killed, "random time" if len(killed) == victim.ranks else "random time, one of two")

    def start(self, argv: list[str], victim: Victim, *faults: str) -> Ranks:
        """Start a run with faults."""
        faults = (*faults, f"tmp:{self.temporary}", "session")
        return Ranks.start("tests.support.faults:main", [*faults, "--", *argv], victim.ranks)

    def bury(self, ranks: Ranks, killed: list[int], label: str) -> None:
        """Wait for the end of all ranks and of the processes that they started; count the kill if there was one."""
        deadline = time.monotonic() + LAUNCHER
        for process in ranks.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():  # without a rendezvous only the launcher would end the other ranks
                process.kill()
        outcome = ranks.outcome(timeout=0.1)
        allowed = (0, -9) if len(killed) == len(outcome.status) else (0, -9, 1)
        assert all(status in allowed for status in outcome.status), (
            f"{outcome.status}\n{outcome.output[-4000:]}"
        )
        assert outcome.output.count("Traceback (most") == 0, outcome.output[-4000:]
        if any(outcome.status[rank] == -9 for rank in killed):
            self.counts[label] += 1
        helpers = [helper for process in ranks.processes for helper in in_session(process.pid)]
        _, alive = psutil.wait_procs(helpers, timeout=20)
        assert not alive, f"left behind: {alive}"

    def check_checkpoints(self, root: Path) -> None:
        """Check that every folder that counts as a checkpoint is complete."""
        for step in disk.complete_steps(root):
            folder = disk.checkpoint_folder(root, step)
            sums = read_manifest(folder)
            assert not wrong_sizes(folder, sums)
            assert not wrong_content(folder, sums, sums)

    def compare(self, name: str) -> None:
        """Check that final states, histories and files equal the undisturbed ones."""
        for victim in VICTIMS:
            folders = [self.folder / output / victim.paradigm / victim.name for output in ("whole", name)]
            whole, killed = folders
            last = disk.latest_step(whole / "checkpoints")
            assert last is not None
            ends = states(*(disk.checkpoint_folder(one / "checkpoints", last) for one in folders))
            assert ends[0] == ends[1], f"{victim}: another end"
            assert steps(whole) == steps(killed), f"{victim}: another history"
        strays = files(self.folder / name) - files(self.folder / "whole")
        assert not strays, f"left behind {sorted(strays)}"


def in_session(leader: int) -> list[psutil.Process]:
    """Return the processes in the session of `leader`, which may have ended."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == leader:
                found.append(process)
    return found


def steps(folder: Path) -> list[tuple[float, ...]]:
    """Return step, rate, loss and gradient norm of every step."""
    return [tuple(line[key] for key in ("step", "lr", "loss", "grad_norm")) for line in history(folder)]


def files(output: Path) -> set[str]:
    """Return the files of all runs, without TensorBoard's (one a start) and those in checkpoints."""
    found = {path for path in output.rglob("*") if path.is_file()}
    return {
        str(path.relative_to(output))
        for path in found
        if "tensorboard" not in path.parts and not re.fullmatch(r"iter_\d{7}", path.parent.name)
    }


def main() -> None:
    """Run the long mode."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {args.seed}", flush=True)
    harness = Harness(args.folder, args.seed)
    harness.train_undisturbed()
    begun = time.monotonic()
    harness.carry_out(args.kills)
    print(f"{time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()

"""Kills real trainings with SIGKILL at random moments until all runs of a plan are complete, and compares the ends.

`python -m tests.kill_harness --kills 300 --seed 7 FOLDER` is the long mode. Two kinds of kill take turns: from
outside at a random time, and from inside at a point of saving, committing, removing or loading.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from megatron_lrpath.training.checkpoints import on_disk as disk
from megatron_lrpath.training.checkpoints.manifest import read_manifest, wrong_content, wrong_sizes
from tests.states import states
from tests.training_fixtures import CONTEXT, free_port, history, make_plan, rank_main, run_words, train

RUNS = (("ours", "main"), ("ours", "branch-v2"), ("ptfs", "scratch-v1"), ("cpt", "continual-v2"))
POINTS = ("written", "summed", "manifest", "renamed", "tracked", "removed", "chosen", "loaded")
SAVING = ("--save-interval", "2", "--save-retain-interval", "4")
PATIENCE = 120.0  # seconds for one start


@dataclass
class Harness:
    """Kills the runs of one plan.

    Attributes:
        folder: has the plan's data; `whole` is the undisturbed output, `killed` the other one.
        counts: kills by what they hit.
        span: seconds that an undisturbed start takes, the range of the random times.
    """

    folder: Path
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    span: float = 3.0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        make_plan(self.folder, (8, 8))

    def plan(self, name: str) -> Path:
        """The plan with the output folder `name`."""
        path = self.folder / f"{name}.yaml"
        keys = yaml.safe_load((self.folder / "plan.yaml").read_text()) | {"output": str(self.folder / name)}
        path.write_text(yaml.safe_dump(keys, sort_keys=False))
        return path

    def train_undisturbed(self) -> None:
        """What the others are compared with."""
        plan = self.plan("whole")
        for paradigm, run in RUNS:
            begun = time.monotonic()
            train(run_words(plan, paradigm, run, *SAVING)).ok()
            self.span = time.monotonic() - begun

    def carry_out(self, kills: int) -> None:
        """Kill until there have been `kills`, in as many passes over the runs as that takes."""
        passes = 0
        while self.counts.total() < kills:
            passes += 1
            for number, run in enumerate(RUNS):
                share = -(-(kills - self.counts.total()) // (len(RUNS) - number))
                self.finish_run(f"killed{passes}", run, share)
            self.compare(f"killed{passes}")
        print(f"{self.counts.total()} kills in {passes} passes: {dict(self.counts)}", flush=True)

    def finish_run(self, name: str, run: tuple[str, str], kills: int) -> None:
        """Start a run, kill it up to `kills` times, and let it end."""
        words = run_words(self.plan(name), *run, *SAVING)
        folder = self.folder / name / run[0] / run[1]
        for _ in range(kills):
            if (folder / "result.json").exists():
                return
            extra = self.random.choice(((), ("--async-save",)))
            self.start_and_kill([*words, *extra])
            self.check_checkpoints(folder / "checkpoints")
        train(words).ok()

    def start_and_kill(self, words: list[str]) -> None:
        """One start with one kill; counts it unless the run was over before."""
        inside = self.random.random() < 0.5
        point = self.random.choice(POINTS)
        delay = self.random.uniform(0.2, self.span)
        faults = [f"kill:{point}"] if inside else []
        log = Path(tempfile.gettempdir()) / f"lrpath-kill-{free_port()}.log"
        receiver, sender = CONTEXT.Pipe(duplex=False)
        target = ("tests.faults:main", [*faults, "--", *words], 0, 1, free_port(), None, log, sender)
        process = CONTEXT.Process(target=rank_main, args=target)
        process.start()
        sender.close()
        process.join(PATIENCE if inside else delay)
        helpers = psutil.Process(process.pid).children(recursive=True) if process.is_alive() else []
        if process.is_alive():
            process.kill()
            process.join()
        receiver.close()
        output = log.read_text(errors="replace") if log.exists() else ""
        log.unlink(missing_ok=True)
        assert process.exitcode in (0, -9), f"{words}: exit {process.exitcode}\n{output[-4000:]}"
        if process.exitcode == -9:
            self.counts[point if inside else "random time"] += 1
        _, alive = psutil.wait_procs(helpers, timeout=20)
        assert not alive, f"left behind: {alive}"

    def check_checkpoints(self, root: Path) -> None:
        """Whatever counts as a checkpoint is whole."""
        for step in disk.complete_steps(root):
            folder = disk.checkpoint_folder(root, step)
            sums = read_manifest(folder)
            assert not wrong_sizes(folder, sums)
            assert not wrong_content(folder, sums, sums)

    def compare(self, name: str) -> None:
        """The ends, histories and files equal the undisturbed ones."""
        for paradigm, run in RUNS:
            whole, killed = (self.folder / output / paradigm / run for output in ("whole", name))
            last = disk.latest_step(whole / "checkpoints")
            assert last is not None
            ends = states(*(disk.checkpoint_folder(one / "checkpoints", last) for one in (whole, killed)))
            assert ends[0] == ends[1], f"{paradigm}/{run}: another end"
            assert steps(whole) == steps(killed), f"{paradigm}/{run}: another history"
            strays = files(killed) - files(whole)
            assert not strays, f"{paradigm}/{run}: left behind {sorted(strays)}"


def steps(folder: Path) -> list[tuple[float, ...]]:
    """Step, rate, loss and gradient norm of every step."""
    return [tuple(line[key] for key in ("step", "lr", "loss", "grad_norm")) for line in history(folder)]


def files(folder: Path) -> set[str]:
    """The files of a run, but TensorBoard's (one a start) and checkpoints that only retention distinguishes."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {
        name
        for name in found
        if not name.startswith("tensorboard/")
        and not (
            name.startswith("checkpoints/iter_") and disk.SAVING not in name and disk.REMOVING not in name
        )
    }


def main() -> None:
    """The long mode."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {args.seed}", flush=True)
    harness = Harness(args.folder, args.seed)
    harness.train_undisturbed()
    harness.carry_out(args.kills)


if __name__ == "__main__":
    main()

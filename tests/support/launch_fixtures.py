"""A small plan, and `lrpath run` with a stand-in for training; as a script: `launch_fixtures.py PLAN 2`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_lrpath.launch.local import Options, carry_out
from megatron_lrpath.plan import Plan, load_plan
from megatron_lrpath.runs.tasks import Task, build_tasks

TRAINER = Path(__file__).with_name("fake_trainer.py")
PLAN = """\
name: small
seed: 1
model: tiny
schedule: {{style: cosine, max_lr: 1.0e-3, min_lr: 1.0e-4, warmup_steps: 2}}
alpha: 0.5
cpt_variant: reset-max
paradigms: [ours, ptfs, cpt]
batch: {{global_batch_size: 8, micro_batch_size: 4, seq_length: 32}}
tokenizer: {{type: SentencePieceTokenizer, model: data/tokenizer.model}}
data: {{slices: data/slices, valid: data/slices/valid}}
versions: {versions}
output: {output}
"""


def write_plan(folder: Path, versions: int = 3, steps: int = 10) -> Plan:
    """Write a plan of versions v1, v2, … of equal length, with its output in `folder`, and return it."""
    listed = ", ".join(f"{{name: v{number}, steps: {steps}}}" for number in range(1, versions + 1))
    path = folder / "plan.yaml"
    path.write_text(PLAN.format(versions=f"[{listed}]", output=folder / "out"))
    return load_plan(path)


def fake_command(plan: Plan, pace: float = 0.01, interval: int = 4) -> Callable[[Task], Sequence[str]]:
    """Return a function that returns the command of a pretended training, at `pace` seconds a step."""
    folders = {task.key: task.folder for task in build_tasks(plan, ("ours", "ptfs", "cpt"))}

    def command_for(task: Task) -> list[str]:
        run = task.run
        keep = ",".join(map(str, run.keep_steps))
        numbers = [str(run.first_step), str(run.last_step), str(interval)]
        parent = [f"{folders[task.parent]}/checkpoints/iter_{task.parent_step:07d}"] if task.parent else []
        return [sys.executable, str(TRAINER), str(task.folder), *numbers, keep, str(pace), *parent]

    return command_for


if __name__ == "__main__":
    the_plan = load_plan(Path(sys.argv[1]))
    grace, pace = float(os.environ.get("FAKE_GRACE", "3")), float(os.environ.get("FAKE_PACE", "0.01"))
    chosen = Options(jobs=int(sys.argv[2]), device="cpu", evaluate=False, grace=grace)
    sys.exit(carry_out(the_plan, chosen, fake_command(the_plan, pace)))

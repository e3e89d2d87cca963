"""A plan with comments and runs that look trained: histories, results, lineages, checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_lrpath.plan import Plan, Run, load_plan, run_identity
from megatron_lrpath.runs.checkpoints import checkpoint_folder, sum_files, write_manifest, write_tracker
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.runs.lineage import write_lineage
from megatron_lrpath.runs.results import write_result

PLAN = """\
# the model of our team
name: years
seed: 1234
model: tiny
schedule: {{style: cosine, max_lr: 1.0e-3, min_lr: 1.0e-4, warmup_steps: 2}}
alpha: 0.5
batch: {{global_batch_size: 4, micro_batch_size: 2, seq_length: 16}}
tokenizer: {{type: NullTokenizer, vocab_size: 120}}
data:
  slices: {folder}/data/slices
  valid: [{folder}/data/slices/valid, {folder}/data/slices/valid-v3]
versions:
  # the beginning
  - {{name: v1, steps: 20}}   # clean
  - name: v2
    steps: 20                # a longer one
  - {{name: v3, steps: 20}}   # from the new crawler
output: {folder}/runs
"""


def make_tree(folder: Path) -> Plan:
    """Make versions of 20 steps, branches from steps 10, 30 and 50; the main path is saved every 5 steps."""
    folder.mkdir(exist_ok=True)
    path = folder / "plan.yaml"
    path.write_text(PLAN.format(folder=folder))
    plan = load_plan(path)
    for run in plan.runs("ours"):
        parent = plan.parent_of(run) if run.parent else None
        train(plan, run, range(run.first_step + 5, run.last_step + 1, 5), parent)
    return plan


def again_and_again(make: Callable[[Path], Plan], folder: Path) -> Iterator[Plan]:
    """Yield the plan that `make` writes to a folder; restore the folder to that state each time."""
    make(folder / "tree")
    shutil.copytree(folder / "tree", folder / "kept")

    def plans() -> Iterator[Plan]:
        while True:
            yield load_plan(folder / "tree/plan.yaml")
            shutil.rmtree(folder / "tree")
            shutil.copytree(folder / "kept", folder / "tree")

    return plans()


def train(plan: Plan, run: Run, saves: Sequence[int], parent: Run | None = None) -> None:
    """Write the files of a complete training."""
    folder = RunFolder(plan.folder(run))
    root = folder.checkpoints
    root.mkdir(parents=True)
    origin = None
    if parent is not None and run.parent is not None:
        place = RunFolder(plan.folder(parent)).checkpoints
        origin = {
            "run": parent.name,
            "step": run.parent.step,
            "checkpoints": str(place),
            "fingerprint": "0" * 64,
        }
    write_lineage(folder.path, run_identity(plan, run), origin, run.first_step, 1, None, str(plan.path))
    rows = ({"step": step, "loss": 3.0} for step in range(run.first_step + 1, run.last_step + 1))
    folder.history.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in saves:
        save(root, step)
    write_result(folder.path, run, run.last_step)
    for place in (folder.path, root):
        (place / ".lock").touch()


def save(root: Path, step: int) -> None:
    """Write a checkpoint of a kilobyte."""
    folder = checkpoint_folder(root, step)
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(step.to_bytes(4, "little") * 250)
    write_manifest(folder, step, sum_files(folder))
    write_tracker(root, step)

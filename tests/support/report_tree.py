"""Make up a trained and evaluated run tree, for tests and for viewing the report without training.

By hand: `python tests/support/report_tree.py FOLDER` writes a plan of four versions and its runs below FOLDER.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lrpath.data.slice import Slice, SliceSource
from megatron_lrpath.plan import Plan, Run, load_plan, run_identity

PLAN = """\
name: made-up
seed: 1234
model: tiny
schedule: {{style: {style}, max_lr: 1.0e-3, min_lr: 1.0e-4, warmup_steps: {warmup}}}
alpha: 0.6
cpt_variant: reset-max
paradigms: [ours, ptfs, cpt]
batch: {{global_batch_size: 32, micro_batch_size: 8, seq_length: 256}}
tokenizer: {{type: SentencePieceTokenizer, model: data/tokenizer.model}}
data: {{slices: {folder}/slices, valid: {folder}/slices/valid}}
versions:
{versions}
output: {folder}/runs
"""
DOMAINS = {"2016": 0.12, "2019": 0.02, "2022": -0.03, "2025": -0.06}


def write_plan(
    folder: Path,
    versions: int = 4,
    steps: int = 60,
    warmup: int = 10,
    style: str = "cosine",
    name: str = "made-up",
) -> Plan:
    """Write a plan file to `folder`, with its data and output in the same folder, and return the plan."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(f"  - {{name: v{i}, steps: {steps}}}" for i in range(1, versions + 1))
    path = folder / "plan.yaml"
    path.write_text(PLAN.format(style=style, warmup=warmup, versions=lines, folder=folder))
    return load_plan(path)


def write_tree(plan: Plan, seed: int = 0, evaluate: bool = True) -> None:
    """Write all runs of all paradigms, complete; losses follow a scaling law with annealing."""
    rng = np.random.default_rng(seed)
    states: dict[tuple[str, str], Any] = {}
    for paradigm in ("ptfs", "cpt", "ours"):
        for run in plan.runs(paradigm):
            folder = Path(plan.folder(run))
            if run.same_as:
                states[paradigm, run.name] = states[run.same_as]
                folder.parent.mkdir(parents=True, exist_ok=True)
                target = plan.folder(plan.run(*run.same_as))
                folder.symlink_to(os.path.relpath(target, folder.parent), target_is_directory=True)
                continue
            begin = states[paradigm, run.parent.run][run.parent.step] if run.parent else None
            states[paradigm, run.name], rows = simulate(plan, run, begin, rng)
            write_run(plan, run, rows)
            if evaluate and run.kind != "main":
                tail = [row["loss"] for row in rows[-20:]]
                write_evaluation(folder, run, sum(tail) / len(tail) + 0.02)


def simulate(plan: Plan, run: Run, begin: Any, rng: np.random.Generator) -> Any:
    """Return for each step the state that a child continues from, and the run's history rows."""
    area, momentum, annealed, before = begin or (0.0, 0.0, 0.0, 0.0)
    scale = 60.0 / plan.versions[0].steps
    keep = 1 - 0.02 * scale
    states, rows = {run.first_step: begin}, []
    for step in range(run.first_step + 1, run.last_step + 1):
        rate = run.path.lr_at(step - 1)
        area += rate * scale
        momentum = keep * momentum + (max(before - rate, 0.0) if step < 40 else before - rate)
        annealed += momentum * scale
        before = rate
        states[step] = (area, momentum, annealed, before)
        smooth = 2.6 + 0.62 * (area + 2e-4) ** -0.29 * 0.62 - 4.5 * annealed
        rows.append(
            {
                "step": step,
                "consumed_samples": step * plan.batch.global_batch_size,
                "lr": rate,
                "loss": smooth + float(rng.normal(0, 0.035)),
                "grad_norm": 0.4 + float(rng.gamma(2, 0.05)),
                "seconds": 0.28 + float(rng.normal(0, 0.01)),
            }
        )
    return states, rows


def write_run(plan: Plan, run: Run, rows: Iterable[dict[str, Any]]) -> None:
    """Write history, result and lineage of a complete run."""
    folder, rows = Path(plan.folder(run)), list(rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = {"run": run.name, "paradigm": run.paradigm, "version": run.version, "step": run.last_step}
    (folder / "result.json").write_text(json.dumps(result | {"loss": rows[-1]["loss"]}))
    packages = {"python": "3.12.11", "megatron-lrpath": "0.1.0", "megatron-core": "0.19.2", "torch": "2.15.0"}
    start = {"time": "2026-11-23T16:40:10+00:00", "packages": packages, "git_commit": "4ae7163"}
    lineage = {"identity": run_identity(plan, run), "parent": None, "starts": [start]}
    (folder / "lineage.json").write_text(json.dumps(lineage))


def write_evaluation(folder: Path, run: Run, loss: float) -> None:
    """Write an evaluation on four domains."""
    domains = {name: score(loss + extra, 51_200) for name, extra in DOMAINS.items()}
    (folder / "eval.json").write_text(
        json.dumps({"step": run.last_step, **score(loss, 204_800), "domains": domains})
    )


def score(loss: float, tokens: int) -> dict[str, Any]:
    """Return a loss with its perplexity."""
    return {"loss": loss, "perplexity": math.exp(loss), "tokens": tokens}


def write_slices(plan: Plan) -> None:
    """Write a slice for each version and one for validation, of two domains."""
    folder = Path(plan.data.slices)
    for number, name in enumerate([*(version.name for version in plan.versions), "valid"]):
        documents = np.arange(9, dtype=np.int32)
        sources = tuple(
            SliceSource(folder / domain, f"{domain:0<64}", domain, documents, 300_000 + 7_000 * number * k)
            for k, domain in enumerate(("code", "docs"), start=1)
        )
        Slice(name, 1, sources).save(folder / f"{name}.slice")


if __name__ == "__main__":
    made = write_plan(Path(sys.argv[1]), steps=int(sys.argv[2]) if len(sys.argv) > 2 else 300, warmup=20)
    write_slices(made)
    write_tree(made)

"""Plan files for tests: a valid plan and changes to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_lrpath.plan import Plan, load_plan

SOUND = """\
name: quickstart
seed: 1234
model: tiny
schedule: {style: cosine, max_lr: 1.0e-3, min_lr: 1.0e-4, warmup_steps: 20}
alpha: 0.6
cpt_variant: reset-max
batch: {global_batch_size: 32, micro_batch_size: 8, seq_length: 256}
tokenizer: {type: SentencePieceTokenizer, model: data/tokenizer.model}
data: {slices: data/slices, valid: data/slices/valid}
versions:
  - {name: v1, steps: 100}
  - {name: v2, steps: 100}
output: runs/quickstart
"""


def versions(count: int, steps: int = 100) -> list[dict[str, Any]]:
    """Return `count` versions v1, v2, … of equal length."""
    return [{"name": f"v{number}", "steps": steps} for number in range(1, count + 1)]


def plan_with(folder: Path, **changes: Any) -> Plan:
    """Return the valid plan with these top-level keys changed; mappings are merged, None removes a key."""
    content = yaml.safe_load(SOUND)
    for key, value in changes.items():
        if value is None:
            content.pop(key)
        elif isinstance(value, dict) and isinstance(content.get(key), dict):
            content[key] = content[key] | value
        else:
            content[key] = value
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return load_plan(path)

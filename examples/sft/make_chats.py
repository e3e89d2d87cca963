#!/usr/bin/env python3
"""Write a small set of conversations about numbers, in the three forms that `lrpath sft` reads."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any


def conversation(generator: random.Random) -> dict[str, Any]:
    """Return one line: a chat of two turns, a prompt, or an instruction with its input."""
    one, other = generator.randint(1, 20), generator.randint(1, 20)
    form = generator.randrange(3)
    if form == 0:
        greater = f"{max(one, other)} is greater." if one != other else "They are equal."
        said = [
            ("user", f"Which is greater, {one} or {other}?"),
            ("assistant", greater),
            ("user", "And which is smaller?"),
            ("assistant", f"{min(one, other)} is smaller." if one != other else "Neither."),
        ]
        return {"messages": [{"role": role, "content": text} for role, text in said]}
    if form == 1:
        return {
            "prompt": f"Count from {one} to {one + 4}.",
            "completion": " ".join(map(str, range(one, one + 5))),
        }
    return {"instruction": "Say the number that follows.", "input": str(one), "output": str(one + 1)}


def main() -> None:
    """Write the lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("data/sft/chat.jsonl"))
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    generator = random.Random(args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(conversation(generator)) + "\n" for _ in range(args.count)]
    args.output.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()

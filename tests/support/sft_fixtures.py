"""A plan with fine-tuning on a few dozen small conversations, trained for real, and worker functions."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from tests.support import GOLDEN
from tests.support.training_fixtures import make_plan

TOKENIZER = {"type": "SentencePieceTokenizer", "model": str(GOLDEN / "sp.model")}
SFT = {
    "valid": 0.2,
    "epochs": 2,
    "max_lr": 0.02,
    "warmup_steps": 1,
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "seq_length": 96,
    "chat_template": "chatml",
    "special_tokens": ["<|im_start|>", "<|im_end|>"],
}


CHATS = 40


def conversations(count: int = CHATS) -> list[dict[str, Any]]:
    """Return sums in the three accepted forms, some with several answers."""
    generator = random.Random(3)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        one, other = generator.randint(1, 99), generator.randint(1, 99)
        if number % 3 == 0:
            messages = [
                ("system", "Be brief."),
                ("user", f"{one} and {other}?"),
                ("assistant", f"{one + other}."),
            ]
            messages += [("user", "Sure?"), ("assistant", "Yes \U0001f600.")] if number % 2 else []
            rows.append({"messages": [{"role": role, "content": text} for role, text in messages]})
        elif number % 3 == 1:
            rows.append({"prompt": f"Add {one} and {other}.", "completion": str(one + other)})
        else:
            rows.append({"instruction": "Add.", "input": f"{one} {other}", "output": f"It is {one + other}."})
    return rows


def write_lines(path: Path, rows: list[Any]) -> Path:
    """Write JSON lines, and strings unchanged; return `path`."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def sft_plan(folder: Path, **changes: Any) -> Path:
    """Make a plan of one version of 4 steps with a section `sft`; `changes` replace keys of that section."""
    data = write_lines(folder / "chat.jsonl", conversations())
    section = {"data": str(data)} | SFT | changes
    return make_plan(
        folder, (4,), tokenizer=TOKENIZER, sft={k: v for k, v in section.items() if v is not None}
    )


def changed(plan: Path, name: str, **keys: Any) -> Path:
    """Write another plan file next to it, with other top-level keys; return its path."""
    path = plan.with_name(f"{name}.yaml")
    path.write_text(yaml.safe_dump(yaml.safe_load(plan.read_text()) | keys, sort_keys=False))
    return path


def prepare(argv: list[str]) -> None:
    """Prepare a plan's data and exit with the command's status."""
    from megatron_lrpath.cli import main

    raise SystemExit(main(["sft", argv[0], "--prepare", "--workers", "1"]))


def record_rows(argv: list[str]) -> None:
    """Train, and write every micro-batch (without its mask) to the file `argv[0]`."""
    from megatron_lrpath.training import forward, pretrain

    original, seen = forward.packed_batch, []

    def packed_batch(iterator: Any) -> Any:
        batch = original(iterator)
        seen.append({name: batch[name].tolist() for name in ("tokens", "labels", "loss_mask")})
        Path(argv[0]).write_text(json.dumps(seen))
        return batch

    forward.packed_batch = packed_batch
    pretrain.main(argv[1:])


def packed_against_alone(argv: list[str]) -> None:
    """Write to `argv[0]` the differences between logits of packed examples and of each example alone.

    `together` with the mask, `leaking` without it, `disturbed` with the tokens of all other examples changed.
    """
    import torch
    from megatron.core import mpu  # noqa: F401

    from megatron_lrpath.evaluate import perplexity
    from megatron_lrpath.plan import load_plan
    from megatron_lrpath.runs.results import Target
    from megatron_lrpath.sft.dataset import build_packed
    from megatron_lrpath.sft.prepared import open_prepared
    from megatron_lrpath.training import seams, setup
    from megatron_lrpath.training.forward import apart
    from megatron_lrpath.training.session import Session

    session = Session("cpu")
    seams.apply(session)
    plan = load_plan(argv[1])
    run = plan.run("ours", "sft-v1")
    run_argv = ["--plan", argv[1], "--paradigm", "ours", "--run", "sft-v1", "--device", "cpu"]
    args = setup.arguments(session, run_argv)
    model, _ = perplexity.build(session, plan, args)
    assert perplexity.load_weights(plan, Target(run), args, model)
    model[0].eval()
    row = {name: value[None] for name, value in build_packed(open_prepared(plan, True), 8)[0].items()}

    def logits(tokens: Any, positions: Any, mask: Any) -> Any:
        with torch.no_grad():
            return model[0](tokens, positions, mask)[0]

    def farthest(results: Any) -> float:
        return max(float((one - other).abs().max()) for one, other in results)

    segments = row["segments"][0]
    parts = [segments == number for number in range(1, int(segments.max()) + 1)]
    tokens, positions, mask = row["tokens"], row["position_ids"], apart(row["segments"])
    packed, leaking = logits(tokens, positions, mask), logits(tokens, positions, None)
    alone = [logits(tokens[:, part], positions[:, part], None) for part in parts]
    disturbed = []
    for part in parts:
        others = torch.where(part, tokens, (tokens + 7) % 600)
        disturbed.append(logits(others, positions, mask)[part])
    found = {
        "examples": len(parts),
        "together": farthest((packed[part], one) for part, one in zip(parts, alone, strict=True)),
        "leaking": farthest((leaking[part], one) for part, one in zip(parts, alone, strict=True)),
        "disturbed": farthest((packed[part], one) for part, one in zip(parts, disturbed, strict=True)),
        "largest": float(packed.abs().max()),
    }
    Path(argv[0]).write_text(json.dumps(found))


def export(argv: list[str]) -> None:
    """Export the checkpoint `argv[0]` to `argv[1]`, all rows of the embeddings included."""
    from megatron_lrpath.export.card import Origin
    from megatron_lrpath.export.folder import Wishes, export_checkpoint

    export_checkpoint(Path(argv[0]), Path(argv[1]), Origin(1), Wishes(vocab_size=640, force=True))

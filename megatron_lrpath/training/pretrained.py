"""A run without a parent may start from given weights (`--pretrained-checkpoint`): check whose they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.training.branch import MODEL_ARGUMENTS, query_groups
from megatron_lrpath.training.checkpoints.on_disk import TRACKER, checkpoint_folder

# What a training decides for itself, whatever the weights were trained with.
FREE = ("seq_length", "global_batch_size", "vocab_size")
RELEASE = "release"


def weights_folder(root: Path) -> Path:
    """The folder of the checkpoint that the tracker file in `root` names, as Megatron finds it.

    Raises:
        UserError: there is none.
    """
    try:
        word = (root / TRACKER).read_text(encoding="ascii").strip()
        folder = root / RELEASE if word == RELEASE else checkpoint_folder(root, int(word))
    except (OSError, ValueError):
        raise UserError(
            f"{root}: not a folder of Megatron checkpoints ({TRACKER} is missing or unreadable); "
            "tools/import_hf.py writes one from a Hugging Face folder."
        ) from None
    if not (folder / ".metadata").is_file():
        raise UserError(f"{folder}: the checkpoint that {root / TRACKER} names is not there.")
    return folder


def is_pretrained(root: str) -> bool:
    """Whether `root` is the folder of the weights that this process's run starts from."""
    from megatron.training import get_args

    given = get_args().pretrained_checkpoint
    return given is not None and Path(given) == Path(root)


def check_pretrained(args: Any) -> None:
    """Refuse weights of another model, before they are read, and to write into their folder.

    Raises:
        UserError: which arguments differ, or that the folders are one.
    """
    from megatron.core import dist_checkpointing

    if args.save and Path(args.save).resolve() == Path(args.pretrained_checkpoint).resolve():
        raise UserError(
            f"--save {args.save} is the folder of the weights to start from, which a run only reads."
        )
    folder = weights_folder(Path(args.pretrained_checkpoint))
    stored = dist_checkpointing.load_common_state_dict(str(folder))["args"]
    wrong = [
        f"{name} is {getattr(stored, name)} there and {getattr(args, name)} here"
        for name in (*MODEL_ARGUMENTS, "layernorm_epsilon", "use_rope_scaling")
        if name not in FREE and hasattr(stored, name) and getattr(args, name, None) != getattr(stored, name)
    ]
    if query_groups(stored) != query_groups(args):
        wrong.append(f"it has {query_groups(stored)} query groups, this run {query_groups(args)}")
    if wrong:
        raise UserError(
            f"{folder}: the weights to start from belong to another model: {'; '.join(wrong)}. Take over the "
            "`model` settings that were written beside them (plan.yaml), or leave --pretrained-checkpoint "
            "out."
        )

"""The identity of a run by --lr-path: from its arguments, or from a checkpoint of an older version without a
lineage.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from megatron_lrpath.plan.arguments import START, find, is_neutral
from megatron_lrpath.plan.identity import argument_identity
from megatron_lrpath.runs.checkpoints import files_fingerprint
from megatron_lrpath.runs.lineage import differences
from megatron_lrpath.schedule import LRPath
from megatron_lrpath.training.options.classes import neutral_names

DATA = frozenset({"data_path", "train_data_path", "valid_data_path", "test_data_path"})
FILES = frozenset(
    {"tokenizer_model", "vocab_file", "merge_file", "data_args_path", "per_split_data_args_path"}
)
COVERED = (
    frozenset(
        {"plan", "paradigm", "run", "device", "checkpoint_check", "peak_tflops", "save", "load", "help"}
        | {"rank_timeout", "gpu_kernels"}
    )
    | {"ckpt_step", "finetune", "no_load_optim", "no_load_rng"}  # where a run starts
    | {"lr", "min_lr", "lr_warmup_iters", "train_iters", "lr_path"}  # in `path`
    | {"weight_decay", "start_weight_decay", "end_weight_decay", "weight_decay_incr_style"}
    | {"global_batch_size", "seq_length"}  # in `batch`
)
"""Arguments that the identity holds in another form, or that say where a run starts (its parent is compared too)."""
STABLE = DATA | frozenset(
    [
        "seed",
        "split",
        "optimizer",
        "adam_beta1",
        "adam_beta2",
        "adam_eps",
        "sgd_momentum",
        "clip_grad",
        "decoupled_lr",
        "decoupled_min_lr",
        "bf16",
        "fp16",
        "init_method_std",
        "attention_dropout",
        "hidden_dropout",
        "dataloader_type",
        "tokenizer_type",
        "tokenizer_model",
        "vocab_size",
        "eod_mask_loss",
        "reset_position_ids",
        "reset_attention_mask",
    ]
)
"""Arguments that Megatron's validation leaves as they were given, whatever the layout and the device."""


def identity_of(args: Namespace, path: LRPath, parser: ArgumentParser) -> dict[str, Any]:
    """Return the identity of the run that `args` describe, before Megatron validates them.

    An explicit default counts as omitted.

    Args:
        args: Megatron's arguments.
        path: the run's learning rate, positions in steps.
        parser: Megatron's, with all groups of the script.
    """
    neutral = neutral_names(vars(args))
    arguments = {
        name: value
        for name, default in compared(parser)
        if name not in neutral
        if tells(name, args) and (value := plain(name, getattr(args, name, None))) != plain(name, default)
    }
    batch = {"global_batch_size": args.global_batch_size, "seq_length": args.seq_length}
    return argument_identity(args.lr_path, path, batch, weight_decay(args), arguments)


def compared(parser: ArgumentParser) -> Iterator[tuple[str, Any]]:
    """Return name and default of the arguments that an identity has unchanged."""
    options: dict[str, set[str]] = {}
    for action in parser._actions:
        words = {word.lstrip("-").replace("-", "_") for word in action.option_strings}
        options.setdefault(action.dest, {action.dest}).update(words)
    for name, words in options.items():
        argument = find(name)
        is_covered = name in COVERED or name.startswith("lr_path_")
        only_starts = argument is not None and argument.path == START
        if not is_covered and not only_starts and not any(is_neutral(word) for word in words):
            yield name, parser.get_default(name)


def tells(name: str, *sides: Namespace) -> bool:
    """Return whether an argument matters: the spike detector's only if one of the sides skips updates."""
    return not name.startswith("loss_spike_") or any(
        getattr(side, "loss_spike_action", None) == "skip" for side in sides
    )


def plain(name: str, value: Any) -> Any:
    """Return a value in JSON; files are represented by their content, so that they can be moved."""
    if name in DATA and value:
        words = value if isinstance(value, list | tuple) else [value]
        return [data_word(str(word)) for word in words]
    if name in FILES and value and Path(value).is_file():
        return f"{Path(value).name} ({files_fingerprint([Path(value)])[:16]})"
    return json.loads(json.dumps(value, default=str))


def data_word(word: str) -> str:
    """Return a word of --data-path: an indexed dataset by its name and content, other words unchanged."""
    pair = [Path(word + ending) for ending in (".bin", ".idx")]
    if not all(path.is_file() for path in pair):
        return word
    return f"{Path(word).name} ({files_fingerprint(pair)[:16]})"


def weight_decay(args: Namespace) -> dict[str, Any]:
    """Return the weight decay of a run; an increase with its length in steps."""
    style = args.weight_decay_incr_style
    if style == "constant":
        return {"constant": args.weight_decay}
    start, end = args.start_weight_decay, args.end_weight_decay
    return {"style": style, "start": start, "end": end, "steps": args.train_iters}


def differences_from_checkpoint(
    common: dict[str, Any], args: Namespace, path: LRPath, given: Collection[str]
) -> list[str]:
    """Return the differences between this run and the one that saved a checkpoint without a lineage.

    Args:
        common: the content of the checkpoint without its tensors: arguments, and the learning-rate path, unless plain
            Megatron saved it.
        args: Megatron's arguments of this run, validated like those of the checkpoint.
        path: this run's learning rate, positions in steps.
        given: the arguments of this run's identity.
    """
    stored, record = common["args"], (common.get("opt_param_scheduler") or {}).get("lr_path")
    path = path.scaled(args.global_batch_size)  # checkpoints have positions in samples
    names = [
        name
        for name in STABLE | set(given)
        if hasattr(stored, name) and tells(name, stored, args) and not moved(name, stored, args)
    ]
    sides = []
    for one, curve in ((stored, LRPath.from_dict(record) if record else path), (args, path)):
        kind = getattr(stored, "lr_path", None) or args.lr_path if one is stored else args.lr_path
        batch = {"global_batch_size": one.global_batch_size, "seq_length": one.seq_length}
        arguments = {name: plain(name, getattr(one, name, None)) for name in names}
        sides.append(argument_identity(kind, curve, batch, weight_decay(one), arguments))
    return differences(*sides)


def moved(name: str, stored: Namespace, args: Namespace) -> bool:
    """Return whether the stored data or files of an argument are missing, so that they cannot be compared."""
    if name not in DATA | FILES:
        return False
    value, own = getattr(stored, name), getattr(args, name, None)
    if not value or not own:
        return False
    words = value if isinstance(value, list | tuple) else [value]
    return all(data_word(str(word)) == str(word) and not Path(str(word)).is_file() for word in words)

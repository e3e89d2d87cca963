"""A run described by arguments alone (--lr-path and related options), for teams with their own scripts; its identity.

The identity is made of the arguments, or read from a checkpoint of an older version that has no lineage.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.files import length_problem
from megatron_lrpath.paradigms import LR_PATH_KINDS, path_form
from megatron_lrpath.plan.arguments import PATH, START, find, flag, is_neutral
from megatron_lrpath.plan.identity import argument_identity
from megatron_lrpath.plan.runs import run_path
from megatron_lrpath.runs.checkpoints import files_fingerprint
from megatron_lrpath.runs.lineage import differences
from megatron_lrpath.schedule import BatchSizes, LRPath
from megatron_lrpath.schedule.styles import KNOBS, Schedule
from megatron_lrpath.training.context import ParentCheckpoint, RunContext
from megatron_lrpath.training.options.arguments import (
    ArgumentsProvider,
    full_parser,
    neutral_names,
    raise_all,
    unclassified,
    word,
)


def results_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the explicit arguments that a run's result depends on, as JSON values."""
    kept = {name: given[name] for name in sorted(given) if belongs_to_result(name, given)}
    if given.get("loss_spike_action", "log") != "skip":
        kept = {name: kept[name] for name in kept if not name.startswith("loss_spike_")}
    return dict(json.loads(json.dumps(kept, default=str)))


def argument_context(
    args: Any, given: Mapping[str, Any], own: ArgumentsProvider | None = None
) -> RunContext | None:
    """Return the context of a run described by --lr-path and related options; None without --lr-path.

    `own` adds the arguments of a user's script to the parser.

    Raises:
        UserError: related options are missing or contradict each other.
    """
    if "lr_path" not in given:
        return None
    raise_all(incomplete(vars(args)))
    needs_parent = LR_PATH_KINDS[args.lr_path].needs_parent
    parent = ParentCheckpoint(args.lr_path_parent, args.lr_path_parent_step) if needs_parent else None
    first = parent.step if parent else 0
    last = args.train_iters if args.lr_path_decay_iters is None else first + args.lr_path_decay_iters
    args.train_iters = last
    kind, variant = args.lr_path, args.lr_path_cpt_variant
    warmup = (args.lr_warmup_iters or 0) if path_form(kind, variant)[1] else 0
    try:
        knobs = {name: getattr(args, f"lr_path_{name}") for name in KNOBS}
        schedule = Schedule(args.lr_path_style, args.lr, args.min_lr or 0.0, warmup, **knobs)
        path = run_path(schedule, kind, first, last, variant, args.lr_path_cycle_iters)
    except ValueError as error:
        raise UserError(f"--lr-path {args.lr_path}: {error}") from None
    return RunContext(
        kind=args.lr_path,
        path=path,
        sizes=BatchSizes.constant(args.global_batch_size),
        keep_steps=frozenset(args.lr_path_keep_steps),
        parent=parent,
        identity=identity_of(args, path, full_parser(own)),
        save=Path(args.save),
    )


def belongs_to_result(name: str, given: Mapping[str, Any]) -> bool:
    """Return whether an explicit argument belongs to the run's identity; foreign ones do unless declared
    neutral.
    """
    argument = find(name)
    if argument is None:
        return name not in neutral_names(given)
    return not is_neutral(name) and argument.path != START


def refuse_companions(given: Mapping[str, Any], others: Sequence[str] = ()) -> None:
    """Refuse arguments without an effect outside of --plan and --lr-path, and `others`.

    Raises:
        UserError: all of them, a line each.
    """
    raise_all(
        [
            *others,
            *(
                f"{flag(name)} {given[name]} names a run of a plan: give --plan too, or leave it out."
                if name in ("paradigm", "run")
                else f"{flag(name)} has no effect without --lr-path: add --lr-path, or leave it out."
                for name in given
                if name in ("paradigm", "run") or name.startswith("lr_path_")
            ),
        ]
    )


def refuse_with_path(
    given: Mapping[str, Any],
    own: ArgumentsProvider | None,
    others: Sequence[str] = (),
    later: Callable[[], Sequence[str]] | None = None,
) -> None:
    """Refuse arguments that a run by --lr-path does not allow, and `others`; for `later` see `raise_all`.

    Raises:
        UserError: all of them, a line each.
    """
    problems = [
        f"{word(name, value)} cannot be given with --lr-path; {argument.why(PATH)}."
        for name, value in given.items()
        if (argument := find(name)) is not None and argument.refuses(PATH, value)
    ]
    if given.get("load", given.get("save")) != given.get("save"):
        problems.append(
            f"--load {given['load']}: with --lr-path a run resumes from its --save, and starts from "
            "--lr-path-parent; leave --load out."
        )
    raise_all([*others, *problems, *unclassified(given, own)], later)


def incomplete(given: Mapping[str, Any]) -> list[str]:
    """Return the missing and contradicting arguments of a run by --lr-path, a line each.

    `given` are parsed arguments; omitted ones can be missing.
    """
    problems = []
    if not given.get("save"):
        problems.append("--lr-path needs --save, the folder of this run's own checkpoints.")
    elif problem := length_problem(given["save"]):
        problems.append(f"--save {given['save']}: {problem}.")
    problems += parent_problems(given) or end_problems(given)
    if given.get("lr") is None:
        problems.append("--lr-path needs --lr, the maximal learning rate.")
    if given.get("global_batch_size") is None:
        problems.append("--lr-path counts in steps of --global-batch-size: give it.")
    return problems


def parent_problems(given: Mapping[str, Any]) -> list[str]:
    """Return the problems of --lr-path-parent and --lr-path-parent-step."""
    kind = given["lr_path"]
    there = [given.get(name) is not None for name in ("lr_path_parent", "lr_path_parent_step")]
    if LR_PATH_KINDS[kind].needs_parent and not all(there):
        return [
            f"--lr-path {kind} needs --lr-path-parent (the parent's checkpoint folder) and "
            "--lr-path-parent-step (the step at which to leave it)."
        ]
    if not LR_PATH_KINDS[kind].needs_parent and any(there):
        return [f"--lr-path {kind} starts from random weights and takes no --lr-path-parent(-step)."]
    return []


def end_problems(given: Mapping[str, Any]) -> list[str]:
    """Return the problems of the run's last step, from --lr-path-decay-iters or --train-iters."""
    first = given.get("lr_path_parent_step") or 0
    length, end = given.get("lr_path_decay_iters"), given.get("train_iters")
    by_length = None if length is None else first + length
    if by_length is not None and end not in (None, by_length):
        return [
            f"--lr-path-decay-iters {length} ends the run at step {by_length}, --train-iters at {end}: "
            "give one of them."
        ]
    last = end if by_length is None else by_length
    if last is None or last <= first:
        return [f"the run must end after step {first}: give --train-iters or --lr-path-decay-iters."]
    return []


DATA = frozenset({"data_path", "train_data_path", "valid_data_path", "test_data_path"})
FILES = frozenset(
    {"tokenizer_model", "vocab_file", "merge_file", "data_args_path", "per_split_data_args_path"}
)
COVERED = (
    frozenset(
        {"plan", "paradigm", "run", "device", "checkpoint_check", "peak_tflops", "save", "load", "help"}
        | {"rank_timeout", "gpu_kernels"}
    )
    | {"ckpt_step", "finetune", "no_load_optim", "no_load_rng"}  # the start of a run
    | {"lr", "min_lr", "lr_warmup_iters", "train_iters", "lr_path"}  # in `path`
    | {"weight_decay", "start_weight_decay", "end_weight_decay", "weight_decay_incr_style"}
    | {"global_batch_size", "seq_length"}  # in `batch`
)
"""Arguments that the identity has in another form, or that set a run's start (its parent is compared)."""
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
"""Arguments that Megatron's validation does not change, at any layout and on any device."""


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
    """Yield name and default of the arguments that an identity has unchanged."""
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
    """Return the differences between this run and the run that saved a checkpoint without a lineage.

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

"""A run described by arguments alone (--lr-path and related options), for teams with their own scripts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.files import length_problem
from megatron_lrpath.paradigms import LR_PATH_KINDS, path_form
from megatron_lrpath.plan.arguments import PATH, START, find, flag, is_neutral
from megatron_lrpath.plan.runs import run_path
from megatron_lrpath.schedule import BatchSizes
from megatron_lrpath.schedule.styles import KNOBS, Schedule
from megatron_lrpath.training.context import ParentCheckpoint, RunContext
from megatron_lrpath.training.options.argument_identity import identity_of
from megatron_lrpath.training.options.arguments import ArgumentsProvider, full_parser, raise_all
from megatron_lrpath.training.options.classes import neutral_names, unclassified, word


def results_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the explicit arguments that a run's result depends on, as JSON values."""
    kept = {name: given[name] for name in sorted(given) if tells(name, given)}
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


def tells(name: str, given: Mapping[str, Any]) -> bool:
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

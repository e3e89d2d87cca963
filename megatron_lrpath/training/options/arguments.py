"""The argument group "learning-rate path switching", Megatron's parser with it, and the problems of a command line."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_lrpath.errors import UserError
from megatron_lrpath.paradigms import CPT_VARIANTS, LR_PATH_KINDS, PARADIGMS, RESET_MAX
from megatron_lrpath.plan.arguments import MEGATRON, PATH, find, flag, option_hint
from megatron_lrpath.schedule.styles import KNOBS, STYLES, Knob
from megatron_lrpath.training.gpu.measures import KERNELS, NONE
from megatron_lrpath.wording import nearest

EVERY_ARGUMENT = " (pretrain_gpt.py --help lists every argument)"


def read_early(argv: Sequence[str]) -> argparse.Namespace:
    """Return `device`, and `plan`, `paradigm` and `run` (None if they are not given); nothing is checked yet."""
    parser = OneLineParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--paradigm")
    parser.add_argument("--run", "--run-name", dest="run")
    try:
        return parser.parse_known_args(argv)[0]
    except UserError:  # the parser of all arguments reports it
        return parser.parse_args([])


def cycle(text: str) -> float:
    """Parse a cycle length: a number of steps, or `inf`."""
    return float("inf") if text == "inf" else float(int(text))


def add_lrpath_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group to Megatron's parser; the `extra_args_provider` of `parse_args`."""
    group = parser.add_argument_group("learning-rate path switching")
    group.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="plan file; with it the plan sets rates, steps, data and folders",
    )
    group.add_argument("--paradigm", choices=PARADIGMS, help="paradigm of the plan, with --plan")
    group.add_argument(
        "--run",
        "--run-name",
        dest="run",
        metavar="NAME",
        help="run of the paradigm, as `lrpath plan` lists them (torchrun takes --run for an option of its "
        "own unless the script is preceded by --; --run-name works everywhere)",
    )
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to train; auto: the GPU if there is one",
    )
    group.add_argument(
        "--lr-path",
        choices=tuple(LR_PATH_KINDS),
        help="which path this run is, without a plan: main (warm-up, then --lr forever), branch (a complete "
        "decay off a main path), scratch (warm-up and whole schedule), continual (from the end of an earlier "
        "version)",
    )
    group.add_argument("--lr-path-style", choices=tuple(STYLES), default="cosine", help="shape of the decay")
    group.add_argument(
        "--lr-path-parent",
        type=Path,
        metavar="DIR",
        help="branch, continual: the parent's checkpoint folder (--save)",
    )
    group.add_argument(
        "--lr-path-parent-step", type=int, metavar="STEP", help="the step at which to leave the parent"
    )
    group.add_argument(
        "--lr-path-decay-iters",
        type=int,
        metavar="STEPS",
        help="branch, continual: steps from the parent's step to the end, instead of --train-iters "
        "(the last step)",
    )
    group.add_argument(
        "--lr-path-cpt-variant",
        choices=tuple(CPT_VARIANTS),
        default=RESET_MAX.name,
        help="how a continual run takes up the rate",
    )
    group.add_argument(
        "--lr-path-cycle-iters",
        type=cycle,
        metavar="STEPS",
        help="length of the schedule's cycle when longer than the run, up to inf",
    )
    group.add_argument(
        "--lr-path-keep-steps",
        type=int,
        nargs="*",
        default=[],
        metavar="STEP",
        help="main: steps to save and never remove (the branch points of later runs)",
    )
    group.add_argument(
        "--lr-path-neutral",
        nargs="+",
        default=[],
        metavar="NAME",
        help="arguments of this script or of a fork of Megatron that leave the result of a run alone; others of "
        "theirs belong to the run, with --plan and with --lr-path",
    )
    for name, knob in KNOBS.items():
        group.add_argument(f"--lr-path-{name.replace('_', '-')}", help=knob.about, **knob_options(knob))
    group.add_argument(
        "--checkpoint-check",
        choices=("checksums", "sizes"),
        default="checksums",
        help="what of a checkpoint is compared with its manifest before it is loaded",
    )
    group.add_argument(
        "--peak-tflops",
        type=float,
        metavar="TFLOPS",
        help="peak rate of one device, for the model-FLOPs utilization (default: a known GPU's in bf16)",
    )
    group.add_argument(
        "--gpu-kernels",
        nargs="+",
        choices=(*KERNELS, NONE),
        metavar="NAME",
        help=f"kernels with fewer passes over memory on a GPU: {', '.join(KERNELS)}, or {NONE}; "
        "a kernel that cannot be used is refused (default with a plan or --lr-path: all that can be used; "
        "plain Megatron: none)",
    )
    group.add_argument(
        "--rank-timeout",
        type=float,
        default=30.0,
        metavar="MINUTES",
        help="how long a step may take before the run ends with the name of the rank that the others wait for "
        "(not counted: a start's first step, saves, evaluations); 0: forever",
    )
    spikes = parser.add_argument_group("loss spikes")
    spikes.add_argument(
        "--loss-spike-action",
        choices=("log", "skip", "off"),
        default="log",
        help="at a loss spike: log it with its samples, skip the update too, or do not look for spikes",
    )
    spikes.add_argument(
        "--loss-spike-threshold",
        type=float,
        default=10.0,
        metavar="DEVIATIONS",
        help="how far above the running median a spike is, in robust standard deviations",
    )
    spikes.add_argument(
        "--loss-spike-window", type=int, default=128, metavar="STEPS", help="steps of the running median"
    )
    spikes.add_argument(
        "--loss-spike-max-skips",
        type=int,
        default=3,
        metavar="STEPS",
        help="updates skipped in a row at most: after that the loss has changed for good",
    )
    return parser


def knob_options(knob: Knob) -> dict[str, Any]:
    """Return argparse's options for a parameter of a schedule style, from its schema in a plan file."""
    if knob.schema["type"] == "array":
        count, default = knob.schema["maxItems"], list(knob.default)
        return {"type": float, "nargs": count, "default": default, "metavar": "FRACTION"}
    if "enum" in knob.schema:
        return {"choices": knob.schema["enum"], "default": knob.default}
    return {"type": float, "default": knob.default}


class TolerantFormatter(argparse.HelpFormatter):
    """Escape a bare `%` in Megatron's help texts, on which argparse fails."""

    def _expand_help(self, action: argparse.Action) -> str:
        try:
            return super()._expand_help(action)
        except (ValueError, KeyError, TypeError):
            return action.help or ""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one message: Megatron's usage fills pages."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage and exiting."""
        raise UserError(f"{message}{EVERY_ARGUMENT}")


ArgumentsProvider = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]


def arguments_provider(own: ArgumentsProvider | None = None) -> ArgumentsProvider:
    """Return Megatron's `extra_args_provider`: this project's group, and a script's own arguments (its
    provider) after it.
    """

    def add(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        add_lrpath_arguments(parser)
        return own(parser) if own else parser

    return add


def full_parser(
    own: ArgumentsProvider | None = None, suppress_defaults: bool = False
) -> argparse.ArgumentParser:
    """Return Megatron's parser with this project's group and a script's own arguments.

    With `suppress_defaults` it returns only explicit arguments. Each parser is built once in a process.
    """
    return _built_parser(own, suppress_defaults)


@functools.cache  # building Megatron's parser takes a while, and a start reads several command lines
def _built_parser(own: ArgumentsProvider | None, suppress_defaults: bool) -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments  # after the choice of the device

    parser = OneLineParser(allow_abbrev=False, prog="pretrain_gpt.py", formatter_class=TolerantFormatter)
    arguments_provider(own)(add_megatron_arguments(parser))
    if suppress_defaults:
        for action in parser._actions:
            action.default = argparse.SUPPRESS
    return parser


def explicit_arguments(argv: list[str], own: ArgumentsProvider | None = None) -> dict[str, Any]:
    """Return the arguments that `argv` sets, by Megatron's destination names.

    Raises:
        UserError: all unknown arguments and invalid values, a line each.
    """
    given, problems = read_arguments(argv, own)
    raise_all(problems)
    return given


def read_arguments(
    argv: Sequence[str], own: ArgumentsProvider | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments that `argv` sets, and a line for each that the parser rejects.

    Prints the help for --help.
    """
    if "--help" in argv or "-h" in argv:
        full_parser(own).print_help()
        raise SystemExit(0)
    parser = full_parser(own, suppress_defaults=True)
    try:
        return vars(parser.parse_args(argv)), []
    except UserError as error:
        whole = str(error)
    given: dict[str, Any] = {}
    problems: list[str] = []
    for words in split_options(argv):
        try:
            known, unknown = parser.parse_known_args(words)
        except UserError as error:
            problems.append(str(error).removesuffix(EVERY_ARGUMENT))  # argument --NAME: …
            continue
        given |= vars(known)
        if unknown:
            option = unknown[0].partition("=")[0]
            problems.append(f"unrecognized arguments: {' '.join(unknown)}{option_hint(option)}")
    problems = list(dict.fromkeys(problems)) or [whole]
    return given, [*problems[:-1], problems[-1].removesuffix(EVERY_ARGUMENT) + EVERY_ARGUMENT]


def split_options(argv: Sequence[str]) -> list[list[str]]:
    """Split a command line into options, each with its values."""
    parts: list[list[str]] = []
    for word in argv:
        if word.startswith("--") or not parts:
            parts.append([])
        parts[-1].append(word)
    return parts


def raise_all(problems: Sequence[str], later: Callable[[], Sequence[str]] | None = None) -> None:
    """Raise one UserError with all problems, a line each; do nothing if there are none.

    `later` returns problems that a later check would find: they are added to the message, but raise nothing
    alone.
    """
    if problems and later is not None:
        problems = [*problems, *later()]
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError(f"{len(problems)} problems:\n" + "\n".join(f"- {problem}" for problem in problems))


def word(name: str, value: Any) -> str:
    """Return the name of an explicit argument for a message, with its value if only some values are refused."""
    argument = find(name)
    shown = argument is not None and (argument.allowed or argument.refused_values)
    return f"{flag(name)} {getattr(value, 'name', value)}" if shown else flag(name)


def default_problems(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Return the defaults of a script (Megatron's `args_defaults`) that a run with a path refuses, a line
    each.
    """
    return [
        f"{word(name, value)} among the script's args_defaults: {argument.why(PATH)}."
        for name, value in defaults.items()
        if name not in given and value not in (None, False)
        if (argument := find(name)) is not None and argument.refuses(PATH, value)
    ]


def neutral_names(given: Mapping[str, Any]) -> frozenset[str]:
    """Return the destinations in --lr-path-neutral."""
    return frozenset(name.lstrip("-").replace("-", "_") for name in given.get("lr_path_neutral", ()))


def unclassified(given: Mapping[str, Any], own: ArgumentsProvider | None) -> list[str]:
    """Return the problems of arguments that the table lacks, and of the names in --lr-path-neutral.

    A script's own arguments, and those that a fork adds to a Megatron of the table's version, belong to
    the run.
    """
    from megatron.core import __version__ as installed  # after the choice of the device

    problems = _wrong_neutral_names(given, own)
    others = [name for name in given if find(name) is None]
    if others and not f"{installed}.".startswith(f"{MEGATRON}."):
        ours = {action.dest for action in full_parser(own)._actions} - {
            action.dest for action in full_parser()._actions
        }
        problems += [
            f"{flag(name)}: this argument is not classified for Megatron {installed} (this "
            f"project knows {MEGATRON}), so that it is not known whether a result depends on it; leave it out."
            for name in others
            if name not in ours
        ]
    return problems


def _wrong_neutral_names(given: Mapping[str, Any], own: ArgumentsProvider | None) -> list[str]:
    named = neutral_names(given)
    if not named:
        return []
    theirs = {action.dest for action in full_parser(own)._actions if find(action.dest) is None} - {"help"}
    return [
        f"--lr-path-neutral {name}: an argument of Megatron's, which has its class already; leave it out."
        if find(name) is not None
        else f"--lr-path-neutral {name}: this script has no such argument{nearest(name, theirs)}."
        for name in sorted(named - theirs)
    ]

"""`lrpath generate`: continue a text by a trained version, or by several side by side."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from megatron_lrpath.commands.options import add_device, add_plan, count_from, number_in, paradigms_of
from megatron_lrpath.console import quiet, say
from megatron_lrpath.errors import UserError
from megatron_lrpath.paradigms import PARADIGMS

if TYPE_CHECKING:
    from pathlib import Path

    from megatron_lrpath.evaluate.generation import Sampling, Writer
    from megatron_lrpath.plan import Plan, Run

HELP = "continue a text with a trained version; --compare shows all versions side by side"
EXAMPLE = """lrpath generate examples/quickstart/plan.yaml --run branch-v3 "The first lines of"
  lrpath generate plan.yaml --compare --temperature 0 "The first lines of\""""
NARROWEST = 24  # characters of a column


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plan, the model, the text, and the sampling settings."""
    add_plan(parser)
    parser.add_argument(
        "text", nargs="+", metavar="TEXT", help="text to continue, one or several; `-`: stdin"
    )
    add_models(parser, "default: the newest trained version", "the trained versions")
    add_sampling(parser, 100)


def add_models(parser: argparse.ArgumentParser, default: str, all_of: str) -> None:
    """Add --run, --compare, --paradigm and --device."""
    parser.add_argument("--paradigm", choices=PARADIGMS, help="default: the first that has the run")
    parser.add_argument(
        "--run", action="append", metavar="NAME", help=f"the model; several are compared ({default})"
    )
    parser.add_argument("--compare", action="store_true", help=f"{all_of}, side by side")
    add_device(parser)


def add_sampling(parser: argparse.ArgumentParser, tokens: int) -> None:
    """Add --seed, --temperature, and --max-tokens with the default `tokens`."""
    parser.add_argument(
        "--seed", type=count_from(0), default=0, metavar="N", help="of the draws (default: 0)"
    )
    parser.add_argument(
        "--temperature",
        type=number_in(0, 100, "a temperature, from 0 to 100"),
        default=0.8,
        metavar="T",
        help="0: always the likeliest token (default: 0.8)",
    )
    parser.add_argument(
        "--max-tokens", type=count_from(1), default=tokens, metavar="N", help=f"at most (default: {tokens})"
    )


def execute(args: argparse.Namespace) -> int:
    """Print the models' continuations; return 0."""
    texts = [sys.stdin.read() if text == "-" else text for text in args.text]
    if not all(text.strip() for text in texts):
        raise UserError("the prompt is empty; give a text to continue.")
    models, sampling = opened(args, tuned=False), sampling_of(args)
    for text in texts:
        if len(models) == 1:
            print(text, end="", flush=True)
            models[0][1].text(text, sampling, show_piece)
            print()
        else:
            print(text)
            side_by_side({name: writer.text(text, sampling, ignore) for name, writer in models})
    return 0


def sampling_of(args: argparse.Namespace) -> Sampling:
    """Return the sampling settings in the options."""
    from megatron_lrpath.evaluate.generation import Sampling

    return Sampling(args.seed, args.temperature, args.max_tokens)


def show_piece(text: str) -> None:
    """Print a piece of an answer immediately."""
    print(text, end="", flush=True)


def ignore(text: str) -> None:
    """Ignore a piece: the complete text is printed later."""


def opened(args: argparse.Namespace, tuned: bool) -> list[tuple[str, Writer]]:
    """Load the selected models by name, after an export if necessary.

    Raises:
        UserError: there is none, or one cannot be exported.
    """
    quiet()
    from megatron_lrpath.data.record import require_tokenizer
    from megatron_lrpath.evaluate.generation import Writer, require_transformers
    from megatron_lrpath.plan import load_plan
    from megatron_lrpath.training.machine import choose_device

    require_transformers()
    plan = load_plan(args.plan)
    require_tokenizer(plan)
    runs = chosen(plan, args, tuned)
    device = choose_device(args.device)
    return [(run.key if len(runs) > 1 else run.name, Writer(export_of(plan, run), device)) for run in runs]


def chosen(plan: Plan, args: argparse.Namespace, tuned: bool) -> list[Run]:
    """Return the runs that the options select; with --compare all trained ones, without options the newest."""
    from megatron_lrpath.runs.results import is_complete, model_runs, nothing_there

    if args.run and args.compare:
        raise UserError(
            "--compare takes all trained versions: leave out --run, or name several by --run alone."
        )
    if args.run:
        found = []
        for name in dict.fromkeys(args.run):
            paradigm = paradigms_of(argparse.Namespace(paradigm=args.paradigm, run=name), plan)[0]
            found.append(plan.carried_out(plan.run(paradigm, name)))
        return found
    wanted = paradigms_of(argparse.Namespace(paradigm=args.paradigm, run=None), plan)
    runs = [
        run for run in model_runs(plan, wanted) if run.is_sft == tuned and is_complete(plan.folder(run), run)
    ]
    if not runs:
        what, command = ("fine-tuned", "sft") if tuned else ("trained", "run")
        note = " (the plan has no section `sft`: `lrpath docs sft`; without it `lrpath generate` continues a text)"
        raise nothing_there(
            plan, f"no version is {what} yet{note if tuned and plan.sft is None else ''}", command
        )
    if args.compare:
        return runs
    newest = [run for run in runs if run.paradigm == runs[0].paradigm][-1]
    say(f"{newest.key}, the newest (--run NAME chooses another)")
    return [newest]


def export_of(plan: Plan, run: Run) -> Path:
    """Return the model of the run's newest checkpoint as a Hugging Face folder."""
    import shlex

    from megatron_lrpath.commands.export import fetch_model, find_checkpoint
    from megatron_lrpath.export.folder import fresh_export, is_export_of
    from megatron_lrpath.runs.folder import RunFolder

    folder = RunFolder(plan.folder(run))
    if is_export_of(folder.exported, folder.path, run.last_step):
        return folder.exported  # the checkpoint may have been removed from the disk
    fetch_model(plan, run, None)
    step, _ = find_checkpoint(folder.checkpoints, None)
    if step != run.last_step:
        say(f"{run.name}: not trained to its end ({step:,} of {run.last_step:,} steps)")
    again = f"lrpath export {shlex.quote(str(plan.path))} --paradigm {run.paradigm} --run {run.name} --force"
    return fresh_export(plan, run, step, folder.exported, again)


def side_by_side(texts: dict[str, str]) -> None:
    """Print texts in columns, or one below another if the terminal is too narrow."""
    from rich.console import Console
    from rich.text import Text

    from megatron_lrpath.console import terminal_table

    console = Console(highlight=False)
    if console.width // len(texts) < NARROWEST:
        for name, text in texts.items():
            console.print(Text(f"{name}:", style="bold"))
            console.print(Text(text))
        return
    table = terminal_table(tuple(texts), "l" * len(texts), [tuple(texts.values())])
    for column in table.columns:
        column.ratio, column.overflow = (
            1,
            "fold",
        )  # fold a word that is longer than the column
    table.expand = True
    console.print(table)

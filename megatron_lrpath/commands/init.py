"""`lrpath init`: create a working folder without a checkout."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from megatron_lrpath.console import say, say_next
from megatron_lrpath.errors import UserError, cause
from megatron_lrpath.models import RECIPES

HELP = (
    "write a plan for existing slices (--slices), or copy the example plans and Slurm recipes into a folder"
)
EXAMPLE = """lrpath init --slices data/slices --tokenizer data/tokenizer.model --model 1.2b
  lrpath init my-model && cd my-model && lrpath plan examples/quickstart/plan.yaml"""
SCHEMA = Path("plan.schema.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folder, or the slices, the tokenizer and the model of a plan."""
    parser.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        nargs="?",
        help="made where it is not there; files that differ are kept (with --slices: where plan.yaml goes, default: .)",
    )
    group = parser.add_argument_group("a plan for your data")
    group.add_argument("--slices", type=Path, metavar="DIR", help="folder of slices; one version each")
    group.add_argument("--tokenizer", metavar="PATH", help="a SentencePiece model, or a Hugging Face folder")
    group.add_argument(
        "--model", choices=RECIPES, help="the recipe (default: the largest that has 20 tokens a parameter)"
    )


def execute(args: argparse.Namespace) -> int:
    """Write the missing files and print those that exist; or write a plan; return 0."""
    if args.slices is not None:
        return write_plan(args)
    if args.folder is None or args.tokenizer or args.model:
        raise UserError(
            "name a folder for the examples, or give --slices DIR --tokenizer PATH for a plan of your own"
        )
    from megatron_lrpath.plan import json_schema
    from megatron_lrpath.shipped import shipped_files

    contents = {place: path.read_bytes() for place, path in shipped_files().items()}
    contents[SCHEMA] = (json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n").encode()
    kept = []
    for path, data in ((args.folder / place, data) for place, data in contents.items()):
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            elif path.read_bytes() != data:
                kept.append(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({cause(error)}); name another folder") from None
    print(f"{args.folder}: {len(contents) - len(kept)} files (plans in examples/, Slurm recipes in slurm/)")
    for path in kept:
        print(f"kept as it is, since it differs: {path}")
    say_next(
        f"cd {shlex.quote(str(args.folder))} && python examples/quickstart/prepare.py && "
        "lrpath run examples/quickstart/plan.yaml"
    )
    return 0


def write_plan(args: argparse.Namespace) -> int:
    """Write `plan.yaml` for the slices and print the next commands; return 0."""
    from megatron_lrpath.data.draw import existing_slices
    from megatron_lrpath.data.first_plan import first_plan
    from megatron_lrpath.data.record import require_tokenizer
    from megatron_lrpath.data.slice import validation_path
    from megatron_lrpath.plan.file.load import plan_from
    from megatron_lrpath.plan.file.source import parse_source
    from megatron_lrpath.readiness.data import tokenizer_check
    from megatron_lrpath.readiness.finding import FAILED

    path = (args.folder or Path()) / "plan.yaml"
    if path.exists():
        raise UserError(f"{path}: exists already and is never overwritten; name another folder for the plan")
    if args.tokenizer is None:
        raise UserError("--slices needs --tokenizer PATH, the tokenizer that made the data")
    if not args.slices.is_dir():
        raise UserError(f"{args.slices}: there is no such folder; draw slices with tools/slice_versions.py")
    text = first_plan(
        existing_slices(args.slices), args.slices, args.tokenizer, args.model, path.resolve().parent.name
    )
    plan = plan_from(parse_source(path, text))
    tokenizer, _ = tokenizer_check(plan)
    if tokenizer.status == FAILED:
        raise UserError(f"--tokenizer {tokenizer.found}")
    require_tokenizer(plan)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another folder") from None
    steps = ", ".join(f"{version.name} {version.steps:,}" for version in plan.versions)
    quoted = shlex.quote(str(path))
    print(f"{path}: {plan.model.recipe}, steps by version: {steps}")
    if not validation_path(plan.data).exists():
        say(
            f"note: {args.slices} has no validation slice, which the evaluation needs: python "
            f"tools/slice_versions.py --source PREFIX --valid-tokens N --output {shlex.quote(str(args.slices))}"
        )
    say_next(", then ".join(f"lrpath {command} {quoted}" for command in ("plan", "run", "report")))
    return 0

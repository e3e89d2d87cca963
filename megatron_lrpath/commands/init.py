"""`lrpath init`: a folder to work in, where there is no checkout."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_lrpath.errors import UserError, cause

HELP = "write the example plans, the Slurm recipes and the plan's JSON schema into a folder"
EXAMPLE = "lrpath init my-model && cd my-model && lrpath plan examples/quickstart/plan.yaml"
SCHEMA = Path("plan.schema.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder."""
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="made where it is not there; files that differ are kept"
    )


def execute(args: argparse.Namespace) -> int:
    """Write what is missing, say what was kept; 0."""
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
    return 0

#!/usr/bin/env python3
"""Tokenize a delivery in shards, file by file, and merge them: what slurm/preprocess.sh runs in a job array.

The merged dataset has the bytes that one call of preprocess_data.py with all files would have written. Each step can
be called again: a shard that is whole is left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lrpath.console import ToolParser, run_tool
from megatron_lrpath.data.preprocess.readers import STDIN, expand_inputs
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_write_text, check_prefix
from megatron_lrpath.reading import read_object, why
from megatron_lrpath.wording import plural

LIST = "shards.json"
NONE = "none"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the tool's arguments."""
    parser = ToolParser(description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    prepare = steps.add_parser("prepare", help="share the files out; print the missing shards and the folder")
    prepare.add_argument("--shards", type=int, required=True, metavar="N", help="how many, at most")
    prepare.add_argument("arguments", nargs=argparse.REMAINDER, help="after --: those of preprocess_data.py")
    shard = steps.add_parser("shard", help="tokenize a shard, unless that is done")
    shard.add_argument("folder", type=Path)
    shard.add_argument("number", type=int)
    merge = steps.add_parser("merge", help="put the shards together, in the order of the files")
    merge.add_argument("folder", type=Path)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the step; return its exit status."""
    if args.step == "prepare":
        return prepare(args.shards, [word for word in args.arguments if word != "--"])
    delivery = read_delivery(args.folder)
    return (
        tokenize(args.folder, delivery, args.number) if args.step == "shard" else merge(args.folder, delivery)
    )


def prepare(count: int, arguments: Sequence[str]) -> int:
    """Write the list of shards, or check that an earlier call wrote the same one; return 0.

    Raises:
        UserError: the arguments do not suit, or the folder holds the shards of another delivery.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--input", nargs="+", required=True)
    parser.add_argument("--output-prefix", required=True)
    parser.add_argument("--json-keys", nargs="+", default=["text"])
    known, others = parser.parse_known_args(arguments)
    if count < 1:
        raise UserError("the number of shards must be at least 1")
    if "--overwrite" in others:
        raise UserError("--overwrite does not go with shards: remove the folder of the shards and the output")
    if STDIN in known.input:
        raise UserError("--input -: standard input cannot be shared out; name files")
    check_prefix(known.output_prefix)
    output = os.path.abspath(known.output_prefix)
    names = [os.path.abspath(name) for name in expand_inputs(known.input)]
    wanted = {
        "output": output,
        "keys": known.json_keys,
        "arguments": others,
        "shards": shared_out(names, count),
    }
    folder = Path(f"{output}.shards")
    file = folder / LIST
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, json.dumps(wanted, indent=1) + "\n")
    elif read_delivery(folder) != wanted:
        raise UserError(
            f"{folder}: holds the shards of other files or arguments; continue with those, or remove the folder"
        )
    missing = [n for n in range(len(wanted["shards"])) if not is_whole(folder, wanted, n)]
    print(ranges(missing) or NONE)
    print(folder)
    return 0


def shared_out(names: Sequence[str], count: int) -> list[list[str]]:
    """Return the files, in order, in at most `count` parts of about the same size in bytes."""
    sizes = [os.path.getsize(name) for name in names]
    whole = max(1, sum(sizes))
    parts: dict[int, list[str]] = {}
    before = 0
    for name, size in zip(names, sizes, strict=True):
        parts.setdefault(min(count - 1, (2 * before + size) * count // (2 * whole)), []).append(name)
        before += size
    return list(parts.values())


def ranges(numbers: Sequence[int]) -> str:
    """Return the numbers as `0-2,5`, the form of sbatch's --array."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def read_delivery(folder: Path) -> dict[str, Any]:
    """Return what `prepare` wrote.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return read_object(folder / LIST)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / LIST}: cannot be read ({why(error)}); call prepare again") from None


def prefix_of(folder: Path, number: int) -> Path:
    """Return the output prefix of a shard."""
    return folder / f"{number:05d}"


def is_whole(folder: Path, delivery: dict[str, Any], number: int) -> bool:
    """Return whether the shard is tokenized: its index files appear last."""
    return all(Path(f"{prefix_of(folder, number)}_{key}_document.idx").is_file() for key in delivery["keys"])


def tokenize(folder: Path, delivery: dict[str, Any], number: int) -> int:
    """Tokenize a shard with preprocess_data.py; return its exit status."""
    if not 0 <= number < len(delivery["shards"]):
        raise UserError(f"{folder}: there is no shard {number}, only {len(delivery['shards'])} from 0 on")
    if is_whole(folder, delivery, number):
        print(f"shard {number}: is whole already", flush=True)
        return 0
    argv = ["--input", *delivery["shards"][number], "--output-prefix", str(prefix_of(folder, number))]
    argv += ["--json-keys", *delivery["keys"], *delivery["arguments"]]
    if "--workers" not in argv:
        argv += ["--workers", os.environ.get("SLURM_CPUS_PER_TASK", "1")]
    return call("preprocess_data", argv)


def merge(folder: Path, delivery: dict[str, Any]) -> int:
    """Merge the shards of every key that is not merged yet; return the exit status.

    Raises:
        UserError: shards are missing.
    """
    count = len(delivery["shards"])
    missing = [number for number in range(count) if not is_whole(folder, delivery, number)]
    if missing:
        raise UserError(
            f"{folder}: {plural(len(missing), 'shard')} missing ({ranges(missing)}); call slurm/preprocess.sh again"
        )
    for key in delivery["keys"]:
        output = f"{delivery['output']}_{key}_document"
        if Path(f"{output}.idx").exists():
            print(f"{output}: exists already", flush=True)
            continue
        parts = [f"{prefix_of(folder, number)}_{key}_document" for number in range(count)]
        status = call("merge_datasets", ["--input", *parts, "--output-prefix", output])
        if status:
            return status
    prefix = shlex.quote(f"{delivery['output']}_{delivery['keys'][0]}_document")
    print(f"done; {shlex.quote(str(folder))} can be removed", flush=True)
    print(
        f"next: python tools/slice_versions.py --source {prefix} …, or lrpath update PLAN --source {prefix}"
    )
    return 0


def call(tool: str, argv: Sequence[str]) -> int:
    """Run another tool of this folder; return its exit status."""
    return subprocess.call([sys.executable, str(Path(__file__).with_name(f"{tool}.py")), *argv])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return 0, or 2 for bad input."""
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())

"""Flip a bit in a file of a trained plan, and record the reaction of each reader of the file."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_lrpath.checkpoints.reader import COMMON, SafeReader, own_metadata
from megatron_lrpath.runs.checkpoints import TRACKER, checkpoint_folder, latest_step
from megatron_lrpath.runs.history import parse_line
from tests.support.sft_fixtures import SFT, TOKENIZER, conversations, write_lines
from tests.support.training_fixtures import Outcome, launch, make_plan, run_words, train

NAMED = re.compile(
    r"damaged|unreadable|not a whole|cannot be read|not what was|not as it was|is not the one|not a lineage|"
    r"not an evaluation|not known to be|is missing|no file|holds something else|holds other bytes|another|unverified|"
    r"lacks|cannot be",
)
NOT_OF_THE_OUTCOME = (
    "manifest.json",
    ".metadata",
    "made-from.json",
    "result.json",
)  # contain times and random names
TIMES = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d)?|\b\d+(\.\d+)? s\b")
MAIN, BRANCH, SCRATCH = "runs/ours/main", "runs/ours/branch-v1", "runs/ptfs/scratch-v1"


@dataclass(frozen=True)
class Answer:
    """Output of a reader: exit status, lines, and a digest of the files that it left."""

    status: int | None
    lines: frozenset[str]
    outcome: str


def build(folder: Path, whole: bool = True) -> None:
    """Make a plan with a trained main path and an evaluated branch; `whole`: also chats and a stopped run."""
    chats = write_lines(folder / "chat.jsonl", conversations())
    section = {"data": str(chats)} | SFT
    plan = make_plan(folder, (8, 4), tokenizer=TOKENIZER, sft=section, megatron={"save_interval": 2})
    launch("tests.support.flips:records", [str(plan)]).ok()
    if whole:
        launch("tests.support.sft_fixtures:prepare", [str(plan)]).ok()
        train(run_words(plan, "ptfs", "scratch-v1", "--exit-interval", "4")).ok()
    train(run_words(plan, "ours", "main")).ok()
    train(run_words(plan, "ours", "branch-v1")).ok()
    evaluate(folder).ok()
    for path in (folder / "runs").glob("*/*/*"):
        # a recently written file would indicate a running training
        os.utime(path, times=(10_000, 10_000), follow_symlinks=False)


def records(argv: list[str]) -> None:
    """Write the records of a plan's datasets, as the preprocessing does."""
    from megatron_lrpath.data.record import write_record
    from megatron_lrpath.plan import load_plan
    from megatron_lrpath.tokenizers.prints import TokenizerSpec

    plan = load_plan(argv[0])
    for path in sorted(Path(argv[0]).parent.glob("data/*_text_document.bin")):
        write_record(path.with_suffix(""), "flips", TokenizerSpec.of_plan(plan).facts, {})


def command(argv: list[str]) -> None:
    """Run `lrpath` and exit with its status."""
    from megatron_lrpath.cli import main

    raise SystemExit(main(argv))


def check(argv: list[str]) -> None:
    """Run tools/check_slices.py --full and exit with its status."""
    from tools.check_slices import check_files, slice_files

    checked = check_files(slice_files([Path(argv[0])]), full=True)
    print(*checked.failures, sep="\n")
    raise SystemExit(bool(checked.failures))


def evaluate(folder: Path) -> Outcome:
    """Evaluate the branch; return the outcome."""
    argv = ["--plan", str(folder / "plan.yaml"), "--device", "cpu", "--runs", "ours/branch-v1"]
    return launch("megatron_lrpath.evaluate.worker:main", argv)


def lrpath(folder: Path, name: str, *argv: str) -> Outcome:
    """Run a command on the plan; return the outcome."""
    return launch("tests.support.flips:command", [name, str(folder / "plan.yaml"), *argv])


def trained(folder: Path, paradigm: str, run: str, *extra: str) -> Outcome:
    """Train a run; return the outcome."""
    return train(run_words(folder / "plan.yaml", paradigm, run, *extra))


READERS: dict[str, tuple[Callable[[Path], Outcome], str]] = {
    "start": (lambda at: trained(at, "ptfs", "scratch-v2", "--exit-interval", "2"), "runs/ptfs/scratch-v2"),
    "resume": (lambda at: trained(at, "ptfs", "scratch-v1"), SCRATCH),
    "branch": (lambda at: trained(at, "ours", "branch-v2"), "runs/ours/branch-v2"),
    "fine-tuning": (lambda at: trained(at, "ours", "sft-v1", "--exit-interval", "2"), "runs/ours/sft-v1"),
    "evaluation": (evaluate, f"{BRANCH}/eval.json"),
    "export": (lambda at: lrpath(at, "export", "--run", "branch-v1", "--output", str(at / "hf")), "hf"),
    "merge": (lambda at: lrpath(at, "merge", "--version", "v1"), "runs/merged"),
    "report": (lambda at: lrpath(at, "report"), "runs/report"),
    "status": (lambda at: lrpath(at, "status"), ""),
    "check --full": (
        lambda at: launch("tests.support.flips:check", [str(at / "data/slices")]),
        "",
    ),
}


def read(name: str, folder: Path) -> Answer:
    """Run a reader; return its answer."""
    act, left = READERS[name]
    outcome = act(folder)
    page = folder / "runs/report/report.md"
    text = outcome.output + (page.read_text() if name == "report" and page.is_file() else "")
    lines = frozenset(TIMES.sub("", line).strip() for line in text.splitlines())
    said = "" if left else repr(sorted(lines))
    return Answer(outcome.status[0], lines, digest(folder / left) if left else said)


def digest(path: Path) -> str:
    """Return a digest of the results: tensors of the newest checkpoint and the losses, or the files."""
    if (path / "checkpoints").is_dir():
        step = latest_step(path / "checkpoints")
        return (
            "none"
            if step is None
            else f"{tensors(checkpoint_folder(path / 'checkpoints', step))} {losses(path)}"
        )
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    total = hashlib.sha256()
    for file in files:
        if ".distcp" in file.name or file.name in NOT_OF_THE_OUTCOME:
            continue
        total.update(
            file.name.encode() + TIMES.sub("", file.read_text("latin-1")).encode("latin-1", "replace")
        )
    for manifest in [one for one in files if one.name == ".metadata"]:
        total.update(tensors(manifest.parent).encode())
    return total.hexdigest()


def losses(folder: Path) -> list[Any]:
    """Return the rows of a history without times and checksums."""
    rows = [parse_line(line) for line in (folder / "history.jsonl").read_bytes().splitlines()]
    return [(row.step, row.loss, row.grad_norm, row.lr) if row else None for row in rows]


def tensors(folder: Path) -> str:
    """Return a digest of every tensor in a checkpoint."""
    import torch
    import torch.distributed.checkpoint as dcp

    reader = SafeReader(folder, verify=False)
    entries = own_metadata(folder / ".metadata", "flips").state_dict_metadata
    wanted = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if hasattr(entry, "properties")
    }
    dcp.load(wanted, storage_reader=reader, no_dist=True)
    total = hashlib.sha256()
    for name in sorted(wanted):
        total.update(name.encode() + wanted[name].contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@dataclass(frozen=True)
class Place:
    """Files of one kind, or a range of their bytes, that may be damaged, and their readers."""

    kind: str
    find: Callable[[Path], list[tuple[Path, int, int]]]
    readers: tuple[str, ...]
    run: str = ""


def whole(*patterns: str) -> Callable[[Path], list[tuple[Path, int, int]]]:
    """Return a function that returns all bytes of the files that match."""

    def find(folder: Path) -> list[tuple[Path, int, int]]:
        files = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
        return [(path, 0, path.stat().st_size) for path in files]

    return find


def stretches(
    checkpoint: str, *names: str, others: bool = False
) -> Callable[[Path], list[tuple[Path, int, int]]]:
    """Return a function that returns the items of a checkpoint with a prefix in `names`, or the others."""

    def find(folder: Path) -> list[tuple[Path, int, int]]:
        at = folder / checkpoint
        stored = own_metadata(at / ".metadata", "flips").storage_data
        chosen = [one for index, one in stored.items() if index.fqn.startswith(names) != others]
        return [(at / one.relative_path, one.offset, one.offset + one.length) for one in chosen]

    return find


def of_checkpoint(run: str, step: int, readers: Sequence[str]) -> Iterator[Place]:
    """Yield the kinds of places in a checkpoint."""
    at = f"{run}/checkpoints/iter_{step:07d}"
    yield Place("tensor data", stretches(at, COMMON, others=True), tuple(readers), run)
    yield Place("common state", stretches(at, COMMON), tuple(readers), run)
    yield Place("metadata", whole(f"{at}/.metadata", f"{at}/metadata.json"), tuple(readers))
    yield Place("manifest", whole(f"{at}/manifest.json"), (*readers, "status"))


PLACES: tuple[Place, ...] = (
    *of_checkpoint(SCRATCH, 4, ("resume",)),
    *of_checkpoint(MAIN, 10, ("branch",)),
    *of_checkpoint(BRANCH, 8, ("evaluation", "export", "fine-tuning")),
    *of_checkpoint(MAIN, 6, ("merge",)),
    Place("tracker", whole(f"{SCRATCH}/checkpoints/{TRACKER}"), ("resume", "status")),
    Place("tracker", whole(f"{MAIN}/checkpoints/{TRACKER}"), ("branch",)),
    Place("tracker", whole(f"{BRANCH}/checkpoints/{TRACKER}"), ("evaluation", "export")),
    Place(".bin", whole("data/v1_*.bin", "data/valid_*.bin"), ("start", "resume", "check --full")),
    Place(".idx", whole("data/v1_*.idx", "data/valid_*.idx"), ("start", "branch", "check --full")),
    Place(
        "slice", whole("data/slices/v1.slice", "data/slices/valid.slice"), ("start", "report", "check --full")
    ),
    Place("record", whole("data/v1_*.tokens.json"), ("start", "check --full")),
    Place("prepared chats", whole("runs/sft/data-*/*.bin"), ("fine-tuning",)),
    Place(
        "prepared chats", whole("runs/sft/data-*/*.idx", "runs/sft/prepared.json"), ("fine-tuning", "status")
    ),
    Place("index cache", whole("data/slices/.cache/*.npy"), ("start", "resume", "branch")),
    Place("index cache", whole("runs/sft/.cache/*.npy"), ("fine-tuning",)),
    Place("lineage", whole(f"{MAIN}/lineage.json"), ("branch", "report", "status")),
    Place("lineage", whole(f"{SCRATCH}/lineage.json"), ("resume",)),
    Place("lineage", whole(f"{BRANCH}/lineage.json"), ("fine-tuning", "report", "status")),
    Place("results", whole(f"{BRANCH}/result.json", f"{BRANCH}/eval.json"), ("report", "status", "export")),
    Place("results", whole(f"{SCRATCH}/history.jsonl"), ("resume", "report", "status")),
    Place("results", whole(f"{BRANCH}/history.jsonl"), ("report", "status")),
)
CHEAP = ("report", "status", "check --full", "export")


@dataclass(frozen=True)
class Flip:
    """A flipped bit of a file, and the reader's reaction: `refused`, `named`, `identical` or `silent`."""

    kind: str
    path: str
    byte: int
    bit: int
    reader: str
    taken: str
    trace: bool
    said: tuple[str, ...] = ()


def pairs(base: Path, readers: Sequence[str]) -> list[tuple[Place, str]]:
    """Return every place that exists, with each of its readers."""
    there = [place for place in PLACES if (base / place.run).is_dir() and place.find(base)]
    return [(place, reader) for place in there for reader in place.readers if reader in readers]


def flip_bits(
    base: Path, work: Path, count: int, seed: int, readers: Sequence[str], report: Callable[[Flip], None]
) -> list[Flip]:
    """Flip `count` single bits, places and readers in turn, each in a fresh copy of `base` at `work`."""
    generator = random.Random(seed)
    chosen = pairs(base, readers)
    undamaged: dict[str, Answer] = {}
    found = []
    for number in range(count):
        place, reader = chosen[number % len(chosen)]
        if reader not in undamaged:
            fresh(base, work)
            undamaged[reader] = read(reader, work)
            assert undamaged[reader].status == 0, f"{reader}: {sorted(undamaged[reader].lines)}"
        fresh(base, work)
        stretch = generator.choice([one for one in place.find(work) if one[2] > one[1]])
        byte, bit = generator.randrange(stretch[1], stretch[2]), generator.randrange(8)
        flip(stretch[0], byte, bit)
        answer = read(reader, work)
        one = judged(
            place.kind, str(stretch[0].relative_to(work)), byte, bit, reader, answer, undamaged[reader]
        )
        report(one)
        found.append(one)
    return found


def fresh(base: Path, work: Path) -> None:
    """Copy the files with their times."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(base, work, symlinks=True)


def flip(path: Path, byte: int, bit: int) -> None:
    """Flip a bit as a disk does: the file's time does not change."""
    about = path.stat()
    with path.open("r+b") as stream:
        stream.seek(byte)
        value = stream.read(1)[0]
        stream.seek(byte)
        stream.write(bytes([value ^ (1 << bit)]))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def judged(kind: str, path: str, byte: int, bit: int, reader: str, answer: Answer, undamaged: Answer) -> Flip:
    """Return the flip with the reader's reaction."""
    new = tuple(sorted(answer.lines - undamaged.lines))
    trace = any("Traceback" in line for line in new)
    made = partial(Flip, kind, path, byte, bit, reader)
    if answer.status != 0:
        return made("refused", trace, new)
    if any(NAMED.search(line) for line in new):
        return made("named", trace, new)
    return made("identical" if answer.outcome == undamaged.outcome else "silent", trace, new)

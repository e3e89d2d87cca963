#!/usr/bin/env python3
"""Time tools/preprocess_data.py against Megatron-LM's tool, side by side, and compare the bytes they write.

    benchmarks/preprocessing.py --upstream ~/Megatron-LM --workers 1 2 --repeat 3

Text is Python source of this environment unless `--input` names JSON lines. Rates are MB of input per second:
of the whole command, and by each tool's own count once it is at work. Tokenizers: SentencePiece BPE with byte
fallback, Hugging Face byte-level BPE (both trained on the text first) and NullTokenizer.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import re
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOKENIZERS = ("sentencepiece", "huggingface", "null")


@dataclass(frozen=True)
class Timing:
    """Seconds by the clock and of processor time, and MB/s by the command's own count (or 0)."""

    wall: float
    cpu: float
    own_rate: float


def gather_text(target: Path, megabytes: float) -> None:
    """Write Python source of this environment as JSON lines."""
    written = 0
    folders = [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))]
    with target.open("w") as lines:
        for path in (path for folder in folders for path in sorted(folder.rglob("*.py"))):
            text = path.read_text("utf-8", "ignore")
            if text.strip():
                written += lines.write(json.dumps({"text": text}) + "\n")
            if written > megabytes * 1e6:
                return


def number_lines(source: Path, target: Path) -> None:
    """Write the same amount of text as numbers, for NullTokenizer."""
    with source.open() as lines, target.open("w") as out:
        for line in lines:
            data = line.encode()
            out.write(json.dumps({"text": " ".join(str(byte * 7) for byte in data[: len(data) // 4])}) + "\n")


def train_huggingface(source: Path, folder: Path) -> None:
    """Train a byte-level BPE of 8,192 pieces and save it in Hugging Face's format."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    texts = [json.loads(line)["text"] for line in source.open()]
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(
        texts[::4], vocab_size=8192, special_tokens=["<|endoftext|>"], show_progress=False
    )
    PreTrainedTokenizerFast(tokenizer_object=trainer._tokenizer, eos_token="<|endoftext|>").save_pretrained(
        folder
    )


def tokenizer_arguments(kind: str, work: Path) -> list[str]:
    """Return the tokenizer's arguments, the same for both tools."""
    if kind == "sentencepiece":
        return ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(work / "sp.model")]
    if kind == "huggingface":
        return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(work / "hf")]
    return ["--tokenizer-type", "NullTokenizer", "--vocab-size", "8192"]


def timed(command: list[str], environment: dict[str, str]) -> Timing:
    """Run a command and return its time with all its processes; exit if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wall = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if answer.returncode:
        raise SystemExit(f"{' '.join(command)}\n{answer.stderr}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    rates = re.findall(r"([\d.]+) MB/s", answer.stderr)
    return Timing(wall, cpu, float(rates[-1]) if rates else 0.0)


def compare(kind: str, workers: int, source: Path, work: Path, args: argparse.Namespace) -> None:
    """Run both tools in turn, print a row, check that the outputs are equal."""
    common = ["--input", str(source), "--workers", str(workers), "--append-eod", "--log-interval", "100"]
    common += tokenizer_arguments(kind, work)
    ours_at, theirs_at = work / f"ours-{kind}", work / f"theirs-{kind}"
    ours_command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), *common]
    ours_command += ["--output-prefix", str(ours_at), "--overwrite"]
    theirs_command = [sys.executable, f"{args.upstream}/tools/preprocess_data.py", *common]
    theirs_command += ["--output-prefix", str(theirs_at)]
    ours, theirs = [], []
    for _ in range(args.repeat):
        ours.append(timed(ours_command, {**os.environ, "PYTHONPATH": str(ROOT)}))
        theirs.append(timed(theirs_command, {**os.environ, "PYTHONPATH": args.upstream}))
    same = all(
        filecmp.cmp(f"{ours_at}_text_document.{end}", f"{theirs_at}_text_document.{end}", shallow=False)
        for end in ("bin", "idx")
    )
    size = source.stat().st_size / 1e6
    whole = [size / min(run.wall for run in runs) for runs in (ours, theirs)]
    running = [max(run.own_rate for run in runs) for runs in (ours, theirs)]
    running[1] *= 1.048576  # upstream counts in MiB
    cpu = min(run.cpu for run in theirs) / min(run.cpu for run in ours)
    print(
        f"{kind:14}{workers:8}{whole[0]:9.1f}{whole[1]:10.1f}{whole[0] / whole[1]:7.1f}x"
        f"{running[0]:11.1f}{running[1]:10.1f}{running[0] / max(running[1], 1e-9):7.1f}x"
        f"{cpu:11.1f}x   {'equal' if same else 'DIFFERENT'}",
        flush=True,
    )


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--upstream", required=True, help="a checkout of Megatron-LM")
    parser.add_argument("--input", type=Path, help="JSON lines to use instead of Python source")
    parser.add_argument("--megabytes", type=float, default=30.0)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=1, help="the best of so many runs counts")
    parser.add_argument("--tokenizers", nargs="+", choices=TOKENIZERS, default=list(TOKENIZERS))
    args = parser.parse_args()
    args.upstream = str(Path(args.upstream).resolve())
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source = args.input or work / "text.jsonl"
        if not args.input:
            gather_text(source, args.megabytes)
        number_lines(source, work / "numbers.jsonl")
        train = [sys.executable, str(ROOT / "tools/train_tokenizer.py"), "--input", str(source)]
        train += ["--output-prefix", str(work / "sp"), "--vocab-size", "8192", "--sample-bytes", "1e7"]
        timed(train, {**os.environ, "PYTHONPATH": str(ROOT)})
        if "huggingface" in args.tokenizers:
            train_huggingface(source, work / "hf")
        print("MB of input per second     whole command                without start        processor")
        print(
            "tokenizer      workers     ours  upstream  ratio       ours  upstream  ratio        time   bytes"
        )
        for kind in args.tokenizers:
            for workers in args.workers:
                compare(kind, workers, work / "numbers.jsonl" if kind == "null" else source, work, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())

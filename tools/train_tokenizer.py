#!/usr/bin/env python3
"""Train a SentencePiece tokenizer on a random sample of JSON lines or Parquet files.

The same inputs, arguments and seed give the same model, byte for byte.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_lrpath.console import run_tool
from megatron_lrpath.errors import UserError

TRAINER_OPTIONS = (
    "vocab_size", "model_type", "byte_fallback", "character_coverage", "control_symbols", "user_defined_symbols",
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="as for preprocess_data.py")
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys (or columns) to take"
    )
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX.model and PREFIX.vocab")
    parser.add_argument(
        "--vocab-size", type=int, default=100_000, help="pieces, special ones included (default: 100000)"
    )
    parser.add_argument("--model-type", choices=["bpe", "unigram"], default="bpe")
    parser.add_argument(
        "--no-byte-fallback",
        dest="byte_fallback",
        action="store_false",
        help="unknown characters become <unk>",
    )
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        metavar="SHARE",
        help="of the text's characters to know as such (default: 0.9995)",
    )
    parser.add_argument(
        "--sample-bytes",
        type=float,
        default=256e6,
        metavar="N",
        help="bytes of text to train on (default: 256e6)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="draws the sample (default: 1234)")
    parser.add_argument(
        "--normalize", action="store_true", help="NFKC and single spaces; without it text is kept as it is"
    )
    parser.add_argument(
        "--control-symbols",
        nargs="+",
        default=[],
        metavar="PIECE",
        help="more control tokens, which text never becomes",
    )
    parser.add_argument(
        "--user-defined-symbols",
        nargs="+",
        default=[],
        metavar="PIECE",
        help="pieces that are always one token",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model")
    return parser


def train(args: argparse.Namespace) -> int:
    """Draw, train, write, report."""
    from megatron_lrpath.data.preprocess.readers import expand_inputs
    from megatron_lrpath.data.tokenizer_training import draw_sample, train_model, write_model

    started = time.monotonic()
    target = Path(f"{args.output_prefix}.model")
    if target.exists() and not args.overwrite:
        raise UserError(f"{target} exists already; --overwrite replaces it")
    sample = draw_sample(expand_inputs(args.input), args.json_keys, int(args.sample_bytes), args.seed)
    if not sample.texts:
        raise UserError(f"no usable documents in {', '.join(args.input)}")
    options = {name: getattr(args, name) for name in TRAINER_OPTIONS}
    write_model(args.output_prefix, train_model(sample.texts, args.seed, not args.normalize, **options))
    unusable = f"; {sample.unusable:,} documents were unusable" if sample.unusable else ""
    print(
        f"{target}: {args.vocab_size:,} pieces from {sample.drawn_bytes / 1e6:,.1f} of "
        f"{sample.total_bytes / 1e6:,.1f} MB of text ({sample.documents:,} documents), "
        f"{time.monotonic() - started:.1f} s{unusable}",
        file=sys.stderr,
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; 0, or 2 for bad input."""
    return run_tool(build_parser(), train, argv)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Tokenize JSON lines or Parquet into Megatron's indexed datasets (.bin and .idx), one per JSON key.

Takes the arguments of Megatron-LM's tool of this name and writes the same bytes, faster.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from megatron_lrpath.console import ToolParser, run_tool

TOKENIZERS = [
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "HuggingFaceTokenizer",
    "NullTokenizer",
    "TikTokenizer",
    "GPT2BPETokenizer",
    "BertWordPieceLowerCase",
    "BertWordPieceCase",
    "MultimodalTokenizer",
    "NullMultimodalTokenizer",
    "SFTTokenizer",
]


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for input, output and the run."""
    group = parser.add_argument_group("input")
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON lines or Parquet, plain or compressed with gzip or zstandard; patterns are expanded in "
        "sorted order, - is standard input",
    )
    group.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys (or columns) to take"
    )
    group.add_argument("--sentence-lists", action="store_true", help="a text may be a list of sentences")
    group.add_argument(
        "--keep-empty",
        action="store_true",
        help="keep empty texts as documents without tokens, as Megatron-LM does; without it they are "
        "passed over and counted",
    )
    group.add_argument(
        "--max-rejects",
        type=int,
        default=0,
        metavar="N",
        help="how many documents may be unusable; one more ends the run at once (default: 0). They are "
        "listed in PREFIX.rejects",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--output-prefix", required=True, help="writes PREFIX_KEY_document.bin and .idx")
    group.add_argument(
        "--append-eod", action="store_true", help="end each document with the end-of-document token"
    )
    group.add_argument("--overwrite", action="store_true", help="replace an existing output")
    group = parser.add_argument_group("running")
    group.add_argument("--workers", type=int, default=1, help="worker processes (default: 1)")
    group.add_argument(
        "--log-interval", type=int, default=1000, metavar="N", help="documents between two lines of progress"
    )
    group.add_argument(
        "--partitions",
        type=int,
        default=1,
        metavar="N",
        help="order the documents as Megatron-LM does with as many partitions; no gain in speed here",
    )
    group.add_argument(
        "--keep-sequential-samples", action="store_true", help="keep the order in spite of --partitions"
    )


def add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add Megatron's tokenizer arguments and two for the text itself."""
    group = parser.add_argument_group("tokenizer")
    group.add_argument(
        "--tokenizer-type", required=True, choices=TOKENIZERS, metavar="TYPE", help=", ".join(TOKENIZERS)
    )
    group.add_argument(
        "--tokenizer-model", metavar="PATH", help="the tokenizer's file, or its name for Hugging Face"
    )
    group.add_argument("--vocab-size", type=int, help="size of the vocabulary (NullTokenizer)")
    group.add_argument(
        "--exact-tokenizer",
        action="store_true",
        help="tokenize with SentencePiece itself; without it a faster library does, where it is exact",
    )
    group.add_argument(
        "--parse-special-tokens",
        action="store_true",
        help="a Hugging Face special token spelled out in a text becomes that token, as in Megatron-LM; "
        "without it text is text",
    )
    group.add_argument("--vocab-file")
    group.add_argument("--merge-file")
    group.add_argument("--tokenizer-metadata", dest="metadata_path")
    group.add_argument("--tokenizer-special-tokens", dest="special_tokens", nargs="+")
    group.add_argument("--tiktoken-pattern", choices=["v1", "v2"])
    group.add_argument("--tiktoken-num-special-tokens", type=int, default=1000)
    group.add_argument("--tokenizer-sentencepiece-legacy", action="store_true")
    group.add_argument(
        "--no-tokenizer-sentencepiece-ignore-extra-whitespaces",
        "--disable-tokenizer-sentencepiece-ignore-extra-whitespaces",
        dest="tokenizer_sentencepiece_ignore_extra_whitespaces",
        action="store_false",
    )
    group.add_argument("--tokenizer-hf-no-use-fast", action="store_true")
    group.add_argument("--tokenizer-hf-no-include-special-tokens", action="store_true")
    group.add_argument("--trust-remote-code", action="store_true")
    group.add_argument("--null-tokenizer-eod-id", type=int)
    group.add_argument("--null-tokenizer-pad-id", type=int, default=-1)
    group.add_argument("--chat-template")
    ignored = parser.add_argument_group("accepted, without effect on the output")
    ignored.add_argument("--padded-vocab-size", type=int)
    ignored.add_argument("--no-pad-vocab-size", "--disable-pad-vocab-size", action="store_true")
    ignored.add_argument("--vocab-extra-ids", type=int, default=0)
    ignored.add_argument("--lang", default="english")
    ignored.add_argument("--keep-newlines", action="store_true")
    ignored.add_argument("--workers-to-check", nargs="+", type=int)
    ignored.add_argument("--max-documents", type=int)
    refused = parser.add_argument_group("refused, with a reason")
    refused.add_argument("--split-sentences", action="store_true")
    refused.add_argument("--find-optimal-num-workers", action="store_true")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the tool's arguments."""
    parser = ToolParser(description=__doc__)
    add_data_arguments(parser)
    add_tokenizer_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Tokenize the input and print the next step; return 0."""
    from megatron_lrpath.data.preprocess.pipeline import preprocess

    preprocess(args)
    if "SLURM_ARRAY_TASK_ID" not in os.environ:  # in a job array it is a part of a delivery
        prefix = shlex.quote(f"{args.output_prefix}_{args.json_keys[0]}_document")
        text = f"next: python tools/slice_versions.py --source {prefix} …, or lrpath update PLAN --source {prefix}"
        print(text, file=sys.stderr)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return 0, or 2 for bad input."""
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
